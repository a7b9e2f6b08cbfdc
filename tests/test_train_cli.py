import contextlib
import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import train
from configs import default
from fdg_jax import checkpoint, lock, resume, trained, training

ROOT = pathlib.Path(train.__file__).parent


@pytest.mark.slow
def test_the_command_of_the_readme_learns_the_digits(tmp_path):
    workdir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "train.py", f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        timeout=280,
    )
    assert done.returncode == 0
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["final_test_accuracy"] >= 0.97
    assert (summary["num_stages"], summary["engine"]) == (2, "threads")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _parse(*arguments):
    return train.parse(["train.py", *arguments])


# --- what a command line means ----------------------------------------------------


def test_without_flags_it_trains_the_digits():
    config, workdir = _parse()
    assert (config.dataset, config.num_stages) == ("digits", 2)
    assert workdir.parent == pathlib.Path("runs")
    assert re.fullmatch(r"digits-\d{8}-\d{6}-[0-9a-f]{8}", workdir.name)


def test_runs_that_start_at_the_same_moment_have_workdirs_of_their_own(monkeypatch):
    monkeypatch.setattr(train.time, "strftime", lambda form: "20261127-220000")
    assert len({_parse()[1] for _ in range(50)}) == 50


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config.num_stages=3"], {"num_stages": 3}),
        (["--config.num_stages", "3"], {"num_stages": 3}),
        (["--config.weight_decay=1"], {"weight_decay": 1.0}),
        (["--config.cuts=4,7"], {"cuts": "4,7"}),
        (["--config.schedule=3,1,0"], {"schedule": "3,1,0"}),
        (["--config.data_dir=/data"], {"data_dir": "/data"}),
        (["--noconfig.progress"], {"progress": False}),
        (["--config.progress=false"], {"progress": False}),
        (
            ["--config.learning_rate_milestones=2,3"],
            {"learning_rate_milestones": (2, 3)},
        ),
        (["--config.learning_rate_milestones=()"], {"learning_rate_milestones": ()}),
        (["--config.seed=1", "--config.seed=2"], {"seed": 2}),
    ],
)
def test_keys_are_overridden(flags, expected):
    config, _ = _parse(*flags)
    assert {key: config[key] for key in expected} == expected
    changed = {key for key in config if config[key] != _parse()[0][key]}
    assert changed == expected.keys()


def test_a_config_and_a_workdir_may_be_in_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.py").write_text((train.CONFIGS / "digits.py").read_text())
    config, workdir = _parse("--config=~/mine.py", "--workdir=~/w")
    assert (config.dataset, workdir) == ("digits", tmp_path / "w")


def test_config_and_workdir_are_named():
    path = train.CONFIGS / "wrn28_10.py"
    config, workdir = _parse(f"--config={path}", "--workdir=a/b", "--config.seed=5")
    assert (config.network, config.seed) == ("wrn28_10", 5)
    assert workdir == pathlib.Path("a/b")


def test_a_config_file_may_hold_only_what_it_changes(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({'seed': 5, 'shrink': 1})\n"
    )
    config, workdir = _parse(f"--config={path}")
    expected = default.get_config()
    expected.update({"seed": 5, "shrink": 1.0})
    assert config.to_dict() == expected.to_dict()
    assert workdir.name.startswith("mine-")


def test_cpu_devices_are_asked_for_only_where_the_user_has_not(monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    train.request_cpu_devices(3)  # tests/conftest.py has asked for four
    assert asked == {}
    monkeypatch.setattr(type(jax.config), "jax_num_cpu_devices", -1)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    train.request_cpu_devices(3)
    assert asked == {}
    monkeypatch.delenv("XLA_FLAGS")
    train.request_cpu_devices(3)
    assert asked == {"jax_num_cpu_devices": 3}


def test_help_lists_every_key(capsys):
    assert train.main(["train.py", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--workdir" in out
    assert all(f"{key}:" in out for key in default.get_config())


# --- exit status 2: one line, nothing left behind ---------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.learning_rat=1"], "'learning_rat'; did you mean 'learning_rate'?"),
        (["--config.optimizer.x=1"], "unknown config key 'optimizer.x'"),
        (["--config.batch_size=many"], "--config.batch_size=many: invalid literal"),
        (["--config.batch_size=1.5"], "--config.batch_size=1.5: invalid literal"),
        (["--config.progress=maybe"], "'maybe'"),
        (["--config.batch_size"], "Missing value for flag --config.batch_size"),
        (["--config=digits.py"], "there is no 'digits.py'; did you mean 'digits'?"),
        (["--config="], "the config must be a file"),
        (["--wrkdir=x"], "got '--wrkdir=x'; did you mean '--workdir'?"),
        (["digits"], "the flags are --config, --workdir, --config.KEY, --help; got "),
        (["--config.network=resnet21"], "resnet21"),
        (["--config.dataset=digit"], "did you mean 'digits'"),
        (["--config.num_stages=99"], "num_stages=99"),
        (["--config.batch_size=0"], "batch_size must be at least 1; got 0"),
        (["--workdir=gs://bucket/w"], "got 'gs://bucket/w', which is an address"),
        (["--workdir=s3:"], "got 's3:', which is an address"),
        (["--workdir=file:///w", "--config.mode=export"], "which is an address"),
        (["--workdir=~no-such-user/w"], "there is no such home"),
        (["--workdir=" + "w" * 256], "workdir must be a folder that can be written"),
        (["--config=gs://bucket/a.py"], "got 'gs://bucket/a.py', which is an address"),
        (["--config.init_from=gs://bucket/w"], "'gs://bucket/w', which is an address"),
        (["--config.compilation_cache=gs://bucket"], "which is an address"),
        (
            ["--config.dataset=cifar10", "--config.data_dir=gs://bucket"],
            "got 'gs://bucket', which is an address",
        ),
        (
            ["--config.dataset=cifar10", "--config.data_dir=a[1]"],
            "TFDS reads no folder whose path has *, ? or [ in it",
        ),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(folder, capsys, flags, message):
    flags = [flag.format(configs=train.CONFIGS) for flag in flags]
    assert train.main(["train.py", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("train.py: ") and err.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_a_workdir_whose_files_cannot_be_renamed_is_refused(
    folder, capsys, monkeypatch
):
    def rename(path, target):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(pathlib.Path, "rename", rename)
    assert train.main(["train.py", "--workdir=runs/w"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "in runs/w that failed with OSError: [Errno 38]" in err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("config.batch_sise = 3", "'batch_sise'; did you mean 'batch_size'?"),
        ("config.batch_size = 'x'", "field 'batch_size'"),
        ("config = {'batch_size': 1.5}", "field 'batch_size'"),
        ("raise ValueError('no such thing')", "no such thing"),
    ],
)
def test_a_wrong_config_file_is_told_in_one_line(folder, capsys, lines, message):
    path = folder / "mine.py"
    path.write_text(
        "import ml_collections\nfrom configs import default\n"
        "def get_config():\n    config = default.get_config()\n"
        f"    {lines}\n    return ml_collections.ConfigDict(config)\n"
    )
    assert train.main(["train.py", f"--config={path}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "mine.py" in err or "config key" in err
    assert message in err and err.count("\n") == 1


def test_a_workdir_with_another_run_is_refused(folder, capsys):
    (folder / "config.json").write_text('{"network": "resnet20"}')
    assert train.main(["train.py", "--workdir=."]) == 2
    err = capsys.readouterr().err
    assert "network: 'resnet20' was asked then, 'resnet8' now" in err
    assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["config.json"]


# --- the other exit statuses ------------------------------------------------------


def test_a_loss_that_is_not_finite_is_status_1(folder, capsys):
    status = train.main(["train.py", "--workdir=w", "--config.learning_rate=1e30"])
    err = capsys.readouterr().err
    assert status == 1
    assert re.search(r"batch \d+ .*stage \d", err) and err.count("\n") == 1


def test_a_mistake_in_the_midst_of_training_shows_its_traceback(folder, monkeypatch):
    def run(experiment, stopping):
        raise ValueError("a bug")

    monkeypatch.setattr(training, "run", run)
    with pytest.raises(ValueError, match="a bug"):
        train.main(["train.py"])


def _start(folder, *flags, **variables):
    # A process of its own has JAX's defaults, not the strict ones of these tests; but
    # it must not write into the cache of whoever runs them.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags],
        cwd=folder,
        env=environment
        | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "caches")}
        | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_from_a_shell_and_a_second_one_that_need_not_compile(tmp_path):
    flags = ["--config.num_epochs=1", "--config.learning_rate_milestones=()"]
    flags += ["--config.num_stages=3", "--config.cuts=2,3"]
    process = _start(tmp_path, *flags)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert re.findall(r"cpu:\d", out) == ["cpu:0", "cpu:1", "cpu:2"]
    (workdir,) = (tmp_path / "runs").iterdir()
    assert out.rstrip().endswith(f"files are in runs/{workdir.name}")
    assert (workdir / "summary.json").is_file()
    compiled = _contents(tmp_path / "caches" / "fdg_jax")
    assert len(compiled) > 10

    process = _start(tmp_path, *flags, "--workdir=again")
    _, err = process.communicate()
    # On some CPUs jaxlib complains of its tuning when it reads a program; see
    # fdg_jax.compilation_cache.
    said = [
        s for s in err.splitlines() if not re.search("prefer-no-(gather|scatter)", s)
    ]
    assert (process.returncode, said) == (0, [])
    assert _contents(tmp_path / "caches" / "fdg_jax") == compiled
    # A program that was read does what the one that was written does, to the bit.
    assert _losses(tmp_path / "again") == _losses(workdir)


@pytest.mark.slow
def test_a_run_that_balances_says_so_once(tmp_path):
    flags = ["--config.num_epochs=1", "--config.learning_rate_milestones=()"]
    process = _start(tmp_path, *flags, "--config.cuts=balanced")
    out, err = process.communicate()
    assert process.returncode == 0
    assert re.fullmatch(".*cuts='balanced': compiling and timing 5 pieces.*\n", err)
    assert re.search(r"\npredicted tick [\d.]+ ms; balancing took [\d.]+ s\n", out)


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = [row.get("train_loss", row.get("test_loss")) for row in rows]
    assert len(losses) > 3 and None not in losses
    return losses


def test_a_wrong_flag_from_a_shell(tmp_path):
    process = _start(tmp_path, "--config.shrik=1")
    out, err = process.communicate()
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "did you mean 'shrink'?" in err
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    flags = ["train.py", f"--config.compilation_cache={tmp_path}/file/a"]
    assert train.main(flags) == 2
    err = capsys.readouterr().err
    assert "compilation_cache must be" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_signal_takes_a_snapshot_and_the_run_goes_on_later(tmp_path, number):
    flags = ["--workdir=w", "--config.num_epochs=10000"]
    process = _start(tmp_path, *flags)
    metrics = tmp_path / "w" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    name = signal.Signals(number).name
    told = (
        f"train.py: stopped by {name}; with --workdir=w it goes on from batch (\\d+)\n"
    )
    (step,) = re.fullmatch(told, err).groups()
    (snapshot,) = (tmp_path / "w" / "snapshots").iterdir()
    assert snapshot.name == step


@pytest.mark.timeout(240)
def test_one_process_at_a_time_trains_in_a_workdir(folder, capsys):
    flags = ["--workdir=w", "--config.num_epochs=10000"]
    flags += ["--config.snapshot_every_steps=5"]
    process = _start(folder, *flags)
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("w/snapshots/*/manifest.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        for more in ([], ["--config.restart=true"]):
            assert train.main(["train.py", *flags, *more]) == 2
            err = capsys.readouterr().err
            assert "another process is training in w;" in err and err.count("\n") == 1
        assert train.main(["train.py", *flags, "--config.mode=evaluate"]) == 0
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    with resume.alone(folder / "w"):  # what it held has died with it
        pass


def test_a_workdir_that_was_free_when_the_run_was_prepared(folder, capsys, monkeypatch):
    prepare = training.prepare

    def overtaken(config, workdir):
        experiment = prepare(config, workdir)
        workdir.mkdir()
        held.enter_context(resume.alone(workdir))
        return experiment

    monkeypatch.setattr(training, "prepare", overtaken)
    with contextlib.ExitStack() as held:
        assert train.main(["train.py", "--workdir=w"]) == 2
    assert "another process is training in w;" in capsys.readouterr().err
    assert [path.name for path in (folder / "w").iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["w", "~/a[1]\\\udcff"])
def test_what_a_workdir_holds_is_evaluated_and_exported(
    folder, capsys, monkeypatch, name
):
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))
    flags = ["train.py", f"--workdir={name}", "--config.num_epochs=1"]
    flags += ["--config.learning_rate_milestones=()"]
    told = name.replace("~", str(folder / "home"))
    told = told.encode(errors="backslashreplace").decode()

    def run(*more):
        # As the program has it (``streams.outlive_terminal``).
        sys.stdout.reconfigure(errors="backslashreplace")
        assert train.main([*flags, *more]) == 0
        return capsys.readouterr().out

    final = re.search(r"final test accuracy ([\d.]+%)", run())[1]
    assert run("--config.mode=evaluate").rstrip().endswith(f"test accuracy {final}")
    paths = run("--config.mode=export").splitlines()
    assert [path.removeprefix(f"{told}/export/newest/") for path in paths] == [
        "network.safetensors",
        "orbax",
    ]
    exported = pathlib.Path(name).expanduser() / "export" / "newest"
    assert {path.name for path in exported.iterdir()} == {
        "network.safetensors",
        "orbax",
    }
    assert run() == f"{told} holds this run; its test accuracy is {final}\n"
    begun = trained.load(name)[0]
    more = "--config.init_from=" + name
    config, _ = train.parse(["train.py", more])
    network = training.prepare(config, folder / "next").pipeline.network
    expected = checkpoint.network_arrays(begun)
    for path, array in checkpoint.network_arrays(network).items():
        np.testing.assert_array_equal(array, expected[path])


def test_where_files_cannot_be_locked_it_trains_with_a_warning(
    folder, capsys, monkeypatch
):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    flags = ["train.py", "--workdir=w", "--config.num_epochs=1"]
    flags += ["--config.learning_rate_milestones=()"]
    assert train.main(flags) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("w/.lock cannot be locked (Function not implemented), so ")
    assert out.count("cannot be locked") == 1


@pytest.mark.parametrize("mode", ["train", "evaluate", "export"])
def test_platforms_that_jax_cannot_start_are_told_in_one_line(tmp_path, mode):
    process = _start(
        tmp_path, "--workdir=w", f"--config.mode={mode}", JAX_PLATFORMS="nonsense"
    )
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "JAX_PLATFORMS must name platforms" in err and "'nonsense'" in err
    assert not (tmp_path / "w").exists()


def test_a_platform_that_jax_refuses_without_a_word(folder, capsys, monkeypatch):
    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    assert train.main(["train.py"]) == 2
    err = capsys.readouterr().err
    assert "which it cannot start; set it to cpu" in err and err.count("\n") == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", ["evaluate", "export"])
def test_a_workdir_that_holds_nothing_is_refused(folder, capsys, mode):
    assert train.main(["train.py", "--workdir=w", f"--config.mode={mode}"]) == 2
    err = capsys.readouterr().err
    assert "w has no config.json" in err and err.count("\n") == 1
    assert list(folder.iterdir()) == []
