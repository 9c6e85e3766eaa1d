"""The regret benchmark: how much longer the chosen backend takes than the best candidate."""

from __future__ import annotations

import json
import signal
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attnreg_benchmarks import regret
from attnreg_benchmarks.peers.blocks import BLOCKS
from attnreg_benchmarks.peers.seed import SEED
from typer.testing import CliRunner

import attnreg
from attnreg import Window
from attnreg.measured import Figure
from attnreg.measuring.sizes import square_problem
from attnreg.measuring.timing import Timing
from attnreg.op import OPS
from attnreg.tables import store
from attnreg.tables.environment import environment
from attnreg.tables.table import Table
from attnreg.tuning.tune import Step, grid

SHIPPED = sorted(store.SHIPPED.glob("*.json"))  # before the tests are kept from them
RECORDED = sorted((Path(regret.__file__).parents[1] / "results").glob("*/*-regret.json"))
CPU = torch.device("cpu")
SMALL = {"batch": 1, "windows": (4,), "head_dims": (8,), "lengths": (64,), "heads": ((2, 1),)}


@pytest.fixture
def measured(monkeypatch):
    """What the candidates of the tasks are found to take, turn by turn; "slow" is chosen by its rank."""
    (block,) = (status.backend for status in attnreg.backends() if status.name == "torch_block")
    turns = []

    def measure_all(problems, **options):
        found = turns.pop(0)
        for problem in problems:
            # Where the wider window is measured, something else uses the device.
            copying = 2.0 if problem.window.size == 8 else 1.0
            for name, seconds in found.items():
                yield Step(problem, name, Figure(seconds=seconds), copying, 1, 1)

    monkeypatch.setattr(regret, "measure_all", measure_all)
    with attnreg.register(replace(block, name="slow", rank=1)):
        yield turns


def regrets(repeat, **sizes):
    options = {"ops": ["local_attention"], "dtypes": [torch.float32], "gradients": (False,)}
    problems = grid(device=CPU, **{**options, **SMALL, **sizes})
    return regret.regrets(problems, None, 0.01, repeat)


def test_the_regret_is_the_time_of_the_choice_over_the_best_and_the_least_of_all_turns_counts(measured):
    measured += [{"slow": 4.0, "torch_block": 2.0}, {"slow": 3.0, "torch_block": 2.5}]
    (found,) = regrets(repeat=2)
    assert (found.chosen, found.best, found.regret) == ("slow", "torch_block", 1.5)


def test_what_a_user_would_write_instead_counts_as_well(measured, monkeypatch):
    measured += [{"slow": 4.0, "torch_block": 2.0}]
    monkeypatch.setattr(regret, "clock", lambda stage, peer, direction, seconds: Timing(1.0, 0.0, 1, "clock"))
    problems = grid(device=CPU, ops=["local_attention"], dtypes=[torch.float32], gradients=(True,), **SMALL)
    (found,) = regret.regrets(problems, None, 0.01, 1, [BLOCKS, SEED])
    # Forward and backward; the seed's design is no attention.
    assert found.seconds == {"sdpa-blocks": 2.0, "slow": 4.0, "torch_block": 2.0}
    assert found.regret == 2.0


def test_what_was_measured_while_something_else_used_the_device_is_marked(measured):
    measured += [{"slow": 2.0, "torch_block": 1.0}]
    found = regrets(repeat=1, windows=(4, 8))
    assert [each.disturbed for each in found] == [False, True]


def test_a_choice_that_was_not_measured_is_an_error(measured):
    measured += [{"torch": 1.0, "torch_block": 2.0}]
    with pytest.raises(RuntimeError, match="slow was chosen and has no time: it was not measured"):
        regrets(repeat=1)


@pytest.mark.usefixtures("torch_alone")
def test_the_command_stores_every_call_and_a_summary_of_every_op(tmp_path, monkeypatch):
    monkeypatch.setitem(regret.GRIDS, "cpu", ({name: value for name, value in SMALL.items() if name != "batch"},))
    file = tmp_path / "regret.json"
    app = regret.typer.Typer()
    app.command()(regret.main)
    result = CliRunner().invoke(app, ["--json", str(file), "--dtype", "float32", "--seconds", "0.01"])
    assert result.exit_code == 0, result.output
    stored = json.loads(file.read_text())
    assert len(stored["regrets"]) == 2 * len(OPS)
    assert all(each["regret"] >= 1 for each in stored["regrets"])
    worst = max(each["regret"] for each in stored["regrets"])
    assert stored["summary"]["all"]["worst"] == worst
    assert set(stored["summary"]) == {
        "all",
        *(f"{op}, {way}" for op in OPS for way in ("forward", "forward and backward")),
    }


def test_an_entry_that_is_left_out_is_chosen_for_by_the_others():
    calls = [
        square_problem("local_attention", CPU, torch.float32, (1, 4, 4, 64, 8), Window.causal(size))
        for size in (2, 8, 32, 4)
    ]
    seconds = [
        {"torch": 1.0, "torch_block": 2.0},
        {"torch": 1.0, "torch_block": 3.0},
        {"torch": 2.0, "torch_block": 1.0},
    ]
    rows = {call: {name: Figure(seconds=t) for name, t in each.items()} for call, each in zip(calls, seconds)}
    alone = {calls[3]: {"torch": Figure(seconds=1.0)}}
    here = environment(CPU, ())
    found = regret.left_out(Table(here, {**rows, **alone}))
    assert [(each.chosen, each.best, each.regret) for each in found] == [
        ("torch", "torch", 1.0),
        ("torch", "torch", 1.0),
        ("torch", "torch_block", 2.0),
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_entries_of_a_shipped_table_speak_for_each_other(path):
    found = regret.left_out(store.load(path))
    assert len(found) > 50
    assert regret.summarize(found)["all"]["geometric_mean"] < 1.03


@pytest.fixture
def shipped(monkeypatch):
    """The real shipped tables, which other tests are kept from."""
    monkeypatch.setattr(regret, "SHIPPED", SHIPPED[0].parent)


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_shipped_tables_choose_nearly_the_best_for_calls_that_were_measured_between_their_entries(path):
    content = json.loads(path.read_text())
    found = regret.again(content["regrets"], regret.shipped_for(content["environment"]["device"]))
    summary = regret.summarize(found)
    assert len(summary) == 1 + 2 * len(OPS)
    assert all(group["geometric_mean"] <= 1.03 and group["worst"] <= 1.15 for group in summary.values())


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if path.stem.startswith("nvidia")], ids=lambda path: path.stem
)
def test_where_nothing_was_measured_ranks_choose_as_a_gpus_table_would(path):
    ratios = []
    for call, figures in store.load(path).rows.items():
        times = {name: figure.seconds for name, figure in figures.items() if figure.seconds}
        decision = regret._choice(call, times)
        ratios.append(times[decision.backend] / min(times.values()))
    assert statistics.geometric_mean(ratios) < 1.01
    assert max(ratios) < 1.25


def unboxed(output):
    """What a message in a box says, wherever the length of a path breaks its lines."""
    return " ".join(output.replace("│", " ").split())


def test_the_command_judges_a_table_without_measuring(tmp_path):
    file, table = tmp_path / "regret.json", next(path for path in SHIPPED if path.stem == "cpu")
    app = regret.typer.Typer()
    app.command()(regret.main)
    result = CliRunner().invoke(app, ["--json", str(file), "--left-out", str(table)])
    assert result.exit_code == 0, result.output
    stored = json.loads(file.read_text())
    assert stored["environment"]["device"]["name"] == store.load(table).environment.device.name
    assert stored["summary"]["all"]["calls"] == len(stored["regrets"]) > 50


def test_the_command_says_what_is_wrong_with_a_table(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    app = regret.typer.Typer()
    app.command()(regret.main)
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "y.json"), "--left-out", str(tmp_path / "x.json")])
    assert result.exit_code == 2
    assert "it is no table of attnreg" in unboxed(result.output)


@pytest.mark.usefixtures("shipped")
def test_the_command_chooses_anew_for_an_earlier_run(tmp_path):
    file, earlier = tmp_path / "regret.json", RECORDED[0]
    app = regret.typer.Typer()
    app.command()(regret.main)
    result = CliRunner().invoke(app, ["--json", str(file), "--again", str(earlier)])
    assert result.exit_code == 0, result.output
    before, after = json.loads(earlier.read_text()), json.loads(file.read_text())
    assert (after["date"], after["environment"]) == (before["date"], before["environment"])
    # Peers were measured as well; no table can choose them.
    names = {each.name for each in attnreg.backends()}
    for now, then in zip(after["regrets"], before["regrets"], strict=True):
        assert now["seconds"] == {name: seconds for name, seconds in then["seconds"].items() if name in names}


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "KeyError: 'date'"),
        ({"date": "", "environment": {"device": "abacus"}, "regrets": []}, "no table is shipped for 'abacus'"),
        (
            {
                "date": "",
                "environment": {"device": "NVIDIA H200"},
                "regrets": [{"call": "x", "gradients": True, "seconds": {}}],
            },
            "its call 'x' is none of today's grid",
        ),
    ],
)
def test_the_command_says_what_is_wrong_with_an_earlier_run(tmp_path, content, expected):
    (tmp_path / "x.json").write_text(json.dumps(content))
    app = regret.typer.Typer()
    app.command()(regret.main)
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "y.json"), "--again", str(tmp_path / "x.json")])
    assert result.exit_code == 2
    assert expected in unboxed(result.output)


def test_a_terminated_run_ends_as_an_interrupted_one():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), regret._terminated_as_interrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("device", regret.GRIDS)
def test_nothing_in_the_grid_is_a_size_of_a_shipped_table(device):
    tables = [table for table in map(store.load, SHIPPED) if table.environment.device.type == device]
    assert tables
    for table in tables:
        for part in regret.GRIDS[device]:
            assert not {call.window.size for call in table.rows} & set(part["windows"])
            assert not {call.key_length for call in table.rows} & set(part["lengths"])
            assert not {call.head_dim or call.value_dim for call in table.rows} & set(part["head_dims"])
