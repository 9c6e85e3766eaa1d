"""The command ``attnreg``, as its users see it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import pytest
import torch
from tabled import table_of
from typer.testing import CliRunner

import attnreg
from attnreg import demo
from attnreg.backend import Fault
from attnreg.cli import app
from attnreg.cli.application import OWN
from attnreg.cli.info import VARIABLES
from attnreg.cli.shared import table_lines, whole
from attnreg.measured import Figure
from attnreg.registry import registry
from attnreg.tables import store
from attnreg.tables.table import Table
from attnreg.tuning import writing

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


def piped(*arguments: str, **environment: str) -> str:
    """What the installed command prints where its output is no terminal and nothing says how wide it is."""
    set_ = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "attnreg", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**set_, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def words(text: str) -> set[str]:
    """The words of a text, whichever way it is broken into lines; no figures."""
    return {word.strip(":,;()") for word in text.split() if word[0].isalpha()}


# Help


def test_without_a_command_the_help_names_every_command():
    result = attnreg_command()
    for command in (*OWN, "bench"):
        assert re.search(rf"^  {command} ", result.output, re.MULTILINE)


def test_python_dash_m_is_the_command_too():
    done = subprocess.run([sys.executable, "-m", "attnreg", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: attnreg [OPTIONS] COMMAND" in done.stdout


def test_the_version_is_told():
    result = attnreg_command("--version")
    assert (result.exit_code, result.output) == (0, f"attnreg {attnreg.__version__}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_names(shell, two_tables, monkeypatch):
    def completed(line: str) -> str:
        asked = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_TYPER_COMPLETE_ARGS": line}
        environment = {"_ATTNREG_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args", **asked}
        return CliRunner().invoke(app, [], prog_name="attnreg", env=environment).output

    assert "explain" in completed("attnreg exp")
    assert "torch_block" in completed("attnreg explain --backend torch_")
    assert "bfloat16" in completed("attnreg explain --dtype b")
    assert "torch_block" in completed("attnreg conform torch_")
    assert "torch_block" in completed("attnreg tune --backend torch_")
    assert "torch_block" in completed("attnreg bench --backend torch_")
    assert "second_derivatives" in completed("attnreg conform torch --property sec")
    own = "an-unusually-long-name-of-a-cpu"
    monkeypatch.setattr(store, "SHIPPED", two_tables / "shipped")
    (two_tables / "shipped").mkdir()
    (two_tables / "shipped" / "anybody.json").write_text("")
    assert own in completed("attnreg tables show an")
    assert own in completed("attnreg tables clear an")
    assert "anybody.json" in completed("attnreg tables show an")
    assert "anybody.json" not in completed("attnreg tables clear an")


def test_nothing_is_imported_before_it_is_needed():
    script = (
        "import sys; from typer.testing import CliRunner; from attnreg.cli import app;"
        "results = [CliRunner().invoke(app, each.split()) for each in"
        "    ('--version', 'backends', 'explain --device cpu', 'info', 'tables list', 'tables show cpu')];"
        "assert not any(each.exit_code for each in results), results;"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert not {"rich", "matplotlib", "numpy.random", "attnreg.tuning", "attnreg.testing"} & imported


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


# Tables


TABLE = (
    ("backend", "dtypes", "ms"),
    [("torch_block", "bfloat16, float16, float32", "1.5"), ("b", "float64", "12.25"), ("c", "", "-")],
)


def test_a_table_has_the_width_that_it_needs():
    assert table_lines(*TABLE, 100, right=("ms",)) == [
        "backend      dtypes                         ms",
        "-----------  --------------------------  -----",
        "torch_block  bfloat16, float16, float32    1.5",
        "b            float64                     12.25",
        "c                                            -",
    ]


def test_a_table_is_broken_between_words():
    assert table_lines(*TABLE, 40, right=("ms",)) == [
        "backend      dtypes                   ms",
        "-----------  --------------------  -----",
        "torch_block  bfloat16, float16,      1.5",
        "             float32",
        "b            float64               12.25",
        "c                                      -",
    ]


def test_a_table_whose_words_do_not_fit_has_a_line_a_cell():
    assert table_lines(*TABLE, 22) == [
        "backend: torch_block",
        "dtypes: bfloat16,",
        "  float16, float32",
        "ms: 1.5",
        "",
        "backend: b",
        "dtypes: float64",
        "ms: 12.25",
        "",
        "backend: c",
        "dtypes:",
        "ms: -",
    ]
    assert "backend: torch_block" in table_lines(*TABLE, 1)[0] or "torch_block" in " ".join(table_lines(*TABLE, 1))


def test_a_table_without_rows_is_its_heading():
    assert table_lines(("W", "ms"), [], 80) == ["W  ms", "-  --"]


def test_what_a_terminal_would_obey_is_shown_as_an_escape():
    assert whole("a\x1b[31m\n\udc80é") == r"a\x1b[31m\n\udc80é"
    assert table_lines(("a\x1b",), [("b\n",)], 80) == [r"a\x1b", "-----", r"b\n"]


def test_what_a_plugin_says_reaches_the_terminal_as_text():
    evil = dataclasses.replace(torch_block(), name="evil", summary="a\x1b[2Jb", unavailable=lambda: "c\x07\nd")
    with attnreg.register(evil):
        for command in (("backends",), ("info",), ("explain", "--device", "cpu"), ("explain", "--backend", "evil")):
            output = attnreg_command(*command).output
            assert not {"\x1b", "\x07"} & set(output)
        assert r"a\x1b[2Jb" in attnreg_command("backends").output


def test_what_cannot_be_encoded_is_shown_as_an_escape(tmp_path):
    table = table_of({"torch": 1.0})
    device = dataclasses.replace(table.environment.device, name="Prozessor für 5 €")
    file = tmp_path / "table.json"
    writing.write(Table(dataclasses.replace(table.environment, device=device), table.rows), file)
    shown = piped("tables", "show", str(file), PYTHONIOENCODING="ascii")
    assert r"measured on Prozessor f\xfcr 5 \u20ac" in shown


@pytest.fixture
def two_tables(folder):
    """The user's own tables: one of this machine, one of another."""
    table = table_of({"torch": 2.0, "torch_block": 1.0})
    (figures,) = table.rows.values()
    (call,) = table.rows
    failed = {**figures, "slow": Figure(reason="ran out of time", measured="2026-01-02T00:00:00+00:00")}
    writing.save(Table(table.environment, {call: failed}))
    elsewhere = dataclasses.replace(table.environment.device, name="An unusually long name of a CPU (and more)")
    writing.save(Table(dataclasses.replace(table.environment, device=elsewhere), table.rows))
    return folder


COMMANDS = (
    ("backends",),
    ("tables", "list"),
    ("tables", "show", "OWN"),
    ("info",),
    ("explain", "--device", "cpu"),
)


@pytest.mark.parametrize("command", COMMANDS, ids="-".join)
@pytest.mark.parametrize("columns", [40, 80])
def test_no_command_breaks_a_word(two_tables, command, columns):
    own = store.load(next(iter(sorted(two_tables.glob("*.json"))))).environment.file_name
    arguments = [own if each == "OWN" else each for each in command]
    wide, narrow = (attnreg_command(*arguments, columns=width) for width in (500, columns))
    assert wide.exit_code == narrow.exit_code == 0, (wide.output, narrow.output)
    assert words(narrow.output) == words(wide.output)
    assert "…" not in narrow.output


@pytest.mark.parametrize("columns", [40, 80])
def test_the_demo_breaks_no_word(small_demo, columns):
    arguments = ("demo", "--device", "cpu", "--text", small_demo, "--steps", "1")
    wide, narrow = (attnreg_command(*arguments, columns=width) for width in (500, columns))
    assert words(narrow.output) == words(wide.output)


def test_a_table_is_as_wide_as_it_needs_where_the_output_is_piped():
    assert re.search(
        r"^torch_block +attnreg \S+ +any +bfloat16, float16, float32, float64 +all +all +yes$", piped("backends"), re.M
    )
    assert re.search(r"^nvidia-h100-80gb-hbm3\.json +shipped +\d+ +[\d-]+ +\S+$", piped("tables", "list"), re.M)
    assert re.search(r"^ *8 +\w+ +[\d.]+ +\w+ [\d.]+x$", piped("tables", "show", "cpu"), re.M)


def on_terminal(columns: int, *arguments: str, code: int = 0, script: str | None = None, piped: bool = False) -> str:
    """What the command prints on a terminal of that width, errors included; with ``piped``, these alone.

    ``script`` is run in place of the command.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "attnreg", *arguments] if script is None else [sys.executable, "-c", script]
    out = subprocess.DEVNULL if piped else theirs
    child = subprocess.Popen(command, stdout=out, stderr=theirs, env=environment)
    os.close(theirs)
    found = b""
    try:
        while chunk := os.read(ours, 65536):
            found += chunk
    except OSError:  # the child has closed its end
        pass
    os.close(ours)
    assert child.wait() == code, found.decode()
    return found.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    "command", [("backends",), ("info",), ("explain", "--device", "cpu"), ("tables", "list")], ids="-".join
)
def test_a_terminal_gets_no_line_that_it_would_break(command):
    shown = on_terminal(80, *command)
    assert max(map(len, shown.splitlines())) <= 80
    assert words(shown) == words(piped(*command))


UNKNOWN = ("explain", "--backend", "nobody_at_all_of_this_name")


@pytest.mark.parametrize(
    "command",
    [UNKNOWN, ("explain", "--op", "softmax"), ("conform", "torch", "--property", "nope"), ("tune", "--window", "none")],
    ids="-".join,
)
@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("piped", [False, True], ids=["shown", "piped"])
def test_a_usage_error_is_broken_between_words_on_a_terminal(command, columns, piped):
    shown = on_terminal(columns, *command, code=2, piped=piped)
    whole_words = attnreg_command(*command, columns=columns)
    assert max(map(len, shown.splitlines())) <= columns
    assert words(shown) == words(whole_words.output)
    assert max(map(len, whole_words.output.splitlines())) > columns


@pytest.mark.parametrize("command", [(), *((name,) for name in OWN), ("bench",), ("tables", "clear")], ids="-".join)
@pytest.mark.parametrize("columns", [36, 40, 80])
def test_help_fits_and_breaks_no_word(command, columns):
    shown = attnreg_command(*command, "--help", columns=columns).output
    assert max(map(len, shown.splitlines())) <= columns
    assert words(shown) == words(attnreg_command(*command, "--help", columns=200).output)
    assert "..." not in shown.partition("Commands:")[2]


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("conform", "attnreg conform [OPTIONS] NAME"),
        ("new-backend", "attnreg new-backend [OPTIONS] DIR"),
        ("tables show", "attnreg tables show [OPTIONS] TABLE"),
        ("tables clear", "attnreg tables clear [OPTIONS] [TABLE]..."),
    ],
)
def test_the_usage_shows_what_is_required_and_what_is_not(command, usage):
    # Some versions of typer write the name in capital letters.
    assert usage.lower() == attnreg_command(*command.split(), "--help").output.splitlines()[0].lower()[len("usage: ") :]


@pytest.mark.parametrize("columns", [40, 80])
def test_what_conform_shows_fits_a_terminal(columns):
    chosen = ("values", "second_derivatives")
    options = [each for name in chosen for each in ("--property", name)]
    shown = on_terminal(columns, "conform", "torch_block", "--quick", "--device", "cpu", *options)
    printed = shown.replace("\x1b[2K", "").replace("\r", "\n")
    lines = [line for line in re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", printed).splitlines() if "/" not in line]
    assert max(map(len, lines)) <= columns
    if columns < 50:
        assert "property: values" in lines
        assert "result: held" in lines
    else:
        assert re.search(r"^values +held +\d+ +[\d.]+$", "\n".join(lines), re.M)


BROKEN_ON_PURPOSE = """
import attnreg
from attnreg.cli import app
from attnreg.testing.mutants import MUTANTS
from attnreg.testing.subject import find

with attnreg.register(MUTANTS["bias_before_scaling"].of(find("torch_block")[0])):
    app(["conform", "mutant.bias_before_scaling", "--quick", "--device", "cpu", "--property", "bias"])
"""


def test_the_python_that_conform_shows_is_code_on_a_narrow_terminal():
    shown = on_terminal(40, script=BROKEN_ON_PURPOSE, code=1)
    (code,) = re.findall(r"^(    import torch\n.*?^    check_case\(.*?\)\n)", shown, re.M | re.S)
    compile(textwrap.dedent(code), "shown", "exec")
    assert max(map(len, code.splitlines())) > 40


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("values",), r"^1 property held, 0 broken, 0 do not apply; \d+ calls in "),
        (("values", "cuda_graph"), r"^1 property held, 0 broken, 1 does not apply; "),
        (("values", "described", "cuda_graph", "side_stream"), r"^2 properties held, 0 broken, 2 do not apply; "),
    ],
)
def test_conform_counts_in_english(options, told):
    chosen = [each for name in options for each in ("--property", name)]
    result = attnreg_command("conform", "torch_block", "--quick", "--device", "cpu", *chosen)
    assert re.search(told, result.output, re.M), result.output


def test_conform_lists_the_properties_in_order_where_one_is_unknown():
    result = attnreg_command("conform", "torch", "--device", "cpu", "--property", "valeus")
    assert result.exit_code == 2
    assert "--property: no property is called 'valeus' (did you mean 'values'?); there are " in result.output
    listed = re.findall(r"\w+", result.output.partition("there are ")[2])
    assert listed == sorted(listed)
    assert "values" in listed


def test_a_table_on_a_terminal_is_no_wider_than_that():
    table, _, _ = on_terminal(80, "backends").partition("ops: all")
    assert 60 < max(map(len, table.splitlines())) <= 80
    assert words(table) == words(piped("backends").partition("ops: all")[0])


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
    assert f"\nfrom: {LONG_NAME}\n" in result.output
    assert "torch_block" in result.output


@pytest.mark.usefixtures("broken_plugin")
def test_backends_as_json():
    found = {each["name"]: each for each in json.loads(attnreg_command("backends", "--json").output)}
    assert found["torch_block"]["runs_here"] is True
    assert found["torch_block"]["dtypes"] == ["bfloat16", "float16", "float32", "float64"]
    assert found["torch_block"]["devices"] is None
    assert found["torch_block"]["backward_ops"] == list(attnreg.op.OPS)
    assert "bias" in found["torch_block"]["takes"]["local_attention"]
    assert found["cublas_block"]["options"] == ["block", "workspace"]
    assert found["oops"]["reason"] == f"broken plug-in: {LONG_ERROR}"


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


def test_explain_as_json():
    result = attnreg_command("explain", "--device", "cpu", "--causal", "9", "--backend", "torch", "--json")
    found = json.loads(result.output)
    assert found["call"]["window"] == [8, 0]
    assert found["call"]["device"] == "cpu"
    assert (found["backend"], found["source"]) == ("torch", "forced")
    refused = {each["name"]: each["refusals"] for each in found["candidates"]}
    assert refused["torch_block"] == []
    assert "the device is cpu; it takes cuda" in refused["cublas_block"]


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
        ("--with sinks,softcap", "; softcap; sinks (8,) float32;"),
        ("--with sinks --with softcap --bias", "; bias (1, 8, 1, 64) float32; softcap; sinks (8,) float32;"),
        ("--with dropout_p", "; dropout_p; seed;"),
        ("--with cu_seqlens_k", "; cu_seqlens_q; cu_seqlens_k;"),
        ("--with key_starts,query_starts --key-lengths", "; key_lengths; key_starts; query_starts;"),
        ("--with grad_log_sum_exp", "; grad_log_sum_exp; with gradients"),
        ("--with none", "W=64; with gradients"),
        ("--op local_dot_product --with cu_seqlens_q", "; cu_seqlens_q;"),
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
    assert "-> torch_block: forced by --backend" in by_option.output


@pytest.mark.parametrize("json_option", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize("backend", ["torch", "torch; hafl; -flxe", "-torch"])
def test_explain_calls_its_option_by_its_name(backend, json_option):
    output = attnreg_command("explain", "--device", "cpu", "--backend", backend, *json_option).output
    assert "by --backend" in output
    assert "argument" not in output


@pytest.mark.parametrize("command", ["explain", "demo"])
def test_a_refusal_is_a_message_and_exit_code_1(command):
    result = attnreg_command(command, "--device", "cpu", "--backend", "cublas_block")
    assert result.exit_code == 1
    assert "the device is cpu; it takes cuda" in result.output
    assert "asked for by --backend" in result.output
    assert isinstance(result.exception, SystemExit)


REGISTERED = "; registered: attnreg_cpu, cublas_block, "


@pytest.mark.parametrize("command", ["explain", "demo", "tune", "bench", "conform"])
def test_an_unknown_backend_is_a_usage_error_everywhere(command):
    given = ("nobody",) if command == "conform" else ("--backend", "nobody")
    result = attnreg_command(command, "--device", "cpu", *given)
    assert result.exit_code == 2
    assert f"{'NAME' if command == 'conform' else '--backend'}: no backend is called 'nobody'" in result.stderr
    assert REGISTERED in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("torc", f"no backend is called 'torc' (did you mean 'torch'?){REGISTERED}"),
        ("", "no backend is called ''"),
        ("torch:foo=1", "torch:foo=1: it has no option 'foo'; it has none"),
        ("torch:foo", "a backend is asked for as NAME or NAME:OPTION=VALUE,..., got 'torch:foo'"),
        ("torch;", "a name is missing in 'torch;'"),
        ("nobody; nobody_else", "no backend is called 'nobody_else'"),
    ],
)
def test_what_no_backend_can_be_asked_for_by_is_told_by_who_asks(backend, message):
    for hint, result in (
        ("--backend: ", attnreg_command("explain", "--device", "cpu", "--backend", backend)),
        (
            "the environment variable ATTNREG_BACKEND: ",
            attnreg_command("explain", "--device", "cpu", ATTNREG_BACKEND=backend or "-"),
        ),
    ):
        assert result.exit_code == 2
        assert hint in result.stderr
        assert message in result.stderr or not backend
        assert "?;" not in result.stderr


def test_explain_says_once_that_a_table_is_not_used(tmp_path):
    command = [sys.executable, "-m", "attnreg", "explain", "--device", "cpu"]
    environment = {**os.environ, "ATTNREG_TABLE": str(tmp_path / "nope.json")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("is not used: ") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--op softmax", "'softmax' is not one of local_dot_product, local_weighted_average, local_attention"),
        ("--shape 1,2,3", "expected N,H,LQ,E, 4 integers of at least 0; got '1,2,3'"),
        ("--shape 1,2,three,4", "got '1,2,three,4'"),
        ("--shape 1,2,-3,4", "got '1,2,-3,4'"),
        ("--shape 1,2,3,0", "--shape: query: head_dim must be at least 1, got shape (1, 2, 3, 0)"),
        (
            "--shape 99999999,99999999,99999999,99999999",
            "expected tensors of less than 2**63 bytes; got sizes N=99999999",
        ),
        (
            "--value-dim 9223372036854775808",
            "less than 2**63 bytes; got sizes N=1, H=8, G=8, Q=4096, K=4096, E=64, D=922",
        ),
        ("--kv-heads 3", "--kv-heads: the heads of the query, H of --shape, must be a multiple of"),
        ("--kv-heads 3", "got H=8, HKV=3"),
        ("--kv-heads 0", "'--kv-heads': expected an integer of at least 1; got '0'"),
        ("--key-length -1", "'--key-length': expected an integer of at least 0; got '-1'"),
        ("--kv-heads two", "Invalid value for '--kv-heads'"),
        ("--dtype int8", "'int8' is not one of float32, float16, bfloat16, float64"),
        ("--window 4", "expected LEFT,RIGHT"),
        (
            "--window 0,9223372036854775808",
            "--window: Window: right must be at most 2**62 - 1, got 9223372036854775808",
        ),
        ("--causal 0", "'--causal': expected an integer from 1 to 4611686018427387903; got '0'"),
        ("--centered none", "'--centered': expected an integer from 1 to 4611686018427387903; got 'none'"),
        ("--causal 3 --centered 3", "give only one of --causal, --centered and --window"),
        ("--op local_weighted_average --bias", "--bias: local_weighted_average takes no bias"),
        ("--op local_dot_product --with sinks", "--with: local_dot_product takes no sinks"),
        ("--with sink", "--with: 'sink' is not one of bias, key_lengths, "),
        ("--with sink", "(did you mean 'sinks'?)"),
        ("--with ,", "--with: '' is not one of bias"),
        ("--with cu_seqlens_q --key-lengths", "--with: cu_seqlens_q and key_lengths cannot be given together"),
        ("--with cu_seqlens_q --shape 2,8,64,64", "--with: with cu_seqlens_q, the batch size is 1; got 2"),
        ("--with grad_log_sum_exp --no-grad", "--with: grad_log_sum_exp comes in where gradients are needed alone"),
        ("--device toaster", "toaster"),
        ("--wrong", "No such option"),
    ],
)
def test_a_bad_option_is_named_and_exits_with_2(options, message):
    result = attnreg_command("explain", "--device", "cpu", *options.split())
    assert result.exit_code == 2
    assert message in result.output
    assert isinstance(result.exception, SystemExit)


# info


def test_info_tells_what_a_report_needs(two_tables):
    result = attnreg_command("info", ATTNREG_BACKEND="torch", ATTNREG_BACKENDS="typing error")
    assert result.exit_code == 0, result.output
    own = table_of({"torch": 1.0}).environment
    for line in (
        f"attnreg {attnreg.__version__}, in {Path(attnreg.__file__).parent}",
        f"torch {torch.__version__}",
        f"  cpu: {own.device}, ",
        "  torch_block (attnreg ",
        "cache folder ",
        f"  {own.file_name}, yours, for cpu: 1 calls, 2026-01-02, ",
        "  ATTNREG_BACKEND=torch\n",
        "  ATTNREG_BACKENDS=typing error  (attnreg reads no such variable)\n",
        "  not set: ",
    ):
        assert line in result.output


def test_info_as_json(two_tables):
    found = json.loads(attnreg_command("info", "--json", ATTNREG_AUTOTUNE="1").output)
    assert found["versions"]["attnreg"] == attnreg.__version__
    assert {"pluggy", "typer", "torch"} <= set(found["versions"])
    assert not {"pytest", "ruff", "sphinx"} & set(found["versions"])
    assert found["devices"][0]["threads"] == torch.get_num_threads()
    assert [(each["whose"], each["calls"], each["measured"]) for each in found["tables"]] == [
        ("yours", 1, "2026-01-02")
    ]
    assert found["tables"][0]["days"] >= 0
    assert found["autotune"] is True
    assert found["environment"]["ATTNREG_AUTOTUNE"] == "1"


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        (
            "ATTNREG_AUTOTUNE",
            "maybe",
            "autotune cannot be told: the environment variable ATTNREG_AUTOTUNE must be 1 or 0",
        ),
        ("ATTNREG_TABLE", "/nowhere/nope.json", "nope.json is not used: it cannot be read"),
        ("ATTNREG_TABLE", "/", "is not used: it cannot be read: Is a directory"),
        ("ATTNREG_TABLE", "~no_such_user/x", "x is not used: "),
        ("ATTNREG_CACHE_DIR", "~no_such_user/x", "cache folder none: ATTNREG_CACHE_DIR is '~no_such_user/x'"),
        ("ATTNREG_CACHE_DIR", "/dev/null/x", "cache folder /dev/null/x: nothing can be written to /dev/null"),
        ("ATTNREG_CACHE_DIR", "x" * 5000, "xxx: File name too long"),
        ("ATTNREG_BACKEND", "nope", "ATTNREG_BACKEND is of no use: no backend is called 'nope'; registered: "),
        ("ATTNREG_BACKEND", "a:b;;", "ATTNREG_BACKEND is of no use: a name is missing in 'a:b;;'"),
        ("ATTNREG_NONSENSE", "\udcff", "  (attnreg reads no such variable)"),
    ],
)
def test_info_survives_a_broken_variable(variable, value, told):
    result = attnreg_command("info", **{variable: value})
    assert result.exit_code == 0, result.exception
    assert told in result.output
    for section in ("devices", "backends", "tables in use", "environment variables"):
        assert f"\n{section}\n" in result.output
    as_json = attnreg_command("info", "--json", **{variable: value})
    assert as_json.exit_code == 0
    found = json.loads(as_json.output)
    assert found["devices"]
    assert found["backends"]
    if variable == "ATTNREG_AUTOTUNE":
        assert found["autotune"] is None
        assert "got 'maybe'" in found["problems"]["autotune"]


@pytest.mark.parametrize(
    ("section", "function"),
    [
        ("devices", "_device"),
        ("backends", "_backends"),
        ("versions", "_versions"),
        ("tables", "tables_in_use"),
        ("driver", "driver"),
        ("cache", "_cache"),
    ],
)
def test_a_section_of_info_that_fails_says_why_and_costs_only_itself(monkeypatch, section, function):
    def fail(*_):
        raise RuntimeError("out of order")

    before = json.loads(attnreg_command("info", "--json").output)
    monkeypatch.setattr(f"attnreg.cli.info.{function}", fail)
    result = attnreg_command("info")
    assert result.exit_code == 0, result.exception
    assert "RuntimeError: out of order" in result.output
    found = json.loads(attnreg_command("info", "--json").output)
    assert found["problems"] == {section: "RuntimeError: out of order"}
    assert {name for name in found if found[name] != before[name]} <= {section, "problems", "table_problems"}


def test_info_tells_every_variable_that_is_read():
    read = set()
    for package in ("attnreg", "attnreg_torch", "attnreg_triton", "attnreg_cublas", "attnreg_cpu", "attnreg_adapters"):
        for file in Path(__import__(package).__file__).parent.rglob("*.py"):
            read |= set(re.findall(r"(?:environ|variables)(?:\.get\(|\[)b?[\"']([A-Z_0-9]+)", file.read_text()))
    assert read >= {"ATTNREG_TABLE", "ATTNREG_CACHE_DIR"}
    assert read <= set(VARIABLES)


@pytest.mark.parametrize("command", ["info", "tables list", "tables clear", "backends", "explain --device cpu"])
def test_commands_work_without_a_home(command):
    nobody = "def nobody(*_): raise KeyError\nimport pwd; pwd.getpwuid = pwd.getpwnam = nobody\n"
    script = f"{nobody}from attnreg.cli import app; app({command.split()})"
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if command == "info":
        assert "cache folder none: there is no home directory" in done.stdout


# tables


def test_tables_are_listed_with_whose_they_are_and_whether_they_are_used(two_tables, monkeypatch):
    (two_tables / "broken.json").write_text("no table")
    output = attnreg_command("tables", "list", columns=200).output
    own = table_of({"torch": 1.0}).environment.file_name
    assert re.search(rf"^{re.escape(own)} +yours +1 +2026-01-02 +cpu$", output, re.M)
    assert re.search(r"^an-unusually-long-name-of-a-cpu-and-more-\w+\.json +yours +1 +2026-01-01 +no$", output, re.M)
    assert re.search(r"^broken\.json +yours +- +- +no$", output, re.M)
    assert "the table broken.json is not used: it is not JSON" in output
    assert f"yours lie in {two_tables}" in output
    monkeypatch.setenv("ATTNREG_TABLE", str(two_tables / own))
    assert re.search(rf"^{re.escape(own)} +pinned +1 ", attnreg_command("tables", "list", columns=200).output, re.M)


def test_a_table_is_shown_by_its_name_or_as_a_file(two_tables, tmp_path):
    own = two_tables / table_of({"torch": 1.0}).environment.file_name
    shown = attnreg_command("tables", "show", own.stem).output
    assert f"measured on {table_of({'torch': 1.0}).environment.device}\n" in shown
    assert re.search(r"^8 +torch_block +1000 +torch 2\.00x$", shown, re.M)
    assert "\nnot timed: slow, W=8: ran out of time\n" in shown
    assert attnreg_command("tables", "show", own.name).output == shown
    copied = tmp_path / "copied"
    copied.write_text(own.read_text())
    assert attnreg_command("tables", "show", str(copied)).output == shown
    nobody = attnreg_command("tables", "show", "nobody")
    assert nobody.exit_code == 2
    listed = nobody.output.partition("no table is called 'nobody'; there are ")[2]
    assert own.name in listed
    assert "an-unusually-long" in listed
    copied.write_text("no table")
    broken = attnreg_command("tables", "show", str(copied))
    assert broken.exit_code == 1
    assert f"Error: {copied}: it is not JSON" in broken.output


def test_what_a_table_says_of_itself_does_not_reach_the_terminal_as_it_is(two_tables):
    own = two_tables / table_of({"torch": 1.0}).environment.file_name
    own.write_text(own.read_text().replace('"torch_block"', '"torch\\u001b[2J"'))
    for command in (("tables", "show", own.name), ("tables", "list"), ("info",)):
        assert "\x1b" not in attnreg_command(*command).output
    assert r"torch\x1b[2J" in attnreg_command("tables", "show", own.name).output


def test_tables_are_cleared_after_asking(two_tables):
    def clear(*options: str, answer: str | None = None):
        return CliRunner().invoke(app, ["tables", "clear", *options], input=answer)

    before = sorted(two_tables.glob("*.json"))
    (two_tables / ".hidden.json").write_text("")
    for answer in ("n\n", "", None):
        kept = clear(answer=answer)
        assert kept.exit_code == 1
        assert all(str(path) in kept.output for path in before)
        assert sorted(two_tables.glob("*.json"))[-2:] == before
    assert clear("nobody", "--yes").exit_code == 2
    assert clear(before[0].stem, "--yes").output == f"{before[0]}\ndeleted: 1\n"
    assert not before[0].exists()
    assert before[1].exists()
    assert clear(answer="y\n").exit_code == 0
    assert list(two_tables.glob("[!.]*.json")) == []
    assert clear().output == "there is no table of yours\n"


def test_only_the_users_own_tables_are_cleared(two_tables, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped" / "shipped.json"
    shipped.parent.mkdir()
    pinned = tmp_path / "pinned.json"
    for path in (shipped, pinned):
        writing.write(table_of({"torch": 1.0}), path)
    monkeypatch.setenv("ATTNREG_TABLE", str(pinned))
    monkeypatch.setattr(store, "SHIPPED", shipped.parent)
    for name, told in (
        ("shipped", "shipped.json ships with attnreg and cannot be cleared; yours: "),
        ("shipped.json", "shipped.json ships with attnreg and cannot be cleared; yours: "),
        ("pinned", "pinned.json is pinned by ATTNREG_TABLE and cannot be cleared; yours: "),
        ("nobody", "no table of yours is called 'nobody'; yours: "),
    ):
        refused = attnreg_command("tables", "clear", name)
        assert refused.exit_code == 2
        assert told in refused.stderr
    assert attnreg_command("tables", "clear", "--yes").exit_code == 0
    assert shipped.exists()
    assert pinned.exists()
    assert "cannot be cleared; you have no tables" in attnreg_command("tables", "clear", "shipped").stderr


# new-backend


def installed(folder: Path) -> dict[str, str]:
    """The environment in which a plug-in's folder counts as installed: on the path, with its entry point beside it."""
    settings = (folder / "pyproject.toml").read_text()
    (distribution,) = re.findall(r'^name = "(.*)"$', settings, re.M)
    (entry_point,) = re.findall(r'^(\S+ = "attnreg_\S+")$', settings, re.M)
    info = folder / f"{distribution.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[attnreg]\n" + entry_point.replace('"', "") + "\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))}


def test_new_backend_writes_a_plugin_that_runs(tmp_path):
    folder = tmp_path / "attnreg-by-hand"
    result = attnreg_command("new-backend", str(folder))
    assert result.exit_code == 0, result.output
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"pyproject.toml", "attnreg_by_hand.py", "tests/test_attnreg_by_hand.py", "README.md"}
    script = """
import attnreg, torch
query = torch.randn(2, 4, 50, 8, requires_grad=True)
key, value = torch.randn(2, 2, 2, 50, 8)
window = attnreg.Window(5, 3)
given = dict(bias=torch.randn(4, 1, 9), key_lengths=torch.tensor([50, 20]))
outputs = [attnreg.local_attention(query, key, value, window, backend=name, **given) for name in ("by-hand", "torch")]
upstream = torch.randn_like(outputs[0])
gradients = [torch.autograd.grad(output, query, upstream)[0] for output in outputs]
for one, other in (outputs, gradients):
    torch.testing.assert_close(one, other)
print(attnreg.explain(query, key, value, window, backend="by-hand").backend)
"""
    environment = installed(folder)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout == "by-hand\n", done.stderr
    own_tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "memory_order or key_lengths"]
    done = subprocess.run(own_tests, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d{2,} passed", done.stdout, re.MULTILINE)


def test_what_new_backend_writes_is_formatted(tmp_path):
    folder = tmp_path / "x"
    assert attnreg_command("new-backend", str(folder), "--name", "a_name").exit_code == 0
    for command in (["check", "--select", "E,F,I,UP,B,RUF,D", "--ignore", "D203,D213,D205"], ["format", "--check"]):
        # As an author has it, outside of this repository and by ruff's defaults.
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache", "--target-version", "py310", "."]
        done = subprocess.run(ruff, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stdout


def test_new_backend_takes_its_name_from_the_folder_or_the_option(tmp_path):
    for folder, options, expected in (
        ("attnreg_mine", (), 'mine = "attnreg_mine"'),
        ("mine-2", (), 'mine-2 = "attnreg_mine_2"'),
        ("Anything at all", ("--name", "his_own"), 'his_own = "attnreg_his_own"'),
    ):
        result = attnreg_command("new-backend", str(tmp_path / folder), *options)
        assert result.exit_code == 0, result.output
        assert expected in (tmp_path / folder / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("Upper",), "got 'Upper'"),
        (("x", "--name", "1x"), "got '1x'"),
        (("x", "--name", "../x"), "got '../x'"),
        (("x", "--name", ""), "got ''"),
        (("x", "--name", "torch_block"), "the name 'torch_block' is taken by attnreg "),
        (("x", "--name", "benchmarks"), "there is a module 'attnreg_benchmarks' already"),
        (("full",), "is not empty"),
    ],
)
def test_new_backend_refuses_what_would_not_work(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    result = attnreg_command("new-backend", *options, columns=200)
    assert result.exit_code == 2
    assert message in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_new_backend_tells_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = attnreg_command("new-backend", str(tmp_path / "file"), "--name", "mine")
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "Not a directory" in result.output


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


@pytest.mark.usefixtures("torch_alone")
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


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--steps", "0", "an integer of at least 1"),
        ("--steps", "many", "an integer of at least 1"),
        ("--seed", "-1", "an integer from 0 to 9223372036854775807"),
        ("--seed", str(2**63), "an integer from 0 to 9223372036854775807"),
    ],
)
def test_the_demo_refuses_senseless_numbers(option, value, told):
    result = attnreg_command("demo", option, value)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}': expected {told}; got '{value}'" in result.stderr


def test_the_demo_says_what_is_wrong_with_a_variable_before_it_trains():
    result = attnreg_command("demo", "--device", "cpu", ATTNREG_AUTOTUNE="maybe")
    assert result.exit_code == 2
    assert "the environment variable ATTNREG_AUTOTUNE must be 1 or 0" in result.stderr
    assert "got 'maybe'" in result.stderr
    assert result.stdout == ""
