"""Folders of cells as runs would have left them, for tests of what is made of them."""

import json

from fdg_jax import resume, study
from fdg_jax.study import grid, results

STEPS_PER_EPOCH = 1437 // 64


def cells(*grids, **changes):
    given = {"name": "s", "base": "digits", "grids": grids}
    return grid.expand(study.Study(**given | changes))


def write_run(workdir, cell, accuracies, *, finished=True, rate=1000.0):
    """A run with a line of training and one of evaluation per epoch."""
    folder = workdir / cell.name
    folder.mkdir(parents=True)
    resume.write_json(folder / resume.CONFIG_FILE, cell.config.to_dict())
    with open(folder / "metrics.jsonl", "w") as file:
        for epoch, accuracy in enumerate(accuracies, start=1):
            place = {"step": epoch * STEPS_PER_EPOCH, "epoch": float(epoch)}
            logged = {"train_loss": 1.0 / epoch, "images_per_second": rate}
            file.write(json.dumps(place | logged) + "\n")
            evaluated = {"test_loss": 2.0 / epoch, "test_accuracy": accuracy}
            file.write(json.dumps(place | evaluated) + "\n")
    if finished:
        summary = {
            "final_test_accuracy": accuracies[-1],
            "best_test_accuracy": max(accuracies),
            "engine": "threads",
            "device_kind": "cpu",
            "host": "some CPU, 2 cores",
            "versions": {"jax": "0.10"},
        }
        resume.write_json(folder / resume.SUMMARY_FILE, summary)


def write_failure(workdir, cell, state, reason):
    folder = workdir / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    failure = {"state": state, "reason": reason}
    resume.write_json(folder / results.FAILURE_FILE, failure)
