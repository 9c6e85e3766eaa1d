"""What the documentation says is so: its code runs and prints what it says, its links lead somewhere, it names what there is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnreg
from attnreg.cli.application import OWN
from attnreg.cli.info import VARIABLES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Its code is of a backend that is not there.
OF_NO_BACKEND = DOCS / "testing.md"
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the tests do not lie beside the documentation")

# Code, and what stands below it as its output, if anything does.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
RUN = """
import contextlib, io, json, sys
names, printed = {}, []
for code in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


@pytest.fixture
def environment(tmp_path):
    """The environment of somebody who sets nothing, with an empty cache."""
    ours = ("TRITON_INTERPRET", "ATTNREG_BACKEND", "ATTNREG_TABLE", "ATTNREG_AUTOTUNE")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "ATTNREG_CACHE_DIR": str(tmp_path)}


WITH_CODE = [page for page in PAGES if page != OF_NO_BACKEND and BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_and_prints_what_stands_below_it(page, environment):
    blocks = BLOCK.findall(page.read_text())
    given = json.dumps([code for code, _ in blocks])
    done = subprocess.run([sys.executable, "-c", RUN], input=given, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for (code, expected), printed in zip(blocks, json.loads(done.stdout)):
        assert printed == expected, code


EXPECTED = {
    "add_a_backend": [
        "scores agree: True gradients agree: True",
        "backend 'shifted', asked for by the argument backend=, cannot run",
        "it takes no grouped heads",
    ],
    "model_layer": ["step 0: loss ", "step 200: loss 0."],
    "tune_and_explain": ["before: ", "W=16 torch_block: ", "after: ", ", tuned, "],
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_runs(example, environment):
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for expected in EXPECTED[example.stem]:
        assert expected in done.stdout
    assert f"examples/{example.name}" in "".join(page.read_text() for page in PAGES)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if not link.startswith(("https://", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_results_that_pages_name_are_there():
    results = {path.name for path in (ROOT / "benchmarks" / "results").rglob("*.json")}
    for page in PAGES:
        for name in re.findall(r"`(?:[\w/-]*/)?(2026-[\w-]+\.json)`", page.read_text()):
            assert name in results, page


def test_the_reference_has_every_public_name():
    reference = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"^\.\. (?:auto|py:)\w+:: (\w+)$", reference, re.MULTILINE))
    assert documented == set(attnreg.__all__)


def test_the_page_of_commands_has_every_command_and_variable():
    page = (DOCS / "commands.md").read_text()
    for command in OWN:
        assert f"`attnreg {command}" in page
    for variable in VARIABLES:
        assert f"`{variable}`" in page or not variable.startswith("ATTNREG_")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the pages are for machines without a GPU, too")
def test_every_backend_is_on_the_page_of_backends():
    page = (DOCS / "choosing.md").read_text()
    for status in attnreg.backends():
        if status.distribution.startswith("attnreg "):
            assert f"| `{status.name}` |" in page


def test_versions_have_dates_and_the_citation_is_of_this_one():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0].startswith("Unreleased")
    dates = dict(re.fullmatch(r"(\S+) \((\d{4}-\d\d-\d\d)\)", heading).groups() for heading in headings[1:])
    citation = (ROOT / "CITATION.cff").read_text()
    (version,) = re.findall(r"^version: (\S+)$", citation, re.MULTILINE)
    (released,) = re.findall(r"^date-released: (\S+)$", citation, re.MULTILINE)
    assert version == attnreg.__version__
    assert dates[version] == released
