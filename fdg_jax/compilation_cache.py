"""JAX's persistent compilation cache: what one run compiled, the next one reads.

JAX keeps compiled programs by what went into them: the program, the versions of JAX and
XLA, the flags, and the kind of device, of a CPU down to its instruction set. A folder
can therefore serve any number of experiments, and machines that share a home; it may be
deleted at any time. It holds machine code, so nobody else must be able to write to it.

On some Intel CPUs jaxlib up to 0.10 logs an error about ``prefer-no-gather`` for every
program that it reads. It is about tuning, not about instructions, and the program runs
(https://github.com/openxla/xla/issues/44565).
"""

import os
import pathlib
import sys
import warnings

import jax

from fdg_jax import folders


def enable(where: str) -> pathlib.Path | None:
    """Switches the cache on, or off, for the whole process; before JAX first compiles.

    Where the user has set JAX's own ``JAX_COMPILATION_CACHE_DIR``, "auto" leaves
    everything as it is set there. A user's cache folder that cannot be written is no
    reason not to train, so "auto" then warns and does without; a folder that is asked
    for by name is.

    Args:
        where: "auto", which is ``fdg_jax`` in the user's cache folder; "off"; or a
            folder, made when missing.

    Returns:
        The folder in use; None where there is none.

    Raises:
        ValueError: the folder cannot be written.
    """
    if where == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if where == "auto" and jax.config.jax_compilation_cache_dir is not None:
        return pathlib.Path(jax.config.jax_compilation_cache_dir)
    folder = user_folder() if where == "auto" else folders.local(where).absolute()
    # Where nobody has a home, "~" stays.
    writable = folder.is_absolute() and folders.can_be_written(folder)
    writable = writable and folders.is_text(folder)  # for XLA
    if not where or not writable:
        message = (
            f"compilation_cache must be 'auto', 'off' or a folder that can be written "
            f"and has a name in UTF-8; got {where!r}, which is {folder}"
        )
        if where != "auto":
            raise ValueError(message)
        warnings.warn(f"{message}; going on without a cache", stacklevel=2)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A stage has many small programs, and JAX by itself keeps only those that take a
    # second; an environment variable of the user's goes first.
    for name, value in (
        ("jax_persistent_cache_min_compile_time_secs", 0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder


def user_folder() -> pathlib.Path:
    """Returns ``fdg_jax`` in the folder where this platform's users keep caches.

    That is ``$XDG_CACHE_HOME`` or, where it is not set to an absolute path,
    ``~/.cache``; ``~/Library/Caches`` on macOS; ``%LOCALAPPDATA%`` on Windows.
    """
    home = pathlib.Path(os.path.expanduser("~"))
    caches = {
        "darwin": home / "Library" / "Caches",
        "win32": pathlib.Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local"),
    }.get(sys.platform, home / ".cache")
    # The XDG specification asks to ignore a path that is not absolute.
    xdg = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else caches) / "fdg_jax"
