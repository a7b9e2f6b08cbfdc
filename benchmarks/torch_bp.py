"""Back-propagation in PyTorch: channels_last, at the best of several settings.

On CPU the settings are numbers of threads; on CUDA, eager, ``torch.compile`` and
``torch.compile`` with CUDA graphs. The warm-up measures them all and keeps the best.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import task as tasks
from benchmarks import torch_networks

TRIAL_BATCHES = 5


@dataclass(frozen=True)
class Setting:
    """A way to run the same network.

    Attributes:
        name: for the report.
        threads: intra-op threads.
        compile_mode: of ``torch.compile``; None for eager.
    """

    name: str
    threads: int
    compile_mode: str | None = None


def settings(device: torch.device) -> list[Setting]:
    """Returns what is worth trying on a device."""
    most = len(tasks.cores())
    if device.type == "cuda":
        return [
            Setting("eager", most),
            Setting("torch.compile", most, "default"),
            Setting("torch.compile, CUDA graphs", most, "reduce-overhead"),
        ]
    counts = sorted({2**i for i in range(most.bit_length())} | {most})
    return [Setting(f"{n} thread{'s' * (n > 1)}", n) for n in counts if n <= most]


class TorchBackPropagation:
    """PyTorch's own loop: forward, loss, backward, ``optimizer.step``.

    Attributes:
        model: the whole network.
    """

    def __init__(self, task: tasks.Task):
        """Draws the network and puts the batch on the device."""
        self._device = find_device()
        blocks = torch_networks.create(task.network, tasks.NUM_CLASSES)
        self.model = nn.Sequential(*blocks).to(
            self._device, memory_format=torch.channels_last
        )
        self._autocast = autocast(task, self._device)
        self._optimizer = torch.optim.SGD(
            self.model.parameters(),
            tasks.LEARNING_RATE,
            momentum=tasks.MOMENTUM,
            weight_decay=tasks.WEIGHT_DECAY,
            fused=True,
        )
        self._image, self._label = put_batch(task, self._device)
        self._call = self.model
        self._milliseconds, self._chosen = {}, None

    def warm_up(self) -> None:
        """Tries every setting, and keeps the fastest."""
        best = float("inf")
        for setting in settings(self._device):
            call = self._apply(setting)
            try:
                seconds = self._try(call)
            except Exception as error:
                # Compiling needs tools that not every machine has; eager does not.
                if setting.compile_mode is None:
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self._milliseconds[setting.name] = f"failed: {reason}"
                continue
            self._milliseconds[setting.name] = 1e3 * seconds
            if seconds < best:
                best, self._call, self._chosen = seconds, call, setting
        self._apply(self._chosen)
        reset_peak([self._device])

    def run(self, num_batches: int) -> None:
        """Trains with the chosen setting."""
        for _ in range(num_batches):
            self._step(self._call)

    def synchronize(self) -> None:
        """Waits for the device."""
        synchronize(self._device)

    def probe(self) -> dict:
        """Nothing to add."""
        return {}

    def peak_device_mib(self) -> float | None:
        """Returns the device's peak memory since the warm-up."""
        return peak_mib([self._device])

    def report(self) -> dict:
        """Returns the device and what the settings gave."""
        return describe_devices([self._device]) | {
            "chosen": self._chosen.name,
            "ms_per_batch_in_warm_up": self._milliseconds,
        }

    def close(self) -> None:
        """Nothing is left running."""

    def _apply(self, setting: Setting) -> Callable:
        torch.set_num_threads(setting.threads)
        if setting.compile_mode is None:
            return self.model
        return torch.compile(self.model, mode=setting.compile_mode)

    def _try(self, call: Callable) -> float:
        for _ in range(2):
            self._step(call)
        self.synchronize()
        start = time.perf_counter()
        for _ in range(TRIAL_BATCHES):
            self._step(call)
        self.synchronize()
        return (time.perf_counter() - start) / TRIAL_BATCHES

    def _step(self, call: Callable) -> torch.Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = F.cross_entropy(call(self._image), self._label)
        loss.backward()
        self._optimizer.step()
        return loss


def find_device() -> torch.device:
    """Returns the GPU where there is one, else the CPU.

    JAX is told by ``JAX_PLATFORMS=cpu`` to leave a GPU alone, and so is PyTorch.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu" and torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        return torch.device("cuda", 0)
    return torch.device("cpu")


def autocast(
    task: tasks.Task, device: torch.device
) -> Callable[[], contextlib.AbstractContextManager]:
    """Returns what makes the context in which forward and loss run."""
    if task.dtype == "bfloat16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext


def put_batch(
    task: tasks.Task, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the task's images, [batch, 3, 32, 32] channels_last, and labels."""
    batch = tasks.random_batch(task.batch_size)
    image = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(device)
    label = torch.from_numpy(batch["label"]).long().to(device)
    return image.contiguous(memory_format=torch.channels_last), label


def synchronize(device: torch.device) -> None:
    """Waits for a device; the CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(devices: list[torch.device]) -> None:
    """Starts ``peak_mib`` anew from what is held now."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def peak_mib(devices: list[torch.device]) -> float | None:
    """Returns the devices' peak memory in MiB; the CPU keeps no account of it."""
    if devices[0].type == "cpu":
        return None
    return sum(map(torch.cuda.max_memory_allocated, devices)) / 2**20


def describe_devices(devices: list[torch.device]) -> dict:
    """Returns what a report says of the devices."""
    if devices[0].type == "cpu":
        return {"device": "PyTorch, cpu"}
    name = torch.cuda.get_device_name(devices[0])
    return {"device": f"PyTorch, {len(devices)} x cuda ({name})"}
