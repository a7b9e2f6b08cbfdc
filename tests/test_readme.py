"""The README tells the truth: its programs run, its pictures are what is drawn."""

import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from fdg_jax import schedule

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text("utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=["in_python", "your_own_network"])
def test_a_program_of_the_readme_learns_the_digits(program):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", done.stdout)[1])
    assert accuracy > 90.0


@pytest.mark.parametrize(("name", "num_batches"), [("bp", 2), ("reference", 5)])
def test_the_pictures_are_what_the_schedule_draws(name, num_batches):
    drawn = schedule.resolve(name, 3)
    assert textwrap.indent(drawn.diagram(num_batches), "    ") in README
    assert f"    {drawn}\n" in README
