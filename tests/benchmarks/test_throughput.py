"""The command, its report, and the processes behind it."""

import importlib.util
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time

import pytest

from benchmarks import children, methods, report, throughput
from benchmarks.task import Task, Unavailable, cores

ROOT = pathlib.Path(__file__).parents[2]
TASK = Task("resnet8", 2, 4, None, (1, 0), round_seconds=0.05)

has_torch = importlib.util.find_spec("torch") is not None


def run(*flags, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.throughput", *flags],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_every_method_is_measured_and_compared(tmp_path):
    file = tmp_path / "results.json"
    names = ["bp", "bp_xla", "dp", "fdg_threads", "fdg_fused", "fdg_serial"]
    if has_torch:
        names += ["torch_bp", "torch_fdg"]
    done = run(
        "--network=resnet8",
        "--num_stages=2",
        "--cuts=2",
        "--torch_cuts=3",
        "--batch_size=4",
        "--rounds=2",
        "--round_seconds=0.05",
        f"--methods={','.join(names)}",
        f"--json={file}",
        # What is compiled need not be fast here.
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_backend_optimization_level=0",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert list(results["methods"]) == names
    assert results["left_out"] == {}
    for name, method in results["methods"].items():
        assert f"| {name} " in done.stdout
        assert len(method["rounds"]) == 2
        compiles = not name.startswith("torch")
        assert (method["compile_seconds"] is not None) == compiles
        assert method["compile_seconds"] is None or (
            0 < method["compile_seconds"] < method["warm_up_seconds"]
        )
        for one in method["rounds"]:
            rate = 4 * one["num_batches"] / one["seconds"]
            assert rate > 0
            assert one["images_per_second"] == pytest.approx(rate)
    _check_ratios(results)
    _check_fdg(results["methods"])
    if has_torch:
        assert results["methods"]["torch_fdg"]["report"]["cuts"] == [3]
    assert str(file) in results["header"]["command"]


def _check_ratios(results):
    rounds = {name: row["rounds"] for name, row in results["methods"].items()}
    pairs = [(a, b) for a, b in report.RATES if a in rounds and b in rounds]
    expected = {
        f"{methods.METHODS[a].meaning} / {methods.METHODS[b].meaning}": [
            one["images_per_second"] / other["images_per_second"]
            for one, other in zip(rounds[a], rounds[b], strict=True)
        ]
        for a, b in pairs
    }
    assert len(expected) == (9 if has_torch else 6)
    for label, values in expected.items():
        ratio = results["ratios"][label]
        assert ratio["per_round"] == pytest.approx(values)
        assert ratio["median"] == pytest.approx(sum(values) / 2)
        assert ratio["min"] == min(values)
        assert ratio["max"] == max(values)
    for words, bound in report.BOUNDS.items():
        assert results["ratios"][f"FDG tick / {words}"]["per_round"] == [
            1e3 * one["seconds"] / one["num_batches"] / bound(one)
            for one in rounds["fdg_threads"]
        ]


def _check_fdg(measured):
    for name in ("fdg_threads", "fdg_fused", "fdg_serial"):
        assert measured[name]["report"]["cuts"] == [2]
        assert measured[name]["report"]["staleness"] == [1, 0]
    # Block 1's output: 4 images of 32 x 32 pixels and 16 channels, 4 bytes each. With
    # it go down two numbers of stages, and up whether all that it came of was finite.
    (channel,) = measured["fdg_threads"]["report"]["channels"]
    assert channel["down_mib"] == 0.25 + 8 / 2**20
    assert channel["up_mib"] == 0.25 + 1 / 2**20
    for one in measured["fdg_threads"]["rounds"]:
        assert len(one["stages"]) == 2
        assert all(ms > 0 for stage in one["stages"] for ms in stage.values())
        # Children have the cores that this process has; two stages share them.
        share = max(1, len(cores()) // 2) / len(cores())
        work = sum(stage["share_ms"] for stage in one["stages"])
        assert one["estimated_tick_ms"] == pytest.approx(work * share)
    for record in measured["fdg_threads"]["report"]["recorded"]:
        assert 0 < record["busy"] <= 1
        assert record["work_ms"] == pytest.approx(record["busy"] * record["tick_ms"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--network=vgg"], "Unknown network 'vgg'"),
        (["--methods=bp,sgd"], "unknown method 'sgd'"),
        (["--methods=,"], "at least one method"),
        (["--num_stages=two"], "--num_stages"),
        (["--num_stages=0"], "num_stages must be at least 1; got 0"),
        (["--rounds=0"], "rounds must be at least 1; got 0"),
        (["--round_seconds=nan"], "round_seconds must be positive"),
        (["--dtype=float16"], "float16"),
        (["--cuts=0"], "cut"),
        (["--torch_cuts=99"], "99"),
        (["--schedule=fast"], "schedule"),
        (["--json=/nowhere/results.json"], "/nowhere"),
        (["--batch=4"], "--batch"),
    ],
)
def test_a_wrong_argument_is_told_in_a_line(flags, words, capsys):
    assert throughput.main(["throughput", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_method_that_was_asked_for_must_be_able_to_run(capsys):
    flags = ["--network=resnet8", "--methods=dp", "--batch_size=3"]
    assert throughput.main(["throughput", *flags]) == 2
    assert "dp: data parallelism shares out a batch" in capsys.readouterr().err


@pytest.mark.skipif(not has_torch, reason="wants PyTorch")
@pytest.mark.parametrize("name", ["torch_bp", "torch_fdg"])
def test_a_process_of_pytorch_does_not_load_jax(name):
    code = (
        "import sys\n"
        "from benchmarks import children\n"
        "from benchmarks.task import Task\n"
        f"worker = children._Worker({name!r}, {TASK!r})\n"
        "worker.warm_up(), worker.run_round(1), worker.report(), worker.close()\n"
        "print(*sorted({'jax', 'flax', 'fdg_jax', 'torch'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "torch\n"), done.stderr


def test_a_predicted_tick_is_held_against_each_rounds():
    rounds = [{"seconds": s, "num_batches": 10} for s in (1.0, 2.0)]
    rounds = {"fdg_fused": [one | {"images_per_second": 1.0} for one in rounds]}
    reports = {"fdg_fused": {"predicted_tick_ms": 150.0}}
    found = report.ratios(rounds, reports)
    assert found["FDG fused: predicted tick / tick"]["per_round"] == [1.5, 0.75]
    assert report.ratios(rounds, {"fdg_fused": {}}) == {}


def test_a_peak_that_cannot_be_counted_anew_is_unknown(monkeypatch):
    class Idle:
        def warm_up(self):
            return None

        def run(self, num_batches):
            time.sleep(0.01 * num_batches)

        def synchronize(self):
            pass

        def probe(self):
            return {}

        def peak_device_mib(self):
            return 7.0

        def report(self):
            return {}

    monkeypatch.setattr(children.methods, "create", lambda name, task: Idle())
    monkeypatch.setattr(children, "peak_mib", lambda: 5.0)
    for can_reset, peak in ((True, 5.0), (False, None)):
        monkeypatch.setattr(children, "reset_peak", lambda can=can_reset: can)
        worker = children._Worker("bp", TASK)
        worker.warm_up()
        worker.run_round(1)
        memory = worker.report()
        assert (memory["peak_mib"], memory["peak_device_mib"]) == (peak, 7.0)


def test_help_names_every_flag_and_method():
    done = run("--help")
    assert done.returncode == 0
    for word in ("--cuts", "--schedule", "--json", *methods.METHODS, *methods.GROUPS):
        assert word in done.stdout


def test_groups_stand_for_their_methods_and_no_method_comes_twice():
    assert methods.parse("fdg, bp,fdg_threads") == ["fdg_threads", "fdg_fused", "bp"]


def test_a_child_tells_why_it_cannot_work():
    odd = Task("resnet8", 2, 3, None, (1, 0))
    child = children.Child("dp", odd)
    with pytest.raises(Unavailable, match="batch_size=3"):
        child.warm_up()
    child.close()
    child = children.Child("bp", Task("vgg", 1, 3, None, (0,)))
    with pytest.raises(ValueError, match="vgg"):
        child.warm_up()
    child.close()


def test_a_child_that_dies_is_noticed():
    child = children.Child("bp", TASK)
    (process,) = [p for p in multiprocessing.active_children() if p.name == "bp"]
    process.kill()
    with pytest.raises(children.ChildFailed, match="exit code -9"):
        child.warm_up()
    child.close()
    assert not process.is_alive()
