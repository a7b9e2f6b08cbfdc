"""What a run has left in its workdir, and whether two runs have left the same."""

import json
import struct

import numpy as np
from tensorboardX.proto import event_pb2

import fdg_jax as fdg
from fdg_jax import checkpoint


def lines(workdir):
    """Returns what metrics.jsonl holds but the speed."""
    found = [json.loads(line) for line in open(workdir / "metrics.jsonl")]
    return [{k: v for k, v in x.items() if k != "images_per_second"} for x in found]


def board(workdir):
    """Returns TensorBoard's scalars but the speed, as written, file after file."""
    scalars = []
    files = workdir.glob("events.out.tfevents.*")
    for file in sorted(files, key=lambda path: int(path.name.split(".")[3])):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert len(data) >= length + 16, f"{file} ends within a record"
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[length + 16 :]
            scalars += [
                (event.step, value.tag, value.simple_value)
                for value in event.summary.value
                if value.tag != "images_per_second"
            ]
    return scalars


def networks(workdir):
    """Returns by step the arrays of every network that was saved."""
    config = json.loads((workdir / "config.json").read_text())
    network = fdg.models.create(config["network"], num_classes=10, in_channels=1)
    return {
        step: checkpoint.network_arrays(
            checkpoint.restore_network(network, workdir / "checkpoints", step)
        )
        for step in checkpoint.steps(workdir / "checkpoints")
    }


def summary(workdir):
    """Returns what does not depend on time and place."""
    whole = json.loads((workdir / "summary.json").read_text())
    return {key: value for key, value in whole.items() if key != "seconds"}


def assert_same(workdir, whole):
    """Holds two finished runs against each other, to the last bit."""
    assert lines(workdir) == lines(whole)
    assert board(workdir) == board(whole)
    assert summary(workdir) == summary(whole)
    got, expected = networks(workdir), networks(whole)
    assert got.keys() == expected.keys()
    for step, arrays in expected.items():
        assert got[step].keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(got[step][name], array)
