import errno
import os
import pathlib
import subprocess
import sys

import pytest

import fdg_jax
from configs import digits
from fdg_jax import checkpoint, from_config, lock, resume

ROOT = pathlib.Path(fdg_jax.__file__).parents[1]

NO_LOCKS = [
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EINVAL,
]


@pytest.fixture
def flock_fails(monkeypatch):
    """Has flock fail with a number; without one, as on Windows, there is none."""

    def fail(number):
        def flock(file, operation):
            raise OSError(number, os.strerror(number))

        if number is None:
            monkeypatch.setattr(lock, "fcntl", None)
        else:
            monkeypatch.setattr(lock.fcntl, "flock", flock)

    return fail


@pytest.mark.parametrize("number", [*NO_LOCKS, None])
def test_without_locks_it_goes_on_with_a_warning(tmp_path, flock_fails, number):
    flock_fails(number)
    warnings = []
    with resume.alone(tmp_path, warnings.append):
        pass
    (warning,) = warnings
    assert warning.startswith(f"{tmp_path / '.lock'} cannot be locked (")
    assert "nothing keeps a second process from this folder" in warning


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, flock_fails):
    flock_fails(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), resume.alone(tmp_path):
        pass


LOAD = """
import sys

# Third parties may have reasons of their own.
import flax.nnx, jax, optax, orbax.checkpoint, safetensors.flax, tensorboardX

sys.modules["fcntl"] = None
import fdg_jax

network, config = fdg_jax.load(sys.argv[1])
assert fdg_jax.trained.resume.lock.fcntl is None
print(config.network)
"""


def test_without_fcntl_a_network_is_loaded(tmp_path):
    config = digits.get_config()
    resume.write_json(tmp_path / resume.CONFIG_FILE, config.to_dict())
    resume.write_json(tmp_path / resume.SUMMARY_FILE, {})
    network = from_config.create_network(config)
    checkpoint.save_network(network, tmp_path / resume.CHECKPOINTS, 1)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stdout) == (0, "resnet8\n"), done.stderr
