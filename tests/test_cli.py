"""The command ``attnreg``, as its users see it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import attnreg
from attnreg import demo
from attnreg.backend import Fault
from attnreg.cli import app
from attnreg.registry import registry

LONG_NAME = "a-distribution-with-a-name-that-no-narrow-column-holds 1.2.3"
LONG_ERROR = "ImportError: cannot import name 'something_rather_long' from 'a_module.that_is.nowhere'"

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


def attnreg_command(*arguments: str, columns: int = 80, **environment: str):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns), **environment})


def torch_block() -> attnreg.Backend:
    (backend,) = (each.backend for each in attnreg.backends() if each.name == "torch_block")
    return backend


@pytest.fixture
def broken_plugin():
    registry.entries  # noqa: B018 - discovery, which would begin with no faults
    registry._faults = (*registry._faults, Fault("oops", LONG_NAME, LONG_ERROR))
    yield
    attnreg.reset()


# Help


def test_without_a_command_the_help_names_every_command():
    result = attnreg_command()
    for command in ("backends", "explain", "demo", "bench"):
        assert re.search(rf"^  {command} ", result.output, re.MULTILINE)


def test_python_dash_m_is_the_command_too():
    done = subprocess.run([sys.executable, "-m", "attnreg", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: attnreg [OPTIONS] COMMAND" in done.stdout


def test_importing_attnreg_imports_nothing_of_the_command():
    script = "import sys, torch; before = set(sys.modules); import attnreg; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"typer", "rich", "attnreg.cli", "attnreg.demo"} & set(done.stdout.split())


# Commands that other distributions add


@pytest.fixture
def plugged(tmp_path, monkeypatch):
    """Put a distribution on the path as if installed: its module and its entry points among attnreg's commands."""

    def write(name: str, entry_points: str, source: str = "") -> None:
        folder = tmp_path / name
        info = folder / f"plugged_{name}-9.1.dist-info"
        info.mkdir(parents=True)
        (folder / f"plugged_{name}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugged-{name}\nVersion: 9.1\n")
        (info / "entry_points.txt").write_text(f"[attnreg.commands]\n{entry_points}\n")
        monkeypatch.syspath_prepend(str(folder))

    imported = set(sys.modules)
    yield write
    for name in set(sys.modules) - imported:
        if name.startswith("plugged_"):
            del sys.modules[name]


GREETING = """
def greet(name: str, times: int = 1) -> None:
    \"""Greet somebody.\"""
    for _ in range(times):
        print("hello", name)
"""


def test_a_distribution_adds_a_command_with_its_options(plugged):
    plugged("greeting", "greet = plugged_greeting:greet", GREETING)
    help_text = attnreg_command("--help").output
    assert re.search(r"^  greet +Greet somebody\.$", help_text, re.MULTILINE)
    result = attnreg_command("greet", "you", "--times", "2")
    assert (result.exit_code, result.output) == (0, "hello you\nhello you\n")
    assert attnreg_command("greet").exit_code == 2


def test_an_added_command_is_not_imported_by_other_commands(plugged):
    plugged("greeting", "greet = plugged_greeting:greet", GREETING)
    assert attnreg_command("backends").exit_code == 0
    assert "plugged_greeting" not in sys.modules


@pytest.mark.parametrize(
    ("value", "source", "reason"),
    [
        ("plugged_broken:command", "import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("not_installed_at_all:command", "", "ModuleNotFoundError: No module named 'not_installed_at_all'"),
        ("plugged_broken:command", "", "AttributeError: module 'plugged_broken' has no attribute 'command'"),
        ("plugged_broken:command", "raise SystemExit('given up')", "SystemExit: given up"),
        ("plugged_broken:command", "command = 5", "TypeError: a command must be a function"),
        ("plugged_broken:command", "def command(it: 'Nowhere'): ...", "NameError: name 'Nowhere' is not defined"),
    ],
)
def test_a_broken_command_says_why_and_costs_only_itself(plugged, value, source, reason):
    plugged("broken", f"broken = {value}", source)
    plugged("greeting", "greet = plugged_greeting:greet", GREETING)
    help_text = attnreg_command("--help", columns=500)
    assert help_text.exit_code == 0
    for output in (help_text.output, attnreg_command("broken", "--help").output):
        assert f"cannot be used: {reason}" in " ".join(output.split())
    assert re.search(r"^  bench ", help_text.output, re.MULTILINE)
    assert attnreg_command("greet", "you").output == "hello you\n"
    result = attnreg_command("broken", "argument", "--option", "value")
    assert result.exit_code == 1
    assert f"Error: the command broken (plugged-broken 9.1) cannot be used: {reason}" in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("taken", ["explain", "bench"])
def test_the_name_of_a_command_is_not_taken_from_it(plugged, taken):
    before = attnreg_command(taken, "--help").output
    plugged("thief", f"{taken} = plugged_thief:greet", GREETING)
    assert attnreg_command(taken, "--help").output == before
    expected = rf"^  {taken} \(plugged-thief 9\.1\) +cannot be used: its name is taken$"
    assert re.search(expected, attnreg_command("--help").output, re.MULTILINE)


def test_nothing_of_attnreg_imports_the_benchmarks():
    for file in Path(attnreg.__file__).parent.rglob("*.py"):
        assert not re.search(r"^ *(?:from|import) attnreg_benchmarks\b", file.read_text(), re.MULTILINE), file


def test_a_misspelt_command_is_told_which_was_meant():
    result = attnreg_command("benhc")
    assert result.exit_code == 2
    assert "No such command 'benhc'. Did you mean 'bench'?" in result.output


# backends


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_backends_lists_each_with_its_reason_unbroken_at_any_width(columns):
    result = attnreg_command("backends", columns=columns)
    assert result.exit_code == 0
    for status in attnreg.backends():
        assert f"{status.name} ({status.distribution})" in result.output
        if status.backend is not None:
            assert status.backend.summary in result.output
        if status.reason is not None:
            assert status.reason in result.output


def test_backends_fits_the_table_into_80_columns():
    table, _, _ = attnreg_command("backends").output.partition("ops: all")
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
    for status in attnreg.backends():
        assert re.search(rf"^ *{status.name} .* {'yes' if status.runs_here else 'no'} *$", table, re.MULTILINE)


@pytest.mark.usefixtures("broken_plugin")
def test_backends_shows_a_broken_plugin_with_its_distribution_and_error():
    result = attnreg_command("backends")
    assert result.exit_code == 0
    assert f"oops ({LONG_NAME})\n  broken plug-in: {LONG_ERROR}\n" in result.output
    assert "torch_block" in result.output


def test_backends_tells_which_ops_have_a_backward():
    half = attnreg.Backend(
        name="half",
        capability=attnreg.Capability(dtypes={torch.float32}),
        local_dot_product=torch_block().local_dot_product,
    )
    with attnreg.register(half):
        result = attnreg_command("backends", columns=200)
    assert re.search(r"half +this process +any +float32 +dot_product +none +yes", result.output)


# explain


def test_explain_prints_the_decision_for_the_call_described():
    query = torch.zeros(2, 8, 300, 32, dtype=torch.bfloat16, requires_grad=True)
    key = torch.zeros(2, 4, 320, 32, dtype=torch.bfloat16)
    value = torch.zeros(2, 4, 320, 48, dtype=torch.bfloat16)
    decision = attnreg.explain(query, key, value, attnreg.Window(9, 3), bias=torch.zeros(8, 1, 13).bfloat16())
    options = "--shape 2,8,300,32 --kv-heads 4 --key-length 320 --value-dim 48 --dtype bfloat16 --window 9,3 --bias"
    result = attnreg_command("explain", *options.split(), "--device", "cpu")
    assert result.exit_code == 0
    assert result.output == f"{decision}\n"


def test_explain_lists_every_refusal():
    picky = dataclasses.replace(
        torch_block(), name="picky", capability=attnreg.Capability(dtypes={torch.float16}, window_sizes=range(1, 9))
    )
    with attnreg.register(picky):
        result = attnreg_command("explain", "--device", "cpu", "--causal", "10")
    assert "picky (this process) refused:" in result.output
    assert "- the dtype is float32; it takes float16" in result.output
    assert "- the window's size is 10; it takes 1 to 8" in result.output


@pytest.mark.usefixtures("broken_plugin")
def test_explain_shows_a_broken_plugin():
    assert f"plug-in 'oops' of {LONG_NAME}: {LONG_ERROR}" in attnreg_command("explain", "--device", "cpu").output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--causal 8", "Window(left=7, right=0), W=8"),
        ("--centered 8", "Window(left=4, right=3), W=8"),
        ("--window 0,5", "Window(left=0, right=5), W=6"),
        ("--key-lengths", "; key_lengths;"),
        ("--bias", "; bias (1, 8, 1, 64) float32;"),
        ("--grad", "with gradients"),
        ("--no-grad", "forward only"),
        ("--op local_dot_product --bias", "local_dot_product on cpu"),
        ("--op local_weighted_average --value-dim 5", "local_weighted_average on cpu, float32; N=1 H=8 Hkv=8"),
        ("--dtype float64", "float64"),
        ("--shape 4096,1024,1048576,256", "N=4096 H=1024 Hkv=1024 Lq=1048576"),
    ],
)
def test_explain_describes_the_call_by_its_options(options, expected):
    result = attnreg_command("explain", "--device", "cpu", *options.split())
    assert result.exit_code == 0, result.output
    assert expected in result.output


@without_cuda
def test_explain_of_a_device_that_is_not_there_answers_with_refusals_and_says_so():
    result = attnreg_command("explain", "--device", "cuda")
    assert result.exit_code == 0
    assert re.search(r"cublas_block \(attnreg .*\) refused:\n +- torch has no CUDA device", result.output)
    assert "this machine has no device 'cuda'" in result.output


def test_explain_obeys_the_environment_and_the_option_goes_before_it():
    by_environment = attnreg_command("explain", "--device", "cpu", ATTNREG_BACKEND="torch")
    assert "-> torch: forced by the environment variable ATTNREG_BACKEND" in by_environment.output
    by_option = attnreg_command("explain", "--device", "cpu", "--backend", "torch_block", ATTNREG_BACKEND="torch")
    assert "-> torch_block: forced by the argument backend=" in by_option.output


@pytest.mark.parametrize(
    ("backend", "message"),
    [("nobody", "no backend is called 'nobody'"), ("cublas_block", "the device is cpu; it takes cuda")],
)
@pytest.mark.parametrize("command", ["explain", "demo"])
def test_a_refusal_is_a_message_and_exit_code_1(command, backend, message):
    result = attnreg_command(command, "--device", "cpu", "--backend", backend)
    assert result.exit_code == 1
    assert message in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--op softmax", "'softmax' is not one of local_dot_product, local_weighted_average, local_attention"),
        ("--shape 1,2,3", "expected N,H,LQ,E, 4 integers of at least 0; got '1,2,3'"),
        ("--shape 1,2,three,4", "got '1,2,three,4'"),
        ("--shape 1,2,-3,4", "got '1,2,-3,4'"),
        ("--shape 1,2,3,0", "head_dim must be at least 1"),
        ("--shape 99999999,99999999,99999999,99999999", "overflow"),
        ("--kv-heads 3", "must be a multiple of the number of key/value heads (Hkv = 3)"),
        ("--kv-heads two", "Invalid value for '--kv-heads'"),
        ("--dtype int8", "'int8' is not one of float32, float16, bfloat16, float64"),
        ("--window 4", "expected LEFT,RIGHT"),
        ("--causal 0", "Window.causal: size must be at least 1, got 0"),
        ("--causal 3 --centered 3", "give only one of --causal, --centered and --window"),
        ("--op local_weighted_average --bias", "takes no bias"),
        ("--device toaster", "toaster"),
        ("--wrong", "No such option"),
    ],
)
def test_a_bad_option_is_named_and_exits_with_2(options, message):
    result = attnreg_command("explain", "--device", "cpu", *options.split())
    assert result.exit_code == 2
    assert message in result.output
    assert isinstance(result.exception, SystemExit)


# demo


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    """A text, and the sizes with which the demo takes a second."""
    monkeypatch.setattr("attnreg.cli.demo.DEMO_WINDOWS", (2, 64))
    monkeypatch.setattr("attnreg.cli.demo.DEMO_LENGTH", 64)
    file = tmp_path / "any bytes"
    file.write_bytes(bytes(range(256)) * 8)
    return str(file)


def losses(output: str) -> list[str]:
    return re.findall(r"^ +\d+ +(?:-|\d\.\d+) +\d\.\d+$", output, re.MULTILINE)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_demo_prints_losses_then_a_row_for_each_window_then_a_sentence(small_demo, columns):
    result = attnreg_command("demo", "--device", "cpu", "--text", small_demo, "--steps", "4", columns=columns)
    assert result.exit_code == 0, result.output
    assert len(losses(result.output)) == 5
    for window in (2, 64):
        row = rf"^ *{window} +torch_block +\w+ +[\d.]+ ms +\d\.\de-\d\d +\d\.\de-\d\d *$"
        assert re.search(row, result.output, re.MULTILINE)
    assert re.search(
        r"In 4 steps \(\d+ s\) the held-out loss went from 8\.\d\d to \d\.\d\d bits per byte", result.output
    )
    assert "2 of 2 windows ran on torch_block" in result.output


def test_the_demo_shows_a_window_that_the_forced_backend_refuses(small_demo):
    narrow = dataclasses.replace(
        torch_block(),
        name="narrow",
        capability=attnreg.Capability(dtypes={torch.float32}, window_sizes=range(1, 33)),
    )
    with attnreg.register(narrow):
        result = attnreg_command("demo", "--device", "cpu", "--text", small_demo, "--steps", "1", "--backend", "narrow")
    assert result.exit_code == 0, result.output
    assert "the window's size is 64; it takes 1 to 32" in result.output
    assert "1 of 2 windows ran on narrow" in result.output


def test_the_demo_is_forced_by_option_and_by_environment_and_learns_alike(small_demo):
    def run(*options: str, **environment: str) -> str:
        command = ("demo", "--device", "cpu", "--text", small_demo, "--steps", "2", *options)
        return attnreg_command(*command, **environment).output

    by_option, by_environment = run("--backend", "torch"), run(ATTNREG_BACKEND="torch")
    assert "2 of 2 windows ran on torch," in by_option
    assert "2 of 2 windows ran on torch," in by_environment
    assert losses(by_option) == losses(by_environment)
    assert "forced" in by_option


def test_the_demo_needs_no_file(small_demo, monkeypatch):
    result = attnreg_command("demo", "--device", "cpu", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert f"{len(demo.own_text()) // 10} held out" in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "has 0 bytes"), (b"short", "has 5 bytes, at least 258 are needed")],
)
def test_a_text_that_is_missing_or_too_short_exits_with_2(tmp_path, content, message):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    result = attnreg_command("demo", "--text", str(file))
    assert result.exit_code == 2
    assert message in result.output
    assert isinstance(result.exception, SystemExit)


def test_a_directory_is_no_text(tmp_path):
    result = attnreg_command("demo", "--text", str(tmp_path))
    assert result.exit_code == 2
    assert "is a directory" in result.output


@without_cuda
def test_the_demo_on_a_device_that_is_not_there_exits_with_2():
    result = attnreg_command("demo", "--device", "cuda")
    assert result.exit_code == 2
    assert "cannot put tensors on 'cuda'" in result.output


@pytest.mark.parametrize("options", [("--steps", "0"), ("--seed", "-1"), ("--steps", "many")])
def test_the_demo_refuses_senseless_numbers(options):
    result = attnreg_command("demo", *options)
    assert result.exit_code == 2
    assert options[0] in result.output
