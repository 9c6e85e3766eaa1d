"""The conformance kit: it finds every mutant and no fault in right backends, and says what it did not try."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import attnreg
from attnreg import Window
from attnreg.cli import app
from attnreg.op import ATTENTION
from attnreg.testing import check_case, conform, make_case, shrinking
from attnreg.testing.cases import TABLE, fitted
from attnreg.testing.conformance import BROKEN, DOES_NOT_APPLY, HELD, python_of
from attnreg.testing.mutants import MUTANTS
from attnreg.testing.property import PROPERTIES, examine, select
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
    first, second = report.remarks()
    assert first == "nothing is known of its results: not today"
    assert re.fullmatch(r"it refuses (\d+) of \1 cases that its capability declares: not today \(\1\)", second)


def only_the_easiest(problem) -> str | None:
    if problem.needs_grad:
        return "gradients another day"
    return None if problem.window.size == 1 else "only the easiest"


def composed() -> attnreg.Backend:
    return replace(right(), local_attention=None, local_attention_backward=None)


@pytest.mark.parametrize("backend", [right(), composed(), find("torch")[0]], ids=["own", "composed", "differentiable"])
def test_a_backend_with_gradients_of_which_none_could_be_tried_does_not_conform(backend):
    tested = replace(backend, refuse=only_the_easiest)
    report = conform(tested, quick=True, properties=["values", "gradients"])
    assert report.broken == ()
    assert not report.conforms
    assert "nothing is known of its gradients: gradients another day" in report.remarks()
    assert re.search(r"it refuses \d+ of \d+ cases that its capability declares: gradients another day \(\d+\)",
                     report.remarks()[-1])  # fmt: skip
    assert conform(tested, quick=True, properties=["values"]).conforms  # they were not asked for


def test_a_backend_that_refuses_much_conforms_and_the_report_says_how_much():
    """As an adapter of a library does, which has its own narrow range."""

    def refuse(problem):
        if any(name == "bias" for name, _ in problem.given):
            return "the library has no bias"
        return None if problem.window.right == 0 else "the library looks back only"

    report = conform(replace(right(), refuse=refuse), quick=True)
    assert report.conforms
    (remark,) = report.remarks()
    found = re.match(r"it refuses (\d+) of (\d+) cases that its capability declares: the library ", remark)
    assert found is not None
    refused, cases = map(int, found.groups())
    tried = sum(each.cases for each in report.findings if each.tested.name != "refusals")
    assert cases == refused + tried
    counts = [int(count) for count in re.findall(r"\((\d+)\)", remark)]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == refused


# Float64, in which the truth is computed, too


def in_float64(backend: attnreg.Backend, **functions) -> attnreg.Backend:
    capability = replace(backend.capability, dtypes={torch.float64}, takes=ATTENTION.optional)
    return replace(backend, capability=capability, **functions)


@pytest.mark.parametrize("name", ["torch", "torch_block"])
def test_a_right_backend_of_float64_alone_breaks_nothing_at_any_magnitude(name):
    report = conform(in_float64(find(name)[0]), properties=["values", "gradients", "magnitudes"], shrink=False)
    assert report.broken == ()
    assert report.conforms


def test_float32_does_not_pass_for_float64_at_any_magnitude():
    def low(function):
        def call(*inputs, **given):
            single = [each.float() if isinstance(each, torch.Tensor) else each for each in inputs]
            found = function(*single, **given)
            if isinstance(found, dict):
                return {name: gradient.double() for name, gradient in found.items()}
            return tuple(each.double() for each in found)

        return call

    backend = right()
    names = ("local_attention", "local_attention_backward")
    with under_test(in_float64(backend, **{name: low(getattr(backend, name)) for name in names})) as subject:
        cases = select(PROPERTIES["magnitudes"], subject).cases
        assert len(cases) >= 14
        for case in cases:
            assert examine(PROPERTIES["magnitudes"], subject, case) is not None, case


# What a backend raises


class Evil(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class OfItsOwn(BaseException):
    pass


def raising(error: BaseException) -> attnreg.Backend:
    def attention(*inputs, **given):
        raise error

    return replace(right(), local_attention=attention)


@pytest.mark.parametrize(
    "error",
    [Evil(), OfItsOwn(), GeneratorExit(), asyncio.CancelledError(), SystemExit(0), StopIteration(),
     pytest.skip.Exception("not today"), pytest.xfail.Exception("not today")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_a_backend_raises_breaks_the_property(error):
    report = conform(raising(error), quick=True, properties=["values"])
    assert report.broken == ("values",)
    (finding,) = report.findings
    assert finding.failures[0].fault.startswith(f"raised {type(error).__name__}")
    json.dumps(report.as_json())


def test_ctrl_c_ends_the_kit():
    with pytest.raises(KeyboardInterrupt):
        conform(raising(KeyboardInterrupt()), quick=True, properties=["values"])


def test_what_a_filter_raises_is_a_reason_to_refuse():
    def refuse(problem):
        raise OfItsOwn

    report = conform(replace(right(), refuse=refuse), quick=True, properties=["values", "refusals"])
    assert report.broken == ("refusals",)
    assert "OfItsOwn" in report.untried


# Threads


def test_the_number_of_threads_is_the_users_where_it_has_a_part_and_1_elsewhere():
    seen = []

    def attention(*inputs, **given):
        seen.append(torch.get_num_threads())
        return right().local_attention(*inputs, **given)

    capability = replace(right().capability, takes=ATTENTION.optional)
    backend = replace(right(), capability=capability, local_attention=attention)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name, threads in (("values", 2), ("repeatable", 2), ("windows", 1), ("layouts", 1)):
            seen.clear()
            assert conform(backend, quick=True, properties=[name]).conforms
            assert set(seen) == {threads}
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


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
        if case.problem.batch * case.problem.heads < 100 and case.problem.window.size < 1000:
            for tensor, other in zip(case.draw().leaves.values(), again.draw().leaves.values()):
                assert tensor.stride() == other.stride()
                torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("left_off_by_one", 2),
        ("key_lengths_ignored", 1),
        ("heads_transposed", 1),
        ("hidden_key_leaks", 2),
        ("query_starts_ignored", 1),
        ("window_across_sequences", 1),
        ("sinks_ignored", 1),
        ("lse_gradient_dropped", 1),
    ],
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
    with pytest.raises(ValueError, match=r"no property is called magnitud \(did you mean 'magnitudes'\?\)"):
        check_case("torch_block", "magnitud", make_case())
    with pytest.raises(LookupError, match=r"no backend is called 'torch_blok' \(did you mean 'torch_block'\?\)"):
        check_case("torch_blok", "values", make_case())


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
    meant = invoke("torch_blok", "--device", "cpu")
    assert meant.exit_code == 2
    assert "did you mean 'torch_block'?" in meant.output.replace("\n", " ")
    meant = invoke("torch", "--property", "magnitud", "--device", "cpu")
    assert meant.exit_code == 2
    assert "'magnitudes'?" in meant.output
    assert invoke("torch", "--limit", "0", "--device", "cpu").exit_code == 2
    assert invoke("torch", "--property", "nonsense", "--device", "cpu").exit_code == 2
    assert invoke("torch_block:option=1", "--device", "cpu").exit_code == 2
    elsewhere = invoke("flash", "--device", "cpu")
    assert elsewhere.exit_code == 1
    assert "flash cannot be tested on cpu" in elsewhere.output
    nowhere = invoke("torch", "--quick", "--device", "cpu", "--property", "cuda_graph", "--json", str(tmp_path / "a/b"))
    assert nowhere.exit_code == 1
    assert "--json" in nowhere.output


# In a plug-in author's folder


def surroundings(folder: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(path)}


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=surroundings(folder),
        capture_output=True,
        text=True,
        timeout=300,
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


def test_the_tests_of_a_backend_of_which_nothing_is_known_fail(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "import pytest\nfrom dataclasses import replace\n"
        "from attnreg.testing import conformance_tests\nfrom attnreg.testing.subject import find\n"
        "right = find('torch_block')[0]\n"
        "def skip(*inputs, **given):\n    pytest.skip('not today')\n"
        "def of(**changes):\n"
        "    return conformance_tests(replace(right, **changes), quick=True, properties=['values', 'gradients'])\n"
        "test_refuses = of(refuse=lambda problem: 'no')\n"
        "test_without = of(refuse=lambda problem: 'no gradients' if problem.needs_grad else None)\n"
        "test_skips = of(local_attention=skip)\n"
    )
    result = python("-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", folder=tmp_path)
    assert result.returncode == 1
    assert re.findall(r"^FAILED \S+::(test_(?:refuses|without)\S+)", result.stdout, re.MULTILINE) == [
        "test_refuses[not_tried]",
        "test_without[not_tried]",
    ]
    assert "AssertionError: nothing is known of its results: no\n" in result.stdout
    assert "AssertionError: nothing is known of its gradients: no gradients\n" in result.stdout
    assert re.search(r"NotTried: it refuses (\d+) of \1 cases that its capability declares: no ", result.stdout)
    assert "FAILED test_mine.py::test_skips[values-attention-float32-causal]" in result.stdout
    assert "skipped" not in result.stdout.splitlines()[-1]


# A backend that takes its process along

ODD = """
import ctypes
import os
from dataclasses import replace

from attnreg import hookimpl
from attnreg.testing.subject import find

right = find("torch_block")[0]


def hang():
    open("hangs", "w").write(str(os.getpid()))
    while True:
        pass


def write_over():
    for number in range(3, 9):
        try:
            os.write(number, b"nonsense" * 9)
        except OSError:
            pass


def stumbles(what):
    # A right backend, but where a bias is given.

    def attention(*inputs, bias=None, key_lengths=None, **given):
        if bias is not None:
            what()
        print("this is no part of the report")
        os.environ["OMP_WAIT_POLICY"] + "is set"
        return right.local_attention(*inputs, bias=bias, key_lengths=key_lengths, **given)

    return attention


def fork():
    if os.fork():
        os.wait()


WHAT = {
    "odd_exits": lambda: os._exit(0),
    "odd_crashes": lambda: ctypes.string_at(0),
    "odd_hangs": hang,
    "odd_forks": fork,
    "odd_writes": write_over,
}


def refuse(problem):
    if any(name == "bias" for name, _ in problem.given):
        os._exit(0)


@hookimpl
def attnreg_backends():
    name = "NAME"
    if name == "odd_asked":
        yield replace(right, name=name, refuse=refuse)
    else:
        yield replace(right, name=name, local_attention=stumbles(WHAT[name]))
"""


def install_odd(name: str, folder: Path) -> None:
    """A plug-in with that odd backend."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (folder / f"module_{name}.py").write_text(ODD.replace("NAME", name))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[attnreg]\nodd = module_{name}\n")


def conform_odd(name: str, folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict]]:
    folder = folder / name
    folder.mkdir()
    install_odd(name, folder)
    properties = [part for each in ("value_dim", "bias", "expanded_gradients") for part in ("--property", each)]
    result = python("-m", "attnreg", "conform", name, "--quick", "--device", "cpu", *properties, "--json", "report.json",
                    *options, folder=folder)  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    return result, {each["name"]: each for each in report["properties"]}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("odd_exits", "the process ended with exit code 0"),
        ("odd_asked", "the process ended with exit code 0"),
        ("odd_crashes", "the process ended with signal SIGSEGV"),
        ("odd_hangs", "the process was ended after 3 s"),
    ],
)
def test_a_backend_that_ends_its_process_breaks_a_property_and_the_others_are_tried(name, how, tmp_path):
    result, found = conform_odd(name, tmp_path, "--limit", "3")
    assert result.returncode == 1, result.stderr
    assert {each: its["state"] for each, its in found.items()} == {
        "value_dim": "held",
        "bias": "broken",
        "expanded_gradients": "held",
    }
    assert found["bias"]["minimal"]["fault"].startswith(f"{how} in the case bias_")
    assert "bias=" in found["bias"]["minimal"]["python"]
    assert re.search(r"^bias +broken +\d+ ", result.stdout, re.MULTILINE)
    assert re.search(rf"^  but {how} in the case bias_", result.stdout, re.MULTILINE)
    assert "this is no part of the report" not in result.stdout


def test_a_backend_that_hangs_again_and_again_is_given_up(tmp_path):
    install_odd("odd_hangs", tmp_path)
    names = ("bias", "wide_bias", "bias_gradients", "layouts")
    properties = [part for name in names for part in ("--property", name)]
    result = python("-m", "attnreg", "conform", "odd_hangs", "--quick", "--device", "cpu", "--limit", "2", *properties,
                    folder=tmp_path)  # fmt: skip
    assert result.returncode == 1
    found = dict(re.findall(r"^(\w+) +(broken|held|does not apply) ", result.stdout, re.MULTILINE))
    assert found == {**dict.fromkeys(names[:3], "broken"), "layouts": "does not apply"}
    assert "not tried: 3 properties were given up after 2 s in a case" in result.stdout


def test_a_backend_that_forks_or_writes_where_it_should_not_spoils_no_report(tmp_path):
    result, found = conform_odd("odd_forks", tmp_path)
    assert result.returncode == 0, result.stderr
    assert {each["state"] for each in found.values()} == {"held"}
    result, found = conform_odd("odd_writes", tmp_path, "--limit", "5")
    assert result.returncode == 1
    assert found["value_dim"]["state"] == "held"
    assert found["bias"]["state"] == "broken"


def is_there(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda end: end.name)
def test_nothing_is_left_where_the_command_is_ended(end, tmp_path):
    install_odd("odd_hangs", tmp_path)
    with subprocess.Popen(
        [sys.executable, "-m", "attnreg", "conform", "odd_hangs", "--device", "cpu", "--property", "bias"],
        cwd=tmp_path, env=surroundings(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        # Tests that run in the background of a shell ignore it, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as command:  # fmt: skip
        try:
            until = time.monotonic() + 120
            pid = ""
            while not pid and time.monotonic() < until and command.poll() is None:
                time.sleep(0.05)
                with suppress(OSError):
                    pid = (tmp_path / "hangs").read_text()
            assert pid
            command.send_signal(end)
            command.wait(20)
            until = time.monotonic() + 10
            while is_there(int(pid)) and time.monotonic() < until:
                time.sleep(0.05)
            assert not is_there(int(pid))
        finally:
            command.kill()


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
    of_oracle = {f"attnreg.testing.{name}" for name in ("oracle", "inputs", "philox", "placing")}
    assert loaded <= {*of_oracle, *[each for each in loaded if "numpy" in each]}
