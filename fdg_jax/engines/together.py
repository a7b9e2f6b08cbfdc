"""Several runs as one compiled program, on one device, each with its own numbers.

Runs that differ only in their seeds compute the same function of other arrays. Each
has a thread and a fused engine of its own, as if it were alone; the calls that their
engines make meet here, wait for each other, and are made as one call of the function,
vmapped over the runs. Nothing else knows of it: every run has its own batches, metrics,
evaluations and snapshots, and gets what it would alone, to rounding.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fdg_jax.words import describe


@dataclass
class _Call:
    """A call that waits for those of the other runs.

    Attributes:
        function: what to call.
        donated: whether the first argument is given up.
        arguments: of the call.
        result: what it returned, once it is done.
        error: what it raised instead.
        done: whether it is.
    """

    function: Callable
    donated: bool
    arguments: tuple
    result: Any = None
    error: BaseException | None = None
    done: bool = False


class Together:
    """The place where the calls of several runs meet."""

    def __init__(self, num_runs: int):
        """Expects the calls of so many runs, each in a thread of its own.

        Args:
            num_runs: how many runs there are; each must ``leave`` at its end.
        """
        self._num_runs = num_runs
        self._waiting = []
        self._programs = {}
        self._changed = threading.Condition()

    def jit(self, function: Callable, donate_argnums: Sequence[int] | int = ()):
        """Compiles a function of one run; takes the place of ``jax.jit`` in its engine.

        Args:
            function: of arrays; the other runs' functions of the same name must
                compute the same.
            donate_argnums: 0 or nothing.

        Returns:
            A function that waits until every run that is left makes a call.
        """
        assert donate_argnums in (0, (), (0,)), donate_argnums
        donated = donate_argnums != ()
        return lambda *arguments: self._call(_Call(function, donated, arguments))

    def leave(self) -> None:
        """Tells that a run has ended: the others no longer wait for it."""
        with self._changed:
            self._num_runs -= 1
            self._changed.notify_all()

    def _call(self, call: _Call) -> Any:
        with self._changed:
            self._waiting.append(call)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: call.done or len(self._waiting) == self._num_runs
            )
            if not call.done:
                self._make(self._waiting)
                self._waiting = []
                self._changed.notify_all()
        if call.error is not None:
            raise call.error
        return call.result

    def _make(self, calls: Sequence[_Call]) -> None:
        """Makes calls that wait, those of the same function and shapes as one."""
        alike = {}
        for call in calls:
            key = (call.function.__name__, describe(call.arguments))
            alike.setdefault(key, []).append(call)
        for (name, _), group in alike.items():
            try:
                results = self._program(name, group)(
                    [call.arguments[0] for call in group],
                    [call.arguments[1:] for call in group],
                )
            except BaseException as error:
                for call in group:
                    call.error, call.done = error, True
                continue
            for call, result in zip(group, results, strict=True):
                call.result, call.done = result, True

    def _program(self, name: str, group: Sequence[_Call]) -> Callable:
        key = (name, len(group))
        if key not in self._programs:
            function = group[0].function
            if len(group) > 1:
                function = jax.vmap(function)

            def program(firsts, others):
                arguments = [(f, *rest) for f, rest in zip(firsts, others, strict=True)]
                if len(arguments) == 1:
                    return [function(*arguments[0])]
                stacked = jax.tree.map(lambda *a: jnp.stack(a), *arguments)
                results = function(*stacked)
                return [
                    jax.tree.map(lambda a, i=i: a[i], results)
                    for i in range(len(arguments))
                ]

            donate = (0,) if group[0].donated else ()
            self._programs[key] = jax.jit(program, donate_argnums=donate)
        return self._programs[key]
