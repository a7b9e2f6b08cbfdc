"""A study as pictures: learning curves, and the error over beta; needs matplotlib.

Mean over the seeds with a band of one sample deviation on either side.
"""

import collections
import statistics
from collections.abc import Sequence
from typing import Any

from fdg_jax.study.results import FINISHED, Run
from fdg_jax.study.table import by_setting

_WIDTH, _HEIGHT = 5.2, 3.8  # of a panel, in inches
_COLUMNS = 3


def curves(runs: Sequence[Run]) -> Any | None:
    """Draws test error over epochs, a panel per data set, network and K.

    Runs with one stage, that is back-propagation, are drawn in all panels of their
    network, to compare with.

    Args:
        runs: of all cells; those that have not been evaluated twice are left out.

    Returns:
        A matplotlib figure; None where there is nothing to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panels = collections.defaultdict(dict)
    groups = by_setting(run for run in runs if len(run.epochs) > 1)
    for setting, group in groups.items():
        config = group[0].cell.config
        panels[config.dataset, config.network, config.num_stages][setting] = group
    if not panels:
        return None
    for (dataset, network, num_stages), shown in panels.items():
        if num_stages > 1:
            panels[dataset, network, num_stages] = (
                panels.get((dataset, network, 1), {}) | shown
            )
    alone = [key for key in panels if key[2] == 1]
    for key in alone:  # drawn by itself only where it is all there is
        if any(other[:2] == key[:2] and other != key for other in panels):
            del panels[key]
    figure, axes = _figure(len(panels))
    for panel, ((dataset, network, num_stages), shown) in zip(
        axes, sorted(panels.items()), strict=True
    ):
        for group in shown.values():
            points = collections.defaultdict(list)
            for row in (row for run in group for row in run.epochs):
                points[row["epoch"]].append(row["test_error_percent"])
            _draw(panel, points, _label(group[0]), group[0].cell.method == "bp")
        panel.set(xlabel="epoch", ylabel="test error, %")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_title(f"{network} on {dataset}, K = {num_stages}", fontsize=10)
        panel.legend(fontsize=8, frameon=False)
    return figure


def shrink(runs: Sequence[Run]) -> Any | None:
    """Draws the final test error over beta, a panel per data set and network.

    Args:
        runs: of all cells; those that are not finished are left out.

    Returns:
        A matplotlib figure; None unless two betas of one setting can be compared.

    Raises:
        ImportError: matplotlib is not installed.
    """
    lines, straight = collections.defaultdict(dict), collections.defaultdict(list)
    for run in runs:
        config, cell = run.cell.config, run.cell
        if run.state != FINISHED:
            continue
        if config.num_stages == 1:
            straight[config.dataset, config.network].append(run.final_error)
            continue
        line = (cell.method, config.num_stages, *map(str, cell.axes.values()))
        points = lines[config.dataset, config.network].setdefault(line, {})
        points.setdefault(config.shrink, []).append(run.final_error)
    for panel, drawn in list(lines.items()):
        lines[panel] = {line: p for line, p in drawn.items() if len(p) > 1}
    lines = {panel: drawn for panel, drawn in lines.items() if drawn}
    if not lines:
        return None
    figure, axes = _figure(len(lines))
    for panel, ((dataset, network), drawn) in zip(
        axes, sorted(lines.items()), strict=True
    ):
        for (method, num_stages, *rest), points in drawn.items():
            _draw(panel, points, " ".join([f"{method}, K = {num_stages}", *rest]))
        if errors := straight[dataset, network]:
            panel.axhline(
                statistics.fmean(errors), color="black", ls="--", lw=1, label="K = 1"
            )
        panel.set(xlabel="beta", ylabel="final test error, %")
        panel.set_title(f"{network} on {dataset}", fontsize=10)
        panel.legend(fontsize=8, frameon=False)
    return figure


def _figure(num_panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # slow to import, and not always installed

    columns = min(num_panels, _COLUMNS)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[num_panels:]:
        unused.remove()
    return figure, axes[:num_panels]


def _draw(
    axes: Any, points: dict[float, list[float]], label: str, plain: bool = False
) -> None:
    """Draws a line of means with a band of one deviation around it."""
    xs = sorted(points)
    means = [statistics.fmean(points[x]) for x in xs]
    spread = [statistics.stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
    style = {"color": "black"} if plain else {}
    (line,) = axes.plot(xs, means, label=label, lw=1.5, marker=".", ms=4, **style)
    low = [m - s for m, s in zip(means, spread, strict=True)]
    high = [m + s for m, s in zip(means, spread, strict=True)]
    axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, lw=0)
    axes.spines[["top", "right"]].set_visible(False)


def _label(run: Run) -> str:
    """What tells a setting from the others of its panel."""
    cell = run.cell
    words = [cell.method]
    if cell.shrinks:
        words.append(f"beta {cell.config.shrink:g}")
    return ", ".join([*words, *map(str, cell.axes.values())])
