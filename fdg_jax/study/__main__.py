"""Runs a study, or goes on with it, and writes what its runs have come to.

    python -m fdg_jax.study --study=configs/studies/small.py [--workdir=DIR]
        [--data_dir=DIR] [--jobs=1] [--report]

Into the workdir, by default runs/NAME, go a folder per run, results.csv, table.md,
curves.png and, where there are several betas, shrink.png; they are written each time
that all seeds of a setting have run, and at the end. With --report they are written of
the runs that there are, and nothing is run.

Exit status: 0 every run has finished or diverged; 1 some failed, and are tried again
the next time; 2 a flag, the study or the workdir is wrong, and nothing was run; 130 and
143 stopped by Ctrl-C and by SIGTERM: started again, it goes on.
"""

import argparse
import pathlib
import signal
import sys
from collections.abc import Sequence

import jax

from fdg_jax import folders, streams
from fdg_jax.cpu_devices import request_cpu_devices
from fdg_jax.study import outputs, results, runner
from fdg_jax.study.definition import Study, load
from fdg_jax.study.grid import Cell, check_data, check_settings, expand


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    # The runs have the accelerators, in their own processes; this one only checks.
    jax.config.update("jax_platforms", "cpu")
    try:
        options = _parse(arguments)
        study = load(options.study)
        cells = expand(study, options.data_dir)
        workdir = folders.local(options.workdir or pathlib.Path("runs", study.name))
        if options.report:
            return _report(study, cells, workdir)
        request_cpu_devices(max(cell.config.num_stages for cell in cells))
        check_settings(cells)
        runner.check_workdir(cells, workdir)
        if options.jobs < 1:
            raise ValueError(f"--jobs must be at least 1; got {options.jobs}")
        left = runner.unfinished(cells, workdir)
        if left:
            runner.check_platforms()
        check_data(left)
        return _run(study, cells, workdir, options.jobs)
    except ValueError as error:
        return _fail(2, error)


class _Parser(argparse.ArgumentParser):
    """One whose errors are told in one line, as all others are."""

    def error(self, message: str):
        raise ValueError(f"{message}; see --help")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m fdg_jax.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--study", required=True, help="a file of configs/studies/")
    parser.add_argument("--workdir", help="where to write; default: runs/NAME")
    parser.add_argument("--data_dir", help="in place of the configs' data_dir")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="processes at a time; on a GPU each takes most of its memory at once, "
        "unless XLA_PYTHON_CLIENT_MEM_FRACTION or XLA_PYTHON_CLIENT_PREALLOCATE=false "
        "share it out",
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser.parse_args(arguments)


def _report(study: Study, cells: Sequence[Cell], workdir: pathlib.Path) -> int:
    if not workdir.is_dir():
        raise ValueError(
            f"--report is of a study that was begun; there is no {workdir}"
        )
    for line in outputs.write(study, cells, workdir):
        print(line)
    print((workdir / outputs.TABLE_FILE).read_text("utf-8"))
    return 0


def _run(study: Study, cells: Sequence[Cell], workdir: pathlib.Path, jobs: int) -> int:
    stopped = runner.run(
        cells, workdir, lambda: outputs.write(study, cells, workdir), jobs
    )
    _report(study, cells, workdir)
    if stopped is not None:
        return _fail(
            128 + stopped,
            f"stopped by {signal.Signals(stopped).name}; with --workdir={workdir} it "
            f"goes on where it was",
        )
    print(f"files are in {workdir}")
    failed = sum(r.state == results.FAILED for r in results.read_all(cells, workdir))
    if failed:
        return _fail(1, f"{failed} of {len(cells)} runs failed; see {workdir}/table.md")
    return 0


def _fail(status: int, reason: object) -> int:
    print(f"study: {' '.join(str(reason).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    streams.outlive_terminal()
    sys.exit(main())
