import re
import sys

import jax
import numpy as np
import pytest

import fdg_jax as fdg
from benchmarks import jax_bp, memory
from fdg_jax.engines import serial
from fdg_jax.stage import BACKWARD_MODES


@pytest.mark.parametrize("backward", BACKWARD_MODES)
def test_the_stash_is_as_large_as_what_stages_really_keep(monkeypatch, backward):
    engines = []
    start = serial.SerialEngine.__init__

    def spy(self, *args, **kwargs):
        start(self, *args, **kwargs)
        engines.append(self)

    monkeypatch.setattr(serial.SerialEngine, "__init__", spy)
    network = fdg.models.create("resnet8", seed=0)
    pipeline = fdg.Pipeline(
        network,
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=jax_bp.create_optimizer(),
        num_stages=3,
        cuts=(2, 3),
        schedule="paper",
        backward=backward,
        engine="serial",
    )
    image = np.ones((4, 8, 8, 3), np.float32)
    batch = {"image": image, "label": np.zeros(4, np.int32)}
    with pipeline:
        for _ in pipeline.train([batch] * 8):
            pass
        held = [_held(program) for program in engines[0]._wiring.programs]
        counted = memory.stash_bytes(pipeline.stages, network, image)
    assert counted[-1] == held[-1] == 0
    for stage, size, nbytes in zip(pipeline.stages[:-1], counted, held, strict=False):
        blocks = [network[i] for i in stage.blocks]
        versions = 4 * sum(map(fdg.models.count_parameters, blocks))
        versions *= 0 if backward == "replay" else stage.staleness
        # A stage at rest has s_k entries; after its next forward it has one more.
        entry = (size - versions) / (stage.staleness + 1)
        assert nbytes == size - entry > 0


def _held(program):
    """Bytes of the arrays that a stage keeps in its stash alone."""
    arrays = {id(a): a for a in jax.tree.leaves([e for _, e in program._stash])}
    for a in jax.tree.leaves(program.state):
        arrays.pop(id(a), None)
    return sum(a.nbytes for a in arrays.values())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="wants Linux's /proc")
def test_every_mode_is_measured_in_a_process_of_its_own(capfd):
    flags = ["--network=resnet8", "--num_stages=2", "--cuts=3", "--batch_size=4"]
    assert memory.main(["memory", *flags, "--backward=stored,replay"]) == 0
    header, stored, replay, ratio = capfd.readouterr().out.splitlines()
    assert re.split(r"  +", header)[:3] == ["backward", "stash MiB", "built MiB"]
    stored, replay, ratio = (
        re.split(r"  +", line.strip()) for line in (stored, replay, ratio)
    )
    assert [row[0] for row in (stored, replay, ratio)] == [
        "stored",
        "replay",
        "replay / stored",
    ]
    assert float(replay[1]) < float(stored[1])


def test_a_wrong_argument_is_told_in_one_line(capfd):
    assert memory.main(["memory", "--network=resnet8", "--num_stages=99"]) == 2
    err = capfd.readouterr().err
    assert "num_stages=99" in err and err.count("\n") == 1
