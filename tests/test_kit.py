"""The conformance kit: it finds every mutant and no fault in right backends, and says what it did not try."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import attnreg
from attnreg import Window
from attnreg.cli import app
from attnreg.testing import check_case, conform, make_case, shrinking
from attnreg.testing.cases import TABLE, fitted
from attnreg.testing.conformance import BROKEN, DOES_NOT_APPLY, HELD, python_of
from attnreg.testing.mutants import MUTANTS
from attnreg.testing.property import PROPERTIES, select
from attnreg.testing.subject import find, under_test

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "testing.md"


def right() -> attnreg.Backend:
    return find("torch_block")[0]


def states(report) -> dict[str, str]:
    return {finding.tested.name: finding.state for finding in report.findings}


def test_there_are_enough_mutants_and_each_names_a_property():
    assert len(MUTANTS) >= 25
    assert {mutant.property for mutant in MUTANTS.values()} <= PROPERTIES.keys()


def test_every_property_that_can_be_broken_on_a_cpu_has_a_mutant():
    on_accelerator = {"cuda_graph", "side_stream", "unchecked_lengths"}
    # attnreg itself would have to be broken: backends have no part in these, or any mutant of the same numbers breaks them.
    of_the_core = {"compile", "second_derivatives", "value_dim"}
    assert PROPERTIES.keys() - {mutant.property for mutant in MUTANTS.values()} <= on_accelerator | of_the_core


@pytest.mark.parametrize("name", MUTANTS)
def test_the_kit_kills_the_mutant_by_the_property_that_it_names(name):
    mutant = MUTANTS[name]
    report = conform(mutant.of(right()), quick=True, properties=[mutant.property], shrink=False)
    assert not report.conforms
    assert report.broken == (mutant.property,) or report.untried is not None


@pytest.mark.parametrize("backend", ["torch", "torch_block"])
def test_a_right_backend_breaks_nothing(backend):
    """In a quick run; ``test_conformance`` has the whole one."""
    report = conform(backend, quick=True)
    assert report.broken == ()
    assert report.conforms
    assert set(states(report).values()) == {HELD, DOES_NOT_APPLY}


def forward_only() -> attnreg.Backend:
    backend = right()
    without = {f"{op}_backward": None for op in backend.own_ops}
    return replace(backend, name="forward", local_dot_product=None, local_weighted_average=None, **without)


def test_a_backend_without_gradients_is_told_so():
    report = conform(forward_only(), quick=True)
    found = states(report)
    assert found["values"] == found["hidden"] == found["autocast"] == found["compile"] == HELD
    for name in ("gradients", "bias_gradients", "wanted_gradients", "expanded_gradients"):
        (finding,) = (each for each in report.findings if each.tested.name == name)
        assert finding.state == DOES_NOT_APPLY
        assert "has no local_attention_backward" in finding.reason
    assert any("forward only: it has no gradients of local_attention" in remark for remark in report.remarks())
    assert any("it has no local_dot_product" in remark for remark in report.remarks())


def test_a_backend_of_which_nothing_can_be_tried_does_not_conform():
    report = conform(replace(right(), refuse=lambda problem: "not today"), quick=True, properties=["values"])
    assert not report.conforms
    assert report.remarks() == ["nothing is known of its results: not today"]


def test_cases_get_the_sizes_that_a_backend_takes():
    backend = right()
    capability = replace(backend.capability, head_dims={64, 128}, window_sizes=range(16, 33), dtypes={torch.float32})
    report = conform(
        replace(backend, name="narrow", capability=capability), quick=True, properties=["values", "windows"]
    )
    assert report.broken == ()
    assert all(finding.cases > 1 for finding in report.findings)
    assert fitted(make_case(window=Window(7, 0), head_dim=80), capability).problem.window == Window(15, 0)
    assert fitted(make_case(window=Window(70, 11), head_dim=80), capability).problem.head_dim == 64


def test_the_example_of_a_plugin_conforms(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "example_plugin")
    (example,) = importlib.import_module("attnreg_example").attnreg_backends()
    report = conform(example)
    assert report.conforms, report.broken
    assert report.remarks() == ["it has no local_weighted_average", "it has no local_attention"]
    assert any("bias is given; it takes none" in reason for reason in report.left_out())


def test_nothing_of_a_backend_is_left_registered():
    before = [status.name for status in attnreg.backends()]
    conform(forward_only(), quick=True, properties=["values"])
    assert [status.name for status in attnreg.backends()] == before


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.case.name)
def test_a_case_is_made_again_by_the_lines_that_it_prints(row):
    for op in attnreg.op.OPS:
        case = row.case.of(op, torch.bfloat16, torch.device("cpu"), needs_grad=False)
        names = {"make_case": make_case, "torch": torch, "Window": Window}
        exec("\n".join(case.lines()), names)
        again = names["case"]
        assert again.problem == case.problem
        assert max(map(len, case.lines())) <= 76
        if case.problem.batch * case.problem.heads < 100:
            for tensor, other in zip(case.draw().leaves.values(), again.draw().leaves.values()):
                assert tensor.stride() == other.stride()
                torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "most"),
    [("left_off_by_one", 2), ("key_lengths_ignored", 1), ("heads_transposed", 1), ("hidden_key_leaks", 1)],
)
def test_the_smallest_call_is_small_and_repeats_the_failure(name, most, monkeypatch):
    monkeypatch.setattr(shrinking, "MOST_SECONDS", 60.0)  # a busy machine must not cut the search short
    mutant = MUTANTS[name]
    backend = mutant.of(right())
    report = conform(backend, quick=True, properties=[mutant.property])
    (finding,) = report.findings
    problem = finding.minimal.case.problem
    assert max(problem.batch, problem.query_length, problem.key_length, problem.head_dim, problem.value_dim) <= most
    lines = python_of(finding.minimal, backend.name)
    with attnreg.register(backend), pytest.raises(AssertionError, match=re.escape(PROPERTIES[mutant.property].says)):
        exec("\n".join(lines), {})


def test_a_case_is_checked_by_itself():
    check_case("torch_block", "values", make_case(query_length=5))
    with pytest.raises(AssertionError, match="output: relative error"):
        check_case(MUTANTS["not_scaled"].of(right()), "values", make_case(query_length=5))
    with pytest.raises(ValueError, match="no property is called nonsense"):
        check_case("torch_block", "nonsense", make_case())


def test_a_forward_that_raises_is_a_fault_and_no_crash():
    def attention(*inputs, **given):
        raise RuntimeError("boom")

    report = conform(replace(right(), local_attention=attention), quick=True, properties=["values"])
    (finding,) = report.findings
    assert finding.state == BROKEN
    assert "raised RuntimeError: boom" in finding.failures[0].fault


def test_no_property_has_cases_that_a_backend_refuses():
    with under_test("torch_block") as subject:
        for property in PROPERTIES.values():
            if property.name != "refusals":
                for case in select(property, subject, quick=True).cases:
                    assert subject.refusals(case.problem) == ()


# The command


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["conform", *arguments])


def test_the_command_shows_what_holds(tmp_path):
    file = tmp_path / "report.json"
    result = invoke("torch_block", "--quick", "--device", "cpu", "--property", "values", "--property", "cuda_graph",
                    "--json", str(file))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"^values +held +\d+ ", result.output, re.MULTILINE)
    assert re.search(r"^cuda_graph +does not apply +0 .*\n +it is tested on cpu", result.output, re.MULTILINE)
    report = json.loads(file.read_text())
    assert report["conforms"] is True
    assert [each["state"] for each in report["properties"]] == ["held", "does not apply"]


def test_the_command_shows_the_smallest_call_that_breaks_a_property(tmp_path):
    file = tmp_path / "report.json"
    mutant = MUTANTS["bias_before_scaling"]
    with attnreg.register(mutant.of(right())):
        result = invoke(
            f"mutant.{mutant.name}", "--quick", "--device", "cpu", "--property", "bias", "--json", str(file)
        )
    assert result.exit_code == 1
    assert re.search(r"^bias +broken ", result.output, re.MULTILINE)
    assert "bias: a bias is added after scaling, and hides where it is -inf\n  but output: " in result.output
    assert "    case = make_case(\n" in result.output
    assert max(map(len, result.output.replace(str(file), "").splitlines())) <= 80
    (found,) = json.loads(file.read_text())["properties"]
    assert found["minimal"]["python"].splitlines()[-1] == f"check_case('mutant.{mutant.name}', 'bias', case)"


def test_the_command_knows_what_it_cannot_do(tmp_path):
    unknown = invoke("nonsense", "--device", "cpu")
    assert unknown.exit_code == 2
    assert "no backend is called 'nonsense'" in unknown.output
    assert invoke("torch", "--property", "nonsense", "--device", "cpu").exit_code == 2
    assert invoke("torch_block:option=1", "--device", "cpu").exit_code == 2
    elsewhere = invoke("flash", "--device", "cpu")
    assert elsewhere.exit_code == 1
    assert "flash cannot be tested on cpu" in elsewhere.output
    nowhere = invoke("torch", "--quick", "--device", "cpu", "--property", "cuda_graph", "--json", str(tmp_path / "a/b"))
    assert nowhere.exit_code == 1
    assert "--json" in nowhere.output


# In a plug-in author's folder


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


BACKEND = """
from attnreg.testing.mutants import MUTANTS
from attnreg.testing.subject import find

mine = MUTANTS[{name!r}].of(find("torch_block")[0])
"""


def test_the_example_of_the_document_works_in_a_fresh_folder(tmp_path):
    (example,) = re.findall(r"```python\n# test_mine.py\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(example.strip().splitlines()) == 3
    few = '"torch_block", quick=True, properties=["values", "second_derivatives"]'
    (tmp_path / "test_mine.py").write_text(example.replace('"mine"', few))
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", folder=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "NotTried: second_derivatives was not tried" in result.stdout


def test_the_tests_of_a_broken_backend_fail_and_say_how_to_repeat_it(tmp_path):
    (tmp_path / "mine.py").write_text(BACKEND.format(name="key_lengths_off_by_one"))
    (tmp_path / "test_mine.py").write_text(
        "from attnreg.testing import conformance_tests\nfrom mine import mine\n"
        "test_mine = conformance_tests(mine, properties=['values', 'key_lengths'], quick=True)\n"
    )
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", folder=tmp_path)
    assert result.returncode == 1
    assert "test_mine[key_lengths-attention-float32-key_lengths]" in result.stdout
    assert "test_mine[values-attention-float32-causal]" not in result.stdout
    assert "keys at or past a sequence's length are invisible; but output" in result.stdout
    assert "check_case('mutant.key_lengths_off_by_one', 'key_lengths', case)" in result.stdout


def test_a_backend_that_cannot_run_here_is_skipped_with_its_reason(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "from attnreg.testing import conformance_tests\ntest_mine = conformance_tests('flash')\n"
    )
    result = python("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", folder=tmp_path)
    assert result.returncode == 0
    assert "it takes cuda, and is asked for on cpu" in result.stdout


def test_neither_attnreg_nor_its_oracle_loads_the_kit():
    code = (
        "import sys, attnreg, attnreg.testing.oracle; "
        "print(*(name for name in sys.modules if name.startswith(('attnreg.testing.', 'pytest', 'numpy.'))))"
    )
    result = python("-c", code, folder=ROOT)
    loaded = set(result.stdout.split())
    assert loaded <= {"attnreg.testing.oracle", "attnreg.testing.inputs", *[each for each in loaded if "numpy" in each]}
