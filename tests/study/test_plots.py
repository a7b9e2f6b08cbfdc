import numpy as np
import pytest

import study_folders as folders
from fdg_jax import study
from fdg_jax.study import outputs, plots, results

pytest.importorskip("matplotlib", reason="plots need matplotlib")


@pytest.fixture
def runs(tmp_path):
    cells = folders.cells(
        {"method": "bp", "num_stages": 1, "cuts": ""},
        {"num_stages": [2, 3], "shrink": [1.0, 0.5]},
        seeds=(0, 1, 2),
    )
    accuracies = np.random.default_rng(0).uniform(size=(len(cells), 4))
    for cell, drawn in zip(cells, accuracies.tolist(), strict=True):
        folders.write_run(tmp_path, cell, drawn)
    return results.read_all(cells, tmp_path)


def _lines(panel):
    return {line.get_label(): line for line in panel.lines}


def test_curves_are_means_over_the_seeds_with_bp_beside(runs):
    panels = plots.curves(runs).axes
    assert [p.get_title() for p in panels] == [
        "resnet8 on digits, K = 2",
        "resnet8 on digits, K = 3",
    ]
    for panel, num_stages in zip(panels, (2, 3), strict=True):
        lines = _lines(panel)
        assert lines.keys() == {"bp", "fdg, beta 1", "fdg, beta 0.5"}
        errors = [
            [row["test_error_percent"] for row in run.epochs]
            for run in runs
            if (run.cell.config.num_stages, run.cell.config.shrink) == (num_stages, 0.5)
        ]
        drawn = lines["fdg, beta 0.5"]
        np.testing.assert_array_equal(drawn.get_xdata(), [1, 2, 3, 4])
        np.testing.assert_allclose(drawn.get_ydata(), np.mean(errors, axis=0))
        band = panel.collections[-1].get_paths()[0].vertices[:, 1]
        highest = (np.mean(errors, 0) + np.std(errors, 0, ddof=1)).max()
        assert band.max() == pytest.approx(highest)


def test_a_study_of_back_propagation_alone_has_a_panel(tmp_path):
    cells = folders.cells({"method": "bp", "num_stages": 1, "cuts": ""})
    folders.write_run(tmp_path, cells[0], [0.5, 0.6])
    (panel,) = plots.curves(results.read_all(cells, tmp_path)).axes
    assert panel.get_title() == "resnet8 on digits, K = 1"
    assert plots.shrink(results.read_all(cells, tmp_path)) is None


def test_the_sweep_draws_the_error_over_beta(runs):
    (panel,) = plots.shrink(runs).axes
    lines = _lines(panel)
    assert lines.keys() == {"fdg, K = 2", "fdg, K = 3", "K = 1"}
    for num_stages in (2, 3):
        for x, y in lines[f"fdg, K = {num_stages}"].get_xydata():
            finals = [
                run.final_error
                for run in runs
                if (run.cell.config.num_stages, run.cell.config.shrink)
                == (num_stages, x)
            ]
            assert y == pytest.approx(np.mean(finals))


def test_the_files_are_written_whole_and_again(runs, tmp_path):
    defined = study.Study(name="s", grids=[{}])
    cells = [run.cell for run in runs]
    before = sorted(tmp_path.iterdir())
    for _ in range(2):
        assert outputs.write(defined, cells, tmp_path) == []
        written = set(tmp_path.iterdir()) - set(before)
        names = {"results.csv", "table.md", "curves.png", "shrink.png"}
        assert {path.name for path in written} == names
        for name in ("curves.png", "shrink.png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_runs_there_is_nothing_to_draw(tmp_path):
    cells = folders.cells({})
    assert plots.curves(results.read_all(cells, tmp_path)) is None
