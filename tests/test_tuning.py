"""Tables of measured times: what they hold, which entry serves a call, and how they are measured, kept and shown."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

import attnreg
from attnreg import Backend, Capability, Window
from attnreg.backend import Entry
from attnreg.cli import app
from attnreg.dispatch import TIE, choose
from attnreg.measured import Figure, Measured
from attnreg.measuring import steadiness
from attnreg.measuring.timing import cache_bytes
from attnreg.op import OPS
from attnreg.problem import Given, Problem
from attnreg.registry import registry
from attnreg.tables import store
from attnreg.tables.call import as_measured, call_from_json, call_to_json
from attnreg.tables.environment import Device, Environment, environment
from attnreg.tables.lookup import FAR, MOST_ENTRIES, NEAR, Stored, distance, measured, same_class
from attnreg.tables.table import Table, TableError, TableText, from_json, to_json
from attnreg.testing import oracle
from attnreg.tuning import command, writing
from attnreg.tuning.candidate import Measurement
from attnreg.tuning.worker import Worker

CPU = torch.device("cpu")
SHIPPED = sorted(store.SHIPPED.glob("*.json"))  # before the tests are kept from them
SMALL = {"ops": ["local_attention"], "dtypes": [torch.float32], "head_dims": [8], "lengths": [64], "heads": [(2, 1)]}


def problem(window=8, length=64, head_dim=8, heads=2, kv_heads=1, dtype=torch.float32, grad=False, **changes):
    plain = Problem(
        op="local_attention",
        device=CPU,
        dtype=dtype,
        batch=1,
        heads=heads,
        kv_heads=kv_heads,
        query_length=length,
        key_length=length,
        head_dim=head_dim,
        value_dim=head_dim,
        window=Window.causal(window),
        needs_grad=grad,
    )
    return replace(plain, **changes)


def call(window=8, length=64, **options):
    query, key = torch.ones(1, 2, length, 8), torch.ones(1, 1, length, 8)
    return attnreg.local_attention(query, key, key, Window.causal(window), **options)


BIAS = (("bias", Given((1, 2, 1, 8), torch.float32)),)
HARDLY_A_BIAS = (("bias", Given((1, 1, 1, 1), torch.float32)),)
LENGTHS = (("key_lengths", Given((1,), torch.int64)),)
SCALE = (("scale", Given()),)


def here():
    return environment(CPU, registry.entries)


def table_of(times, **sizes):
    figures = {
        name: Figure(seconds=time, spread=time / 1000, measured="2026-01-01T00:00:00+00:00")
        for name, time in times.items()
    }
    return Table(here(), {as_measured(problem(**sizes)): figures})


def as_torch_block(name, **changes):
    (block,) = (entry.backend for entry in registry.entries if entry.backend.name == "torch_block")
    return replace(block, name=name, **changes)


@pytest.fixture
def folder(tmp_path, monkeypatch, no_interpreter):
    """The user's tables lie here, and none is shipped."""
    monkeypatch.setattr(store, "table_dir", lambda: tmp_path / "tables")
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    registry.tables.forget()
    registry.look_at_tables()
    return tmp_path / "tables"


# What is chosen


def test_the_fastest_measured_backend_is_chosen_whatever_its_rank(folder):
    assert attnreg.explain(*_tensors(), Window.causal(8)).backend == "torch_block"
    writing.save(table_of({"torch": 1e-3, "torch_block": 2e-3}))
    decision = attnreg.explain(*_tensors(), Window.causal(8))
    assert (decision.backend, decision.source) == ("torch", "tuned")
    assert "1 ms" in decision.reason
    assert "torch_block (attnreg" in str(decision)
    assert "2 ms, 2.00 times that" in str(decision)


def _tensors(length=64):
    return torch.empty(1, 2, length, 8), torch.empty(1, 1, length, 8), torch.empty(1, 1, length, 8)


def _entries(*backends):
    return [Entry(backend, "test") for backend in backends]


def _backend(name, rank, **changes):
    return Backend(
        name=name,
        capability=Capability(dtypes=(torch.float32,)),
        local_attention=lambda *a, **k: None,
        rank=rank,
        **changes,
    )


@pytest.mark.parametrize(("slower_by", "winner"), [(TIE / 2, "first"), (TIE * 2, "second")])
def test_times_that_differ_by_less_than_their_spread_go_to_the_lower_rank(slower_by, winner):
    figures = {"first": Figure(seconds=1 + slower_by, spread=1.0), "second": Figure(seconds=1.0, spread=1.0)}
    entries = _entries(_backend("first", 1), _backend("second", 2))
    assert choose(problem(), entries, measured=[Measured("tuned", figures)]).backend == winner


def test_a_difference_beyond_the_spread_is_none_to_overlook():
    figures = {"first": Figure(seconds=1.01, spread=0.001), "second": Figure(seconds=1.0, spread=0.001)}
    entries = _entries(_backend("first", 1), _backend("second", 2))
    assert choose(problem(), entries, measured=[Measured("tuned", figures)]).backend == "second"


def test_a_measured_winner_that_cannot_run_the_call_is_passed_over_and_said_to_be_faster():
    figures = {"a": Figure(seconds=1.0), "b": Figure(seconds=2.0), "c": Figure(seconds=3.0)}
    entries = _entries(_backend("a", 1, refuse=lambda problem: "it is shy"), _backend("b", 2), _backend("c", 3))
    decision = choose(problem(), entries, measured=[Measured("tuned", figures)])
    assert decision.backend == "b"
    assert "0.50 times that; to have it, change:\n     - it is shy" in str(decision)


def test_a_figure_of_one_candidate_alone_compares_nothing():
    entries = _entries(_backend("a", 1), _backend("b", 2))
    decision = choose(problem(), entries, measured=[Measured("tuned", {"b": Figure(seconds=1.0)})])
    assert (decision.backend, decision.source) == ("a", "heuristic")


def test_a_forced_backend_goes_before_any_table(folder):
    writing.save(table_of({"torch": 1e-3, "torch_block": 2e-3}))
    assert attnreg.explain(*_tensors(), Window.causal(8), backend="torch_block").source == "forced"


def test_a_failed_candidate_has_no_time_and_its_reason_is_shown():
    figures = {"a": Figure(reason="RuntimeError: boom"), "b": Figure(seconds=1.0)}
    entries = _entries(_backend("a", 1), _backend("b", 2))
    decision = choose(problem(), entries, measured=[Measured("tuned", figures)])
    assert decision.backend == "b"
    assert "not timed: RuntimeError: boom" in str(decision)


# Which entry serves a call


@pytest.mark.parametrize("changes", [{"grad": True}, {"dtype": torch.float64}])
def test_another_direction_or_dtype_says_nothing(changes):
    assert distance(as_measured(problem(**changes)), as_measured(problem())) == float("inf")


def test_half_precisions_stand_in_for_each_other():
    ours, theirs = as_measured(problem(dtype=torch.float16)), as_measured(problem(dtype=torch.bfloat16))
    assert 0 < distance(theirs, ours) < NEAR
    assert not same_class(theirs, ours)


def test_the_nearest_entry_by_logarithm_serves_a_call(folder):
    table = table_of({"torch": 1.0, "torch_block": 2.0}, window=8).merged(
        table_of({"torch": 2.0, "torch_block": 1.0}, window=32)
    )
    writing.save(table)
    found = {window: attnreg.explain(*_tensors(), Window.causal(window)).backend for window in (4, 8, 15, 17, 32, 60)}
    assert found == {4: "torch", 8: "torch", 15: "torch", 17: "torch_block", 32: "torch_block", 60: "torch_block"}


def test_an_entry_of_the_same_head_dim_goes_before_one_of_the_same_window():
    ours, other_window, other_head_dim = (as_measured(problem(w, head_dim=e)) for w, e in ((8, 64), (64, 64), (8, 128)))
    assert distance(other_window, ours) < distance(other_head_dim, ours)


def test_an_entry_that_compares_nothing_leaves_the_call_to_the_next_one(folder):
    table = table_of({"torch": 1.0, "torch_block": 2.0}, window=8)
    writing.save(table.merged(table_of({"torch_block": 1.0}, window=10)))
    decision = attnreg.explain(*_tensors(), Window.causal(10))
    assert (decision.backend, decision.source) == ("torch", "tuned")
    assert "the nearest entry, W=8" in decision.reason


def test_a_call_further_off_than_the_rule_allows_is_left_to_the_heuristic(folder):
    writing.save(table_of({"torch": 1.0, "torch_block": 2.0}, window=2))
    tensors = _tensors(4096)
    assert attnreg.explain(*tensors, Window.causal(2)).source == "tuned"
    assert distance(as_measured(problem(2)), as_measured(problem(512, length=4096))) > FAR
    assert attnreg.explain(*tensors, Window.causal(512)).source == "heuristic"


def test_a_window_beyond_the_sequence_counts_as_far_as_it_reaches():
    assert as_measured(problem(window=5000)).window == as_measured(problem(window=64)).window == Window.causal(64)


def test_a_users_table_goes_before_a_shipped_one_even_if_less_near_as_long_as_it_is_near(folder):
    tuned, shipped = (
        table_of({"torch": 1.0, "torch_block": 2.0}, window=8),
        table_of({"torch": 2.0, "torch_block": 1.0}, window=12),
    )
    stored = [Stored(shipped, "shipped", "s", ()), Stored(tuned, "tuned", "t", ())]
    assert [each.source for each in measured(problem(12), stored)] == ["tuned", "shipped"]
    assert next(each.source for each in measured(problem(64), stored)) == "tuned"
    far = table_of({"torch": 1.0, "torch_block": 2.0}, window=1)
    stored[1] = Stored(far, "tuned", "t", ())
    assert [each.source for each in measured(problem(12), stored)] == ["shipped", "tuned"]


def test_sizes_within_a_quarter_of_an_octave_are_of_one_class():
    assert same_class(as_measured(problem(32)), as_measured(problem(36)))
    assert not same_class(as_measured(problem(32)), as_measured(problem(44)))


def test_calls_with_a_bias_go_by_entries_with_a_bias_where_there_are_any_and_others_never_do():
    plain, biased = {"x": Figure(seconds=1.0)}, {"x": Figure(seconds=2.0)}
    rows = {as_measured(problem(8)): plain, as_measured(problem(16, given=BIAS)): biased}
    stored = [Stored(Table(here(), rows), "tuned", "t", ())]

    def served_by(**changes):
        return [each.figures for each in measured(problem(**changes), stored)]

    assert served_by() == served_by(given=SCALE) == served_by(window=16) == [plain]
    assert served_by(given=BIAS) == served_by(given=HARDLY_A_BIAS) == served_by(given=BIAS + SCALE) == [biased]
    assert served_by(given=LENGTHS) == served_by(given=BIAS + LENGTHS) == [plain]  # nothing of its own was measured
    assert served_by(given=BIAS, window=1, heads=64, kv_heads=32) == [plain]  # nor within reach
    assert distance(as_measured(problem(given=BIAS)), problem()) == float("inf")
    assert not same_class(as_measured(problem()), problem(given=BIAS))
    assert same_class(as_measured(problem(given=HARDLY_A_BIAS)), problem(given=BIAS))


def test_an_entry_without_the_bias_is_not_called_the_call_itself():
    stored = [Stored(table_of({"x": 1.0}), "tuned", "t", ())]
    (itself,) = measured(problem(), stored)
    (other,) = measured(problem(given=BIAS), stored)
    (scaled,) = measured(problem(given=SCALE), stored)
    assert "nearest" not in itself.text
    assert "the nearest entry, W=8" in other.text
    assert scaled is itself


def calls_around_a_table(table, count, seed):
    """Calls of every kind that a table has, of its sizes and of others, so that many entries are as near as another."""
    generator = random.Random(seed)
    calls = list(table.rows)
    for _ in range(count):
        call = generator.choice(calls)
        power = 2 ** generator.choice((0, 0, 1, 2))
        length = generator.choice((call.key_length, call.key_length * power, generator.randint(1, 9000)))
        width = generator.choice((max(call.head_dim, call.value_dim), generator.randint(1, 300)))
        window = generator.choice((call.window.size, call.window.size * power, generator.randint(1, 2000)))
        yield replace(
            call,
            dtype=generator.choice((call.dtype, torch.float16, torch.bfloat16, torch.float32, torch.float64)),
            batch=generator.choice((1, power, generator.randint(1, 9))),
            query_length=generator.choice((length, length, 1)),
            key_length=length,
            head_dim=width if call.head_dim else 0,
            value_dim=width if call.value_dim else 0,
            window=generator.choice((Window.causal, Window.centered))(window),
        )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_entries_that_are_found_are_those_of_least_distance_in_the_order_of_the_file(path):
    table = store.load(path)
    (stored,) = (Stored(table, "shipped", path.name, ()),)
    for call in calls_around_a_table(table, 1500, seed=len(path.name)):
        all_of_them = sorted((distance(row, call), place, row) for place, row in enumerate(table.rows))
        expected = [(octaves, row) for octaves, _, row in all_of_them[:MOST_ENTRIES] if octaves <= FAR]
        assert [(octaves, entry.call) for octaves, entry in stored.nearest(call)] == expected, call


# Files


def test_a_call_survives_its_text():
    for call in (problem(), problem(9, grad=True, batch=3), problem(given=BIAS + LENGTHS + SCALE)):
        assert call_from_json(json.loads(json.dumps(call_to_json(call))), CPU) == call


FIRST_FORM = """{"format": 1, "environment": %s, "rows": [
{"call": {"op": "local_attention", "dtype": "float32", "head_dim": 8, "value_dim": 8, "group": 2, "window": 8, "queries": 64,
 "keys": 64, "sequences": 2, "gradients": false}, "candidates": {"torch": {"seconds": 1.0, "spread": 0.1, "measured": "2026"}}}]}"""


def test_a_table_in_the_first_form_is_read():
    text = FIRST_FORM % json.dumps(asdict(here()))
    figure = Figure(seconds=1.0, spread=0.1, measured="2026")
    assert from_json(text) == Table(here(), {as_measured(problem()): {"torch": figure}})


def test_a_table_survives_its_file():
    table = table_of({"torch": 1.0}).merged(
        Table(here(), {as_measured(problem(9)): {"x": Figure(reason="no", measured="m")}})
    )
    assert from_json(to_json(table)) == table


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"sort_keys": True}], ids=str)
def test_a_table_is_read_however_its_text_is_laid_out(layout):
    table = table_of({"torch": 1.0}).merged(table_of({"torch": 2.0}, grad=True)).merged(table_of({"x": 3.0}, window=9))
    text = json.dumps(json.loads(to_json(table)), **layout)
    assert from_json(text) == table
    kind = ("local_attention", frozenset((torch.float32,)), False)
    assert len(TableText(text).of_kind(*kind)) == 2
    assert TableText(text).of_kind(*kind) == TableText(to_json(table)).of_kind(*kind) == table.of_kind(*kind)


BROKEN = {
    "empty": "",
    "truncated": '{"format": 1, "rows": [',
    "no_json": "hello",
    "a_list": "[]",
    "foreign": '{"name": "x"}',
    "other_format": '{"format": 99}',
    "no_rows": '{"format": 1}',
    "deep": "[" * 100_000,
    "bad_time": None,
    "bad_key": None,
}


def broken_text(kind):
    text = to_json(table_of({"torch": 1.0}))
    if kind == "bad_time":
        return text.replace('"seconds": 1.0', '"seconds": "fast"')
    if kind == "bad_key":
        return text.replace('"window": [7, 0]', '"window": [-7, 0]')
    return BROKEN[kind]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_table_breaks_no_call_is_reported_and_left_alone(folder, kind):
    name = here().file_name
    folder.mkdir()
    (folder / name).write_text(broken_text(kind))
    assert call().shape == (1, 2, 64, 8)
    decision = attnreg.explain(*_tensors(), Window.causal(8))
    assert any(name in remark and "is not used" in remark for remark in decision.remarks)
    assert name in str(decision)
    path = writing.save(table_of({"torch": 1.0, "torch_block": 2.0}))
    assert path.name != name
    assert (folder / name).read_text() == broken_text(kind)
    assert attnreg.explain(*_tensors(), Window.causal(8)).source == "tuned"


def test_a_broken_table_is_reported_once(folder, caplog):
    folder.mkdir()
    (folder / "x.json").write_text("hello")
    for window in (3, 4, 5):
        call(window=window)
    (record,) = caplog.records
    assert "the table x.json is not used: it is not JSON" in record.getMessage()


def test_bytes_that_are_no_text_are_a_broken_table(folder):
    folder.mkdir()
    (folder / "x.json").write_bytes(b"\xff\xfe\x00")
    assert call().shape == (1, 2, 64, 8)


def test_a_folder_that_cannot_be_read_breaks_no_call(folder):
    folder.write_text("a file where the folder should be")
    assert call().shape == (1, 2, 64, 8)


def test_nothing_is_measured_where_it_cannot_be_written(folder):
    folder.write_text("a file where the folder should be")
    seen = []
    with pytest.raises(OSError, match=f"tables cannot be written to {folder}: File exists"):
        attnreg.tune(**SMALL, device=CPU, windows=[4], progress=seen.append)
    assert not seen


def test_what_cannot_be_written_serves_the_process_alone(folder):
    folder.write_text("a file where the folder should be")
    assert writing.keep(table_of({"torch": 1.0, "torch_block": 2.0})) is not None
    assert attnreg.explain(*_tensors(), Window.causal(8)).backend == "torch"
    attnreg.reset()
    assert attnreg.explain(*_tensors(), Window.causal(8)).source == "heuristic"


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({"torch": "1.0"}, True),
        ({"threads": 77}, True),
        ({"backends": {"torch": "attnreg 0.0.1"}}, True),
        ({"attnreg": "99.0"}, False),
        ({"device": Device("cpu", "Another CPU", "AVX9")}, False),
    ],
)
def test_a_hard_mismatch_is_not_used_and_a_soft_one_is_and_is_said(folder, changes, used):
    table = table_of({"torch": 1.0, "torch_block": 2.0})
    writing.save(Table(replace(table.environment, **changes), table.rows))
    decision = attnreg.explain(*_tensors(), Window.causal(8))
    assert decision.source == ("tuned" if used else "heuristic")
    if used:
        assert any(", here " in remark for remark in decision.remarks)
    elif "attnreg" in changes:
        assert any("attnreg 99.0" in remark for remark in decision.remarks)


def test_merging_keeps_both_and_of_the_same_the_one_measured_last():
    old = Figure(seconds=1.0, measured="2026-01-01")
    new = Figure(seconds=2.0, measured="2026-02-01")
    call = as_measured(problem())
    first, second = Table(here(), {call: {"a": new, "b": old}}), Table(here(), {call: {"a": old, "c": old}})
    for merged in (first.merged(second), second.merged(first)):
        assert merged.rows == {call: {"a": new, "b": old, "c": old}}


def _save_many(folder, first):
    store.table_dir = lambda: folder
    for window in range(first, first + 12):
        writing.save(table_of({"torch": 1.0}, window=window))


def test_two_processes_that_save_at_once_lose_nothing(folder):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_save_many, args=(folder, first)) for first in (1, 21, 41)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    (path,) = folder.glob("*.json")
    assert len(store.load(path).rows) == 36


def test_of_the_table_of_another_device_only_that_is_read(folder, monkeypatch):
    table = table_of({"torch": 1.0, "torch_block": 2.0})
    writing.save(table)
    foreign = Table(replace(table.environment, device=Device("cpu", "Another CPU", "AVX9")), table.rows)
    path = folder / foreign.environment.file_name
    # Nobody gets so far in the text as to see that it is broken.
    path.write_text(to_json(foreign)[:-100])
    decision = attnreg.explain(*_tensors(), Window.causal(8))
    assert (decision.source, decision.remarks) == ("tuned", ())
    with pytest.raises(TableError, match="it is not JSON"):
        store.load(path)


# A stale plan is a bug


def test_an_edited_table_serves_the_next_new_call(folder):
    path = writing.save(table_of({"torch": 1.0, "torch_block": 2.0}))
    before = registry.tables.stamp()
    assert attnreg.explain(*_tensors(), Window.causal(8)).backend == "torch"
    assert registry.tables.stamp() == before
    with path.open("r+") as file:  # in place: neither the folder nor the inode changes
        text = file.read().replace('"seconds": 1.0,', '"seconds": 3.00,')
        file.seek(0)
        file.write(text)
    assert registry.tables.stamp() != before
    assert attnreg.explain(*_tensors(), Window.causal(8)).backend == "torch_block"
    path.unlink()
    assert attnreg.explain(*_tensors(), Window.causal(8)).source == "heuristic"


def test_a_changed_table_takes_effect_on_the_next_call_in_every_thread_and_after_fork(folder):
    ran = []

    def spy(name):
        def forward(query, *arguments, **options):
            ran.append(name)
            return query.clone(), query[..., 0]  # nothing parallel: torch's threads do not survive a fork

        return as_torch_block(name, local_attention=forward, rank=1)

    with attnreg.register(spy("one")), attnreg.register(spy("two")):
        writing.save(table_of({"one": 1.0, "two": 2.0}))
        call()
        writing.save(Table(here(), {as_measured(problem()): {"two": Figure(seconds=0.1, measured="2027")}}))
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert ran == ["one", "two", "two"]
        child = os.fork()
        if child == 0:
            try:
                writing.save(Table(here(), {as_measured(problem()): {"one": Figure(seconds=0.01, measured="2028")}}))
                call()
                os._exit(0 if ran[-1] == "one" else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_pinned_table_stands_for_all_of_the_users_and_takes_effect_at_once(folder, tmp_path, monkeypatch):
    writing.save(table_of({"torch": 1.0, "torch_block": 2.0}))
    pin = tmp_path / "pinned.json"
    writing.write(table_of({"torch": 2.0, "torch_block": 1.0}), pin)
    tensors, window = _tensors(), Window.causal(8)

    def chosen():
        attnreg.local_attention(*tensors, window)
        return list(registry.plans.values())[-1].implementation.backend.name

    assert chosen() == "torch"
    monkeypatch.setenv("ATTNREG_TABLE", str(pin))
    assert chosen() == "torch_block"
    monkeypatch.setenv("ATTNREG_TABLE", str(tmp_path / "missing.json"))
    assert "missing.json is not used: it cannot be read" in str(attnreg.explain(*tensors, window))
    monkeypatch.delenv("ATTNREG_TABLE")
    assert attnreg.explain(*tensors, window).backend == "torch"


# Measuring


def test_tuning_measures_every_candidate_and_the_next_call_goes_by_it(folder):
    seen = []
    found = attnreg.tune(**SMALL, device=CPU, windows=[4], gradients=[False, True], seconds=0.01, progress=seen.append)
    assert {(step.backend, step.problem.needs_grad) for step in seen} == {
        (n, g) for n in ("torch", "torch_block") for g in (False, True)
    }
    assert [step.done for step in seen] == list(range(1, 5))
    assert all(step.figure.seconds > 0 for step in seen)
    assert found.path is not None
    assert store.load(found.path).rows == found.table.rows
    assert attnreg.explain(*_tensors(), Window.causal(4)).source == "tuned"


def _raises(*arguments, **options):
    raise RuntimeError("boom")


def _wrong(query, key, value, window, **options):
    return torch.zeros_like(query), torch.zeros(query.shape[:3])


def _out_of_memory(*arguments, **options):
    return torch.empty(2**60)


@pytest.mark.parametrize(
    ("function", "reason"), [(_raises, "boom"), (_wrong, "wrong: output"), (_out_of_memory, "RuntimeError")]
)
def test_a_candidate_that_fails_is_recorded_with_its_reason_and_costs_only_itself(folder, function, reason):
    with attnreg.register(as_torch_block("bad", local_attention=function, rank=1)):
        found = attnreg.tune(**SMALL, device=CPU, windows=[4], gradients=[False], seconds=0.01)
        (figures,) = found.table.rows.values()
        assert reason in figures["bad"].reason
        assert figures["torch"].seconds
        assert figures["torch_block"].seconds
        assert attnreg.explain(*_tensors(), Window.causal(4)).backend != "bad"


PLUGIN = """
import os, time
from attnreg import Backend, Capability, hookimpl
import torch
def dies(*a, **k): os.kill(os.getpid(), 11)
def leaves(*a, **k): raise SystemExit(3)
def hangs(*a, **k): time.sleep(100)
def chats(query, key, value, window, **o):
    print("hello")
    raise ValueError("it talked")
@hookimpl
def attnreg_backends():
    for each in (dies, leaves, hangs, chats):
        yield Backend(name=each.__name__, capability=Capability(dtypes=(torch.float32,)), local_attention=each)
"""


@pytest.fixture
def bad_plugin(tmp_path, monkeypatch, folder):
    """A distribution whose backends do to their process what they like."""
    (tmp_path / "bad_plugin.py").write_text(PLUGIN)
    info = tmp_path / "bad_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: bad-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnreg]\nbad = bad_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    attnreg.reset()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("dies", "signal SIGSEGV"), ("leaves", "SystemExit: 3"), ("hangs", "given up after 5 s"), ("chats", "it talked")],
)
def test_a_candidate_that_dies_leaves_hangs_or_chats_takes_nothing_along(bad_plugin, name, reason):
    from attnreg.tuning.tune import grid

    (call,) = grid(**{**SMALL, "batch": 1, "windows": [4], "device": CPU, "gradients": [False]})
    with Worker() as worker:
        assert worker.measure(call, "torch", 0.01).figure.seconds
        patient, worker.longest = worker.longest, 5  # now that the child has started
        assert reason in worker.measure(call, name, 0.01).figure.reason
        worker.longest = patient
        assert worker.measure(call, "torch_block", 0.01).figure.seconds


@pytest.fixture
def copies(monkeypatch):
    """What the copies take that tell whether something else uses the device, one for each measurement in turn."""
    times = []

    def measure(self, problem, backend, seconds):
        copying = times.pop(0)
        # A figure tells which copy it came with.
        return Measurement(Figure(seconds=copying, reason=None if copying else "boom"), copying)

    monkeypatch.setattr(Worker, "measure", measure)
    return times


@pytest.mark.parametrize(
    ("times", "kept", "disturbed"),
    [
        ([1.0, 1.1, 1.4, 1.0], [1.0, 1.1, 1.4, 1.0], []),
        ([1.0, 2.0, 1.1, 1.0, 1.0], [1.0, 1.1, 1.0, 1.0], []),  # the second, measured again, was not disturbed
        (
            [1.0, 2.0, 3.0, 1.0, 1.0],
            [1.0, 2.0, 1.0, 1.0],
            [(4, "torch_block")],
        ),  # it was; the less disturbed figure stays
        ([1.0, 2.0, None, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0], [(4, "torch_block")]),  # the second measurement of it failed
        # Only a later one shows that the first two were disturbed.
        ([2.0, 2.0, 1.0, 1.0], [2.0, 2.0, 1.0, 1.0], [(4, "torch"), (4, "torch_block")]),
        ([None, 1.0, None, 1.0], [None, 1.0, None, 1.0], []),  # what has no time has no copy
    ],
)
def test_what_was_measured_beside_something_else_is_measured_again_and_named(folder, copies, times, kept, disturbed):
    copies += times
    options = {**SMALL, "windows": [4, 8], "gradients": [False], "backends": ["torch", "torch_block"]}
    found = attnreg.tune(**options, device=CPU)
    assert not copies
    assert [figure.seconds for row in found.table.rows.values() for figure in row.values()] == kept
    assert [(call.window.size, name) for call, name in found.disturbed] == disturbed


def test_the_command_says_that_something_else_used_the_device(folder, copies):
    copies += [1.0, 3.0, 3.0]
    sizes = ("--op", "local_attention", "--dtype", "float32", "--head-dim", "8", "--length", "64", "--heads", "2,1")
    result = run(
        *sizes, "--window", "4", "--no-grad", "--backend", "torch", "--backend", "torch_block", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert "measured while something else used the device" in result.output
    assert "  torch_block: local_attention, forward; float32 E=8 D=8 Lq=64 Lk=64 N*H=2 H/Hkv=2 W=4\n" in result.output


def test_the_time_of_a_copy_is_that_of_one_copy_of_more_than_the_cache(monkeypatch):
    copied = []

    def slow_copy(target, source):
        copied.append(source.nbytes)
        time.sleep(0.004)

    monkeypatch.setattr(torch.Tensor, "copy_", slow_copy)
    assert 0.004 <= steadiness.copy_seconds(CPU) < 0.04
    assert min(copied) > cache_bytes(CPU)


def test_without_room_for_a_copy_nothing_is_known(monkeypatch):
    def no_room(*sizes, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steadiness.torch, "zeros", no_room)
    assert steadiness.copy_seconds(CPU) is None


def test_an_interrupted_tuning_keeps_what_was_measured(folder):
    def interrupt(step):
        if step.done == 3:
            raise KeyboardInterrupt

    found = attnreg.tune(**SMALL, device=CPU, windows=[4, 8], gradients=[False], seconds=0.01, progress=interrupt)
    assert found.interrupted
    assert sum(map(len, store.load(found.path).rows.values())) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ops": ["attention"]}, "ops must be of local_dot_product"),
        ({"windows": [0]}, r"windows must be whole numbers of at least 1; got \[0\]"),
        ({"heads": [(3, 2)]}, r"H a multiple of Hkv; got \(3, 2\)"),
        ({"backends": ["nobody"]}, "no backend is called 'nobody'; registered:"),
        ({"dtypes": []}, "dtypes is empty"),
        ({"dtypes": [torch.int8]}, "dtypes must be floating-point dtypes of torch; got torch.int8"),
        ({"gradients": []}, r"gradients must be one or both of False and True; got \[\]"),
        ({"device": "nowhere"}, "device 'nowhere' is not to be had"),
    ],
)
def test_bad_arguments_are_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        attnreg.tune(**{**SMALL, "device": CPU, "windows": [4], **changes})


# On first use


def test_autotune_measures_a_class_once_and_remembers(folder):
    attnreg.autotune(True)
    call(window=8)
    (path,) = folder.glob("*.json")
    assert len(store.load(path).rows) == 1
    call(window=8)
    call(window=9)
    assert len(store.load(path).rows) == 1
    call(window=32)
    assert len(store.load(path).rows) == 2
    attnreg.autotune(False)
    call(window=2)
    assert len(store.load(path).rows) == 2


def test_autotune_measures_calls_with_a_bias_of_fewer_queries_and_other_values_apart(folder):
    attnreg.autotune(True)
    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 64, 8), torch.randn(1, 1, 64, 5)
    options = {"bias": torch.randn(2, 1, 8), "key_lengths": torch.tensor([40])}
    for _ in range(2):
        attnreg.local_attention(query, key, value, Window.causal(8), **options)
        attnreg.local_attention(query, key, value, Window.causal(8), scale=0.1)
    (path,) = folder.glob("*.json")
    calls = list(store.load(path).rows)
    assert [[name for name, _ in call.given] for call in calls] == [[], ["bias", "key_lengths"]]
    assert {(call.query_length, call.key_length, call.head_dim, call.value_dim) for call in calls} == {(3, 64, 8, 5)}
    assert all(figure.seconds for row in store.load(path).rows.values() for figure in row.values())


def test_a_broken_table_breaks_no_tuning_on_first_use(folder):
    folder.mkdir()
    (folder / here().file_name).write_text(broken_text("bad_time"))
    attnreg.autotune(True)
    call()
    assert len(list(folder.glob("*.json"))) == 2
    assert attnreg.explain(*_tensors(), Window.causal(8)).source == "tuned"


def test_autotune_leaves_alone_what_it_cannot_judge(folder, monkeypatch):
    monkeypatch.setattr(oracle, "KNOWN", ("key_lengths", "scale"))
    attnreg.autotune(True)
    call(bias=torch.ones(8))
    assert not folder.exists()
    call()
    assert folder.exists()


def test_autotune_by_the_environment_leaves_forced_and_deterministic_calls_alone(folder, monkeypatch):
    monkeypatch.setenv("ATTNREG_AUTOTUNE", "1")
    call(backend="torch")
    with attnreg.use_backend("torch"):
        call()
    torch.use_deterministic_algorithms(True)
    try:
        call()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not folder.exists()
    call()
    assert len(list(folder.glob("*.json"))) == 1


def test_autotune_takes_only_true_false_and_none():
    with pytest.raises(TypeError, match="on must be True, False or None, got 1"):
        attnreg.autotune(1)


# The command


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments])


def test_the_command_tunes_exports_imports_and_plots(folder, tmp_path):
    sizes = ("--op", "local_dot_product", "--dtype", "float32", "--head-dim", "8", "--length", "64", "--heads", "2,1")
    result = run(*sizes, "--window", "4", "--window", "8", "--seconds", "0.01", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "torch_block" in result.output
    exported = tmp_path / "exported.json"
    assert run("--export", str(exported), "--device", "cpu").exit_code == 0
    (path,) = folder.glob("*.json")
    before = store.load(path).rows
    path.unlink()
    assert run("--import", str(exported)).exit_code == 0
    assert store.load(path).rows == before
    assert run("--plot", str(tmp_path / "p.png"), "--device", "cpu").exit_code == 0
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_an_imported_table_of_another_device_is_kept_and_said_not_to_count_here(folder, tmp_path):
    table = table_of({"torch": 1.0, "torch_block": 2.0})
    foreign = Table(replace(table.environment, device=Device("cpu", "Another CPU", "AVX9")), table.rows)
    writing.write(foreign, tmp_path / "foreign.json")
    result = run("--import", str(tmp_path / "foreign.json"))
    assert result.exit_code == 0, result.output
    assert "calls on this machine do not go by it: it was measured on Another CPU (AVX9)" in result.output
    assert store.load(folder / foreign.environment.file_name) == foreign


def test_the_plot_marks_what_is_chosen_a_tie_by_rank(folder, tmp_path, monkeypatch):
    marked = {}
    monkeypatch.setattr(command, "plot", lambda table, chosen, *_: marked.update(chosen))
    near = {"torch": Figure(seconds=1.0, spread=0.1), "torch_block": Figure(seconds=1.02, spread=0.1)}
    far = {"torch": Figure(seconds=1.0, spread=0.1), "torch_block": Figure(seconds=1.2, spread=0.1)}
    keys = as_measured(problem(4)), as_measured(problem(8))
    writing.save(Table(here(), dict(zip(keys, (near, far)))))
    command.plot_table(CPU, tmp_path / "p.png")
    assert marked == dict(zip(keys, ("torch_block", "torch")))


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ({}, {4, 8, 16}),
        ({"windows": [4, 8]}, {4, 8}),
        ({"gradients": [True]}, {16}),
        ({"ops": ["local_attention"], "dtypes": [torch.float32], "head_dims": [8], "lengths": [64]}, {4, 8, 16}),
        ({"heads": [(2, 1)]}, {4, 8}),
        ({"batch": 2, "heads": [(2, 2)]}, {16}),
    ],
)
def test_the_plot_shows_the_calls_that_are_asked_for(folder, tmp_path, monkeypatch, asked, drawn):
    shown = []
    monkeypatch.setattr(command, "plot", lambda table, *_: shown.extend(call.window.size for call in table.rows))
    figures = {"torch": Figure(seconds=1.0), "torch_block": Figure(seconds=2.0)}
    problems = (problem(4), problem(8), problem(16, heads=4, kv_heads=4, grad=True))
    writing.save(Table(here(), {as_measured(each): figures for each in problems}))
    command.plot_table(CPU, tmp_path / "p.png", **asked)
    assert set(shown) == drawn
    with pytest.raises(ValueError, match="the table has none of these calls"):
        command.plot_table(CPU, tmp_path / "p.png", windows=[5])


def test_whole_tables_are_exported_and_imported(folder, tmp_path):
    writing.save(table_of({"torch": 1.0, "torch_block": 2.0}))
    result = run("--export", str(tmp_path / "x.json"), "--device", "cpu", "--window", "4")
    assert result.exit_code == 2
    assert "--export and --import take whole tables" in result.output


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"grad": True},
        {"heads": 4, "kv_heads": 1, "batch": 3},
        {"window": 500},
        {"window": 500, "query_length": 3},
        {"batch": 3, "given": (("bias", Given((3, 2, 64, 8), torch.float32)), ("scale", Given()))},
    ],
)
def test_the_form_of_a_call_in_tables_is_its_own(sizes):
    call = as_measured(problem(**sizes))
    assert as_measured(call) == call


def test_the_command_refuses_what_is_no_table(folder, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    result = run("--import", str(tmp_path / "x.json"))
    assert result.exit_code == 2
    assert 'it has no "format"' in result.output
    assert not folder.exists()
    result = run("--export", str(tmp_path / "y.json"), "--device", "cpu")
    assert "there is no table for" in result.output
    assert not (tmp_path / "y.json").exists()


# What is shipped


def test_tables_are_shipped_for_the_h100_the_h200_and_cpus():
    devices = {store.load(path).environment.device for path in SHIPPED}
    assert {device.type for device in devices} == {"cpu", "cuda"}
    assert {"NVIDIA H100 80GB HBM3", "NVIDIA H200"} <= {device.name for device in devices}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_table_covers_every_op_with_and_without_gradients(path):
    table = store.load(path)
    assert {(call.op, call.needs_grad) for call in table.rows} == {(op, g) for op in OPS for g in (False, True)}
    assert table.environment.attnreg.split(".")[:2] == attnreg.__version__.split(".")[:2]
    assert all(any(figure.seconds for figure in figures.values()) for figures in table.rows.values())


def test_a_shipped_table_serves_every_cpu_and_says_whose_it_is(monkeypatch):
    monkeypatch.setattr(store, "SHIPPED", SHIPPED[0].parent)
    attnreg.reset()
    decision = attnreg.explain(*_tensors(2048), Window.causal(32))
    assert (decision.source, decision.backend) == ("shipped", "torch_block")
    other = store.load(next(path for path in SHIPPED if path.stem == "cpu")).environment.device != here().device
    assert any("measured on" in remark for remark in decision.remarks) == other


def test_importing_attnreg_and_a_first_call_load_no_measuring_and_no_plotting():
    code = (
        "import sys, torch, attnreg; q = torch.ones(1, 1, 8, 4); attnreg.local_attention(q, q, q, attnreg.Window.causal(2)); "
        "print(*(name for name in sys.modules if name.startswith(('attnreg.measuring', 'attnreg.testing', 'attnreg.tuning', 'matplotlib'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_version_of_a_backends_library_is_part_of_the_environment():
    (entry,) = (entry for entry in registry.entries if entry.backend.name == "torch_block")
    with_library = replace(entry, backend=replace(entry.backend, library="pluggy"))
    without_it = replace(entry, backend=replace(entry.backend, library="not-installed"))
    version = metadata.version("pluggy")
    now = environment(CPU, [with_library])
    assert now.backends == {"torch_block": f"{entry.distribution}, pluggy {version}"}
    before = replace(now, backends={"torch_block": f"{entry.distribution}, pluggy 0.1"})
    (said,) = before.soft_mismatches(now)
    assert (
        said
        == f"the backend torch_block of {entry.distribution}, pluggy 0.1, here {entry.distribution}, pluggy {version}"
    )
    # Where it is not installed the backend cannot run, and what another one was measured with is of no account.
    assert environment(CPU, [without_it]).backends == {}
    assert now.soft_mismatches(environment(CPU, [without_it])) == ()


def test_an_environment_is_described_by_what_it_runs_on():
    found = here()
    assert found.device.type == "cpu"
    assert found.torch == torch.__version__
    assert found.backends["torch"].startswith("attnreg ")
    assert isinstance(json.loads(to_json(Table(found)))["environment"], dict)
    assert Environment(**found.__dict__).file_name == found.file_name
    with pytest.raises(TableError):
        from_json("{}")
