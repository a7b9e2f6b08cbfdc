"""The methods that can be measured, by name."""

import functools
import importlib
import importlib.util
import pathlib
import runpy
from dataclasses import dataclass, field

from benchmarks.task import Method, Task, Unavailable


@dataclass(frozen=True)
class Entry:
    """Where a method's class is, and what its process needs.

    Attributes:
        meaning: what it is, in a few words.
        module: inside ``benchmarks``; loaded in the method's process alone.
        class_name: called with the task and ``options``.
        cpu_devices: CPU devices to ask of JAX, "one" or "K"; None for PyTorch.
        options: further arguments of the class.
        keeps_memory: whether its process keeps the memory that it frees, as train.py's
            does; it helps PyTorch just as well.
    """

    meaning: str
    module: str
    class_name: str
    cpu_devices: str | None
    options: dict = field(default_factory=dict)
    keeps_memory: bool = True


_fdg = functools.partial(Entry, module="jax_fdg", class_name="Fdg")

METHODS = {
    "bp": Entry("JAX BP, one device", "jax_bp", "BackPropagation", "one"),
    "bp_xla": Entry(
        "JAX BP, everything as it comes",
        *("jax_bp", "PlainBackPropagation", "one"),
        keeps_memory=False,
    ),
    "dp": Entry("JAX data parallel", "jax_dp", "DataParallel", "K"),
    "fdg_threads": _fdg("FDG threads", cpu_devices="K", options={"engine": "threads"}),
    "fdg_fused": _fdg("FDG fused", cpu_devices="one", options={"engine": "fused"}),
    "fdg_serial": _fdg("FDG serial", cpu_devices="K", options={"engine": "serial"}),
    "torch_bp": Entry("PyTorch BP", "torch_bp", "TorchBackPropagation", None),
    "torch_fdg": Entry("authors' scheme in PyTorch", "torch_fdg", "TorchFdg", None),
}
GROUPS = {"fdg": ("fdg_threads", "fdg_fused")}
DEFAULT = "bp,bp_xla,dp,fdg,torch_bp,torch_fdg"


def parse(text: str) -> list[str]:
    """Returns the method names that ``"bp,fdg,..."`` means, each once, in order.

    Raises:
        ValueError: a name is unknown.
    """
    names = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        if word not in METHODS and word not in GROUPS:
            raise ValueError(
                f"unknown method {word!r}; the methods are "
                f"{', '.join([*METHODS, *GROUPS])}"
            )
        names += GROUPS.get(word, (word,))
    if not names:
        raise ValueError(f"name at least one method, of {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def create(name: str, task: Task) -> Method:
    """Makes a method, in the process that is to run it; starts JAX or PyTorch.

    Raises:
        Unavailable: it cannot run on this machine.
        ValueError: it cannot do this task.
    """
    entry = METHODS[name]
    if entry.keeps_memory:
        _keep_freed_memory()
    if entry.cpu_devices is None:
        if importlib.util.find_spec("torch") is None:
            raise Unavailable(
                "PyTorch is not installed; pip install -r requirements-bench.txt"
            )
    else:
        import jax

        count = task.num_stages if entry.cpu_devices == "K" else 1
        jax.config.update("jax_num_cpu_devices", count)
        # What another run has compiled must not shorten this one's warm-up.
        jax.config.update("jax_enable_compilation_cache", False)
    module = importlib.import_module(f"benchmarks.{entry.module}")
    return getattr(module, entry.class_name)(task, **entry.options)


def _keep_freed_memory() -> None:
    """Calls ``fdg_jax.host_memory`` from its file, for the package would load JAX."""
    package = importlib.util.find_spec("fdg_jax")
    file = pathlib.Path(package.origin).with_name("host_memory.py")
    runpy.run_path(str(file))["keep_freed_memory"]()
