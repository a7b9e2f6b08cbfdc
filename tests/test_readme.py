"""The pages tell the truth: programs run, pictures and links are right, keys exist."""

import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

import fdg_jax
from configs import default
from fdg_jax import config_keys, schedule, study
from fdg_jax.study import grid

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md"]
PAGES += sorted(ROOT.glob("docs/**/*.md"))
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = [
    (page.stem, block)
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
]
STUDIES = {name: block for name, block in BLOCKS if "def get_study" in block}
PROGRAMS = {name: block for name, block in BLOCKS if "def get_study" not in block}


@pytest.mark.parametrize(
    "name",
    [
        "README",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in sorted({*PROGRAMS} - {"README"})
        ),
    ],
)
def test_a_program_learns_the_digits(name):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name]],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", done.stdout)[1])
    assert accuracy > 90.0


def test_every_program_is_run():
    assert {*STUDIES, *PROGRAMS} == {"README", "own_network", "studies"}
    assert len(BLOCKS) == len(STUDIES) + len(PROGRAMS)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_file_loads_as_it_stands(name, tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(STUDIES[name])
    cells = grid.expand(study.load(path))
    grid.check_settings(cells)
    assert len(cells) == 21
    assert "cifar10-resnet20-fdg-k2-beta0.2-seed0" in {cell.name for cell in cells}


@pytest.mark.parametrize(("name", "num_batches"), [("bp", 2), ("reference", 5)])
def test_the_pictures_are_what_the_schedule_draws(name, num_batches):
    drawn = schedule.resolve(name, 3)
    assert textwrap.indent(drawn.diagram(num_batches), "    ") in README
    assert f"    {drawn}\n" in README


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}"
)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file.read_text("utf-8")), target


def _anchors(text):
    """The headings of a page as GitHub names them in links."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}"
)
def test_keys_that_are_named_exist(page):
    text = page.read_text("utf-8").replace("`config.json`", "")
    for key in re.findall(r"(?:--|`)config\.(\w+)", text):
        config_keys.check(key, list(default.get_config()))


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {fdg_jax.__version__}\n" in citation
