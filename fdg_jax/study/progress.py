"""What a study tells while it runs: a bar over its cells, and a line for each."""

import threading
import time

import tqdm

_LINE_EVERY_SECONDS = 60.0  # of a cell under way, where there is no bar


class Progress:
    """A tqdm bar on standard error over all cells, and lines on standard output.

    Where standard error is no terminal there is no bar, and a cell that takes long
    tells in a line each minute how far it is.
    """

    def __init__(self, total: int, done: int):
        """Draws the bar.

        Args:
            total: cells in the study.
            done: those that have ended before.
        """
        self._total = total
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            unit="cell",
            smoothing=0.0,  # cells differ, so what is left goes by the mean
            dynamic_ncols=True,
            disable=None,
            bar_format="{l_bar}{bar}| {n:.1f}/{total} cells [{elapsed}<{remaining}]"
            "{postfix}",
        )
        self._done = done
        self._under_way = {}
        self._told = time.monotonic()
        self._lock = threading.Lock()

    def begin(self, name: str) -> None:
        """A cell begins."""
        with self._lock:
            self._under_way[name] = (0.0, time.monotonic())

    def show(self, name: str, fraction: float, state: str) -> None:
        """Shows how far a cell is.

        Args:
            name: of the cell.
            fraction: in [0, 1], of its epochs.
            state: epoch and accuracy, in words.
        """
        with self._lock:
            before, begun = self._under_way[name]
            if fraction != before:
                self._under_way[name] = (fraction, begun)
                self._draw(f"{name}: {state}")
            late = time.monotonic() - self._told > _LINE_EVERY_SECONDS
            if self._bar.disable and late:
                self._told = time.monotonic()
                self.say(f"{self._number} {name}: {state}")

    def end(self, name: str, state: str) -> None:
        """A cell has ended, as the words say."""
        with self._lock:
            seconds = time.monotonic() - self._under_way.pop(name)[1]
            self.say(f"{self._number} {name}: {state} ({seconds:.0f} s)")
            self._told = time.monotonic()
            self._done += 1
            self._draw("")

    def _draw(self, words: str) -> None:
        self._bar.n = self._done + sum(part for part, _ in self._under_way.values())
        self._bar.set_postfix_str(words)

    def say(self, line: str) -> None:
        """Prints a line, above the bar."""
        self._bar.write(line)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()

    @property
    def _number(self) -> str:
        width = len(str(self._total))
        return f"[{self._done + 1:{width}}/{self._total}]"
