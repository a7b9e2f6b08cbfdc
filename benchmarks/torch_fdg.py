"""The FDG authors' scheme in PyTorch, written anew.

Per iteration one thread per module (here: stage), all joined before anything is handed
over. A module first uses the gradient that came, if one did: backward, update; then it
runs the forward on the activation that came. The last one runs forward, loss, backward
and update. Gradients are multiplied by beta on their way.

The authors' program updated weights in place under the graph that the delayed backward
still needs, which PyTorch refuses since 1.5. Here an update makes new tensors, and the
stash keeps each graph with the weights that it used.
"""

import contextlib
import itertools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks import task as tasks
from benchmarks import torch_networks
from benchmarks.torch_bp import (
    autocast,
    describe_devices,
    find_device,
    peak_mib,
    put_batch,
    reset_peak,
    synchronize,
)

TRIAL_ITERATIONS = 4


class TorchStage:
    """Some blocks with parameters of their own, which no update overwrites.

    Attributes:
        params: name -> tensor, today's.
        num_updates: updates applied so far.
        staleness: updates between the forward of the gradient used last and its use.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        """Puts the blocks on a device; buffers stay theirs, parameters are copied."""
        self.device = device
        self._module = nn.Sequential(*blocks).to(
            device, memory_format=torch.channels_last
        )
        self.params = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in self._module.named_parameters()
        }
        self._velocity = [torch.zeros_like(p) for p in self.params.values()]
        self._stash = deque()
        self.num_updates = 0
        self.staleness = None

    def forward(self, x: torch.Tensor, context: Callable) -> torch.Tensor:
        """Runs the blocks in training mode, stashes the graph, and returns its output.

        Args:
            x: the input; its gradient is wanted where ``x.requires_grad``.
            context: makes the autocast context.
        """
        with context():
            y = functional_call(self._module, self.params, (x,))
        self._stash.append((self.num_updates, self.params, x, y))
        return y.detach()

    def backward(self, cotangent: torch.Tensor) -> torch.Tensor | None:
        """Uses the gradient of the oldest batch; returns that of its input."""
        num_updates, params, x, y = self._stash.popleft()
        self.staleness = self.num_updates - num_updates
        return self._pull(y, x, params, cotangent)

    def loss_step(
        self, x: torch.Tensor, label: torch.Tensor, context: Callable
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs forward, loss, backward and update; returns loss and dx."""
        self.staleness, params = 0, self.params
        with context():
            loss = F.cross_entropy(functional_call(self._module, params, (x,)), label)
        return loss.detach(), self._pull(loss, x, params, None)

    def _pull(self, y, x, params, cotangent):
        inputs = [*params.values(), *([x] if x.requires_grad else [])]
        grads = torch.autograd.grad(y, inputs, cotangent)
        self._update(grads[: len(params)])
        return grads[-1] if x.requires_grad else None

    @torch.no_grad()
    def _update(self, grads):
        """SGD: v <- momentum v + g + decay w, w <- w - rate v; w in new tensors."""
        params = list(self.params.values())
        grads = torch._foreach_add(grads, params, alpha=tasks.WEIGHT_DECAY)
        torch._foreach_mul_(self._velocity, tasks.MOMENTUM)
        torch._foreach_add_(self._velocity, grads)
        params = torch._foreach_add(params, self._velocity, alpha=-tasks.LEARNING_RATE)
        names = self.params
        self.params = {
            name: p.requires_grad_() for name, p in zip(names, params, strict=True)
        }
        self.num_updates += 1


class AuthorsScheme:
    """K stages and what is on its way between them.

    Attributes:
        stages: the stages in order.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        cuts: Sequence[int],
        devices: Sequence[torch.device],
        *,
        threads: int = 1,
        context: Callable | None = None,
    ):
        """Cuts the network.

        Args:
            blocks: of the network.
            cuts: positions at which stages begin.
            devices: one per stage.
            threads: intra-op threads of each stage, on CPU.
            context: makes the autocast context.
        """
        bounds = [0, *cuts, len(blocks)]
        self.stages = [
            TorchStage(blocks[first:stop], device)
            for first, stop, device in zip(bounds, bounds[1:], devices, strict=False)
        ]
        self._threads, self._context = threads, context or contextlib.nullcontext
        self._activations = [None] * len(self.stages)
        self._cotangents = [None] * len(self.stages)
        self._labels = deque()

    def iterate(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor | None:
        """Runs one iteration on a new batch.

        Returns:
            The loss of the batch that the last stage finished, if there was one; it is
            the batch of K - 1 iterations ago.
        """
        self._activations[0] = image
        self._labels.append(label)
        results = [None] * len(self.stages)
        failures = queue.SimpleQueue()

        def work(k):
            try:
                torch.set_num_threads(self._threads)
                results[k] = self._work(k)
            except BaseException as error:
                failures.put(error)

        threads = [
            threading.Thread(target=work, args=(k,)) for k in range(len(self.stages))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not failures.empty():
            raise failures.get()
        return self._hand_over(results)

    def _work(self, k):
        """One stage's part: returns (activation or loss, cotangent), None for none."""
        stage, x = self.stages[k], self._activations[k]
        if k == len(self.stages) - 1:
            if x is None:
                return None, None
            loss, dx = stage.loss_step(x, self._labels[0], self._context)
            return loss, _shrink(dx)
        dx = None
        if self._cotangents[k] is not None:
            dx = _shrink(stage.backward(self._cotangents[k]))
        return None if x is None else stage.forward(x, self._context), dx

    def _hand_over(self, results):
        """Gives each stage what its neighbours made, after all have finished."""
        for k, (y, dx) in enumerate(results):
            if k > 0:
                device = self.stages[k - 1].device
                self._cotangents[k - 1] = None if dx is None else dx.to(device)
            if k + 1 < len(results):
                device = self.stages[k + 1].device
                self._activations[k + 1] = (
                    None if y is None else y.to(device).requires_grad_()
                )
        loss = results[-1][0]
        if loss is not None:
            self._labels.popleft()
        return loss


def _shrink(dx):
    return None if dx is None else tasks.SHRINK * dx


class TorchFdg:
    """The authors' scheme, at cuts that suit PyTorch."""

    def __init__(self, task: tasks.Task):
        """Draws the network and puts the batch on the devices."""
        device, num_stages = find_device(), task.num_stages
        self._devices = [device] * num_stages
        if device.type == "cuda" and torch.cuda.device_count() >= num_stages:
            self._devices = [torch.device("cuda", k) for k in range(num_stages)]
        self._threads = max(1, len(tasks.cores()) // num_stages)
        self._blocks = torch_networks.create(task.network, tasks.NUM_CLASSES)
        self._context = autocast(task, device)
        self._image, self._label = put_batch(task, device)
        self._label = self._label.to(self._devices[-1])
        self._distinct = list(dict.fromkeys(self._devices))
        self._given_cuts = task.torch_cuts
        self._milliseconds = {}

    def warm_up(self) -> None:
        """Chooses the cuts, if they are not given, and fills the pipeline.

        It starts at the cuts that balance the blocks' measured costs, and moves to a
        neighbour, one cut moved by one position, as long as that is faster.
        """
        torch.set_num_threads(self._threads)
        cuts = self._given_cuts
        if cuts is None:
            costs = measure_costs(self._blocks, self._image, self._context)
            cuts = balanced_cuts(costs, len(self._devices))
            while (best := min(self._neighbours(cuts), key=self._try)) != cuts:
                cuts = best
        self._cuts = cuts
        self._scheme = self._make(cuts)
        self.run(2 * len(self._devices))
        self.synchronize()
        reset_peak(self._distinct)

    def run(self, num_batches: int) -> None:
        """Runs one iteration per batch."""
        for _ in range(num_batches):
            self._scheme.iterate(self._image, self._label)

    def synchronize(self) -> None:
        """Waits for the devices."""
        for device in self._devices:
            synchronize(device)

    def probe(self) -> dict:
        """Nothing to add."""
        return {}

    def peak_device_mib(self) -> float | None:
        """Returns the devices' peak memory since the warm-up."""
        return peak_mib(self._distinct)

    def report(self) -> dict:
        """Returns devices, cuts and the staleness that was counted."""
        return describe_devices(self._distinct) | {
            "cuts": list(self._cuts),
            "staleness": [stage.staleness for stage in self._scheme.stages],
            "threads_per_stage": self._threads,
            "ms_per_batch_in_warm_up": {
                str(list(cuts)): ms for cuts, ms in self._milliseconds.items()
            },
        }

    def close(self) -> None:
        """No thread outlives its iteration."""

    def _make(self, cuts):
        return AuthorsScheme(
            self._blocks,
            cuts,
            self._devices,
            threads=self._threads,
            context=self._context,
        )

    def _neighbours(self, cuts):
        """The cuts themselves, and those with one of them moved by one position."""
        yield cuts
        for i, cut in enumerate(cuts):
            for moved in (cut - 1, cut + 1):
                near = (*cuts[:i], moved, *cuts[i + 1 :])
                bounds = (0, *near, len(self._blocks))
                if all(a < b for a, b in zip(bounds, bounds[1:], strict=False)):
                    yield near

    def _try(self, cuts) -> float:
        """Milliseconds per iteration with some cuts, measured once."""
        if cuts not in self._milliseconds:
            self._scheme = self._make(cuts)
            self.run(2 * len(cuts) + 1)
            self.synchronize()
            start = time.perf_counter()
            self.run(TRIAL_ITERATIONS)
            self.synchronize()
            seconds = (time.perf_counter() - start) / TRIAL_ITERATIONS
            self._milliseconds[cuts] = 1e3 * seconds
        return self._milliseconds[cuts]


def measure_costs(
    blocks: Sequence[nn.Module], x: torch.Tensor, context: Callable
) -> list[float]:
    """Returns seconds of forward plus backward of every block, the least of three."""
    costs = []
    for block in blocks:
        block.to(x.device, memory_format=torch.channels_last)
        x = x.detach().requires_grad_()
        seconds = []
        for _ in range(4):
            synchronize(x.device)
            start = time.perf_counter()
            with context():
                y = block(x)
            torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))
            synchronize(x.device)
            seconds.append(time.perf_counter() - start)
        costs.append(min(seconds[1:]))
        x = y
    return costs


def balanced_cuts(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Returns the cuts whose costliest stage is as cheap as possible.

    As ``fdg_jax.partition.balanced_cuts``, which would load JAX into this process.
    """
    total = [0.0, *itertools.accumulate(costs)]
    best = [(seconds, ()) for seconds in total]
    for k in range(2, num_stages + 1):
        best = [
            min(
                (
                    (max(best[j][0], total[i] - total[j]), (*best[j][1], j))
                    for j in range(k - 1, i)
                ),
                default=(math.inf, ()),
            )
            for i in range(len(total))
        ]
    return best[-1][1]
