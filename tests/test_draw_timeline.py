"""The picture of a timeline, and the command that draws it."""

import dataclasses
import sys

import pytest

from fdg_jax import draw_timeline
from fdg_jax.recorder import WAITS, WORK, Slice
from fdg_jax.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A device by name only."""

    id: int
    platform: str = "cpu"


@pytest.fixture
def file(tmp_path):
    """A timeline of two stages and five batches, a batch every 100 ms."""
    timeline = Timeline()
    upper, lower = (timeline.lane(f"stage {k}", FakeDevice(k)) for k in range(2))
    for n in range(5):
        t = 0.1 * n
        upper.slices.append(Slice("forward", n, t, t + 0.04))
        lower.slices.append(Slice("activation", n, t + 0.02, t + 0.04))
        lower.slices.append(Slice("loss_step", n, t + 0.04, t + 0.10))
        lower.slices.append(Slice("update", n, t + 0.10, t + 0.12))
    timeline.write(tmp_path / "timeline.json")
    return tmp_path / "timeline.json"


def test_lanes_are_read_as_they_were_written(file):
    lanes = draw_timeline.read(file)
    assert list(lanes) == ["stage 0 (cpu:0)", "stage 1 (cpu:1)"]
    upper, lower = lanes.values()
    assert [event.batch for event in upper] == [0, 1, 2, 3, 4]
    assert [event.name for event in lower[:3]] == [
        *("wait: activation", "loss_step", "update")
    ]
    assert upper[2] == pytest.approx(("forward", 2, 200.0, 40.0))


@pytest.mark.parametrize(
    ("first_batch", "num_batches", "window"),
    [
        *[(None, 3, (140, 420)), (None, 99, (40, 520)), (3, 1, (340, 420))],
        (2, 99, (240, 520)),
    ],
)
def test_the_window_holds_whole_batches(file, first_batch, num_batches, window):
    lanes = draw_timeline.read(file)
    chosen = draw_timeline.choose_window(lanes, first_batch, num_batches)
    assert chosen == pytest.approx(window)


def test_every_kind_of_work_has_a_colour():
    assert {*WORK, "wait"} == draw_timeline.COLORS.keys()
    assert not {*WORK} & {*WAITS}


def test_the_command_draws_a_picture(file, tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    output = tmp_path / "picture.png"
    assert draw_timeline.main([str(file), f"--output={output}"]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert 5_000 < output.stat().st_size < 150_000
    svg = tmp_path / "picture.svg"
    draw_timeline.main([str(file), f"--output={svg}", "--num_batches=3"])
    drawn = svg.read_text("utf-8")
    assert "stage 1 (cpu:1)" in drawn and "loss_step" in drawn
    assert "update" in drawn and "evaluate" not in drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json"], "the timeline must be a file; there is no 'missing.json'"),
        ([__file__], "is none"),
        (["FILE", "--first_batch=7"], "holds 0 to 4; choose another --first_batch"),
        (["FILE", "--num_batches=0"], "num_batches must be at least 1; got 0"),
    ],
)
def test_mistakes_are_told_in_a_line(file, capsys, arguments, message):
    arguments = [str(file) if a == "FILE" else a for a in arguments]
    with pytest.raises(SystemExit) as exit:
        draw_timeline.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_timeline_without_lanes_holds_no_batches(tmp_path, capsys):
    Timeline().write(tmp_path / "empty.json")
    with pytest.raises(SystemExit) as exit:
        draw_timeline.main([str(tmp_path / "empty.json")])
    assert exit.value.code == 2
    assert "must hold batches from 0 on; it holds none" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lanes = draw_timeline.read(file)
    with pytest.raises(ValueError, match="needs matplotlib; pip install matplotlib"):
        draw_timeline.draw(lanes, (0.0, 1.0), "unused.png")
