"""Tables of measured times: what they hold, what is chosen by them, which entry serves a call, and what is shipped."""

from __future__ import annotations

import io
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
from pathlib import Path

import pytest
import torch
from tabled import (
    ALL_RESULTS,
    BIAS,
    BROKEN,
    CPU,
    DROPOUT,
    HARDLY_A_BIAS,
    LENGTHS,
    PACKED,
    PACKED_BOTH,
    SCALE,
    SINKS,
    SOFTCAP,
    STARTS,
    as_torch_block,
    broken_text,
    call,
    empty_tensors,
    here,
    problem,
    settles,
    spy,
    table_of,
)

import attnreg
from attnreg import Backend, Capability, Window
from attnreg.backend import Entry
from attnreg.dispatch import TIE, choose
from attnreg.measured import Figure, Measured
from attnreg.op import OPS
from attnreg.plan import explain_problem
from attnreg.problem import Given
from attnreg.registry import registry
from attnreg.tables import store
from attnreg.tables.call import as_measured, call_from_json, call_to_json
from attnreg.tables.environment import Device, Environment, environment
from attnreg.tables.lookup import FAR, MOST_ENTRIES, MOST_SHAPES, NEAR, Stored, distance, measured, same_class
from attnreg.tables.table import (
    MOST_BYTES,
    MOST_CANDIDATES,
    MOST_ROWS,
    Table,
    TableError,
    TableText,
    from_json,
    to_json,
)
from attnreg.tuning import writing

SHIPPED = sorted(store.SHIPPED.glob("*.json"))  # before the tests are kept from them


# What is chosen


def test_the_fastest_measured_backend_is_chosen_whatever_its_rank(folder):
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).backend == "torch_block"
    writing.save(table_of({"torch": 1e-3, "torch_block": 2e-3}))
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert (decision.backend, decision.source) == ("torch", "tuned")
    assert "1 ms" in decision.reason
    assert "torch_block (attnreg" in str(decision)
    assert "2 ms, 2.00 times that" in str(decision)


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
    assert attnreg.explain(*empty_tensors(), Window.causal(8), backend="torch_block").source == "forced"


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
    found = {
        window: attnreg.explain(*empty_tensors(), Window.causal(window)).backend for window in (4, 8, 15, 17, 32, 60)
    }
    assert found == {4: "torch", 8: "torch", 15: "torch", 17: "torch_block", 32: "torch_block", 60: "torch_block"}


def test_an_entry_of_the_same_head_dim_goes_before_one_of_the_same_window():
    ours, other_window, other_head_dim = (as_measured(problem(w, head_dim=e)) for w, e in ((8, 64), (64, 64), (8, 128)))
    assert distance(other_window, ours) < distance(other_head_dim, ours)


def test_an_entry_that_compares_nothing_leaves_the_call_to_the_next_one(folder):
    table = table_of({"torch": 1.0, "torch_block": 2.0}, window=8)
    writing.save(table.merged(table_of({"torch_block": 1.0}, window=10)))
    decision = attnreg.explain(*empty_tensors(), Window.causal(10))
    assert (decision.backend, decision.source) == ("torch", "tuned")
    assert "the nearest entry, W=8" in decision.reason


def test_a_call_further_off_than_the_rule_allows_is_left_to_the_heuristic(folder):
    writing.save(table_of({"torch": 1.0, "torch_block": 2.0}, window=2))
    tensors = empty_tensors(4096)
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
    assert served_by(given=LENGTHS) == [plain]  # nothing of its own was measured
    assert served_by(given=BIAS + LENGTHS) == [biased]  # but with a part of it
    assert served_by(given=BIAS, window=1, heads=64, kv_heads=32) == [plain]  # nor within reach
    assert distance(as_measured(problem(given=BIAS)), problem()) == float("inf")
    assert not same_class(as_measured(problem()), problem(given=BIAS))
    assert same_class(as_measured(problem(given=HARDLY_A_BIAS)), problem(given=BIAS))


def test_a_call_goes_by_the_entries_that_have_most_of_what_it_gives_and_nothing_else():
    classes = {
        "plain": (), "bias": BIAS, "sinks": SINKS, "bias, sinks": BIAS + SINKS, "packed": PACKED, "dropout": DROPOUT,
        "packed, sinks, softcap": PACKED + SOFTCAP + SINKS,
    }  # fmt: skip
    rows = {
        as_measured(problem(8, grad=True, given=given)): {"x": Figure(seconds=place + 1.0)}
        for place, given in enumerate(classes.values())
    }
    stored = [Stored(Table(here(), rows), "tuned", "t", ())]

    def served_by(given, window=8):
        (found,) = measured(problem(window, grad=True, given=given), stored)
        return list(classes)[int(found.figures["x"].seconds) - 1]

    for name, given in classes.items():
        assert served_by(given) == served_by(given, window=9) == name
    for given, name in (
        (LENGTHS, "plain"),
        (STARTS, "plain"),
        (SOFTCAP, "plain"),
        (ALL_RESULTS, "plain"),
        (SOFTCAP + SINKS, "sinks"),
        (BIAS + LENGTHS + SINKS, "bias, sinks"),
        (BIAS + DROPOUT, "dropout"),  # two names are more than one
        (PACKED_BOTH, "packed"),
        (PACKED + SINKS, "packed"),  # one name each: the first in the op's row
        (SINKS + ALL_RESULTS, "sinks"),
        (PACKED_BOTH + SOFTCAP + SINKS + DROPOUT, "packed, sinks, softcap"),
    ):
        assert served_by(given) == name, given
        (found,) = measured(problem(8, grad=True, given=given), stored)
        assert "the nearest entry, W=8" in found.text
        for row in rows:
            of_call = {each for each, _ in given}
            assert (distance(row, problem(grad=True, given=given)) < float("inf")) == (
                {each for each, _ in row.given} <= of_call
            )


@pytest.mark.parametrize("given", [STARTS, LENGTHS, PACKED, SOFTCAP, SINKS, DROPOUT], ids=lambda given: given[0][0])
def test_a_call_does_not_lose_the_choice_of_the_plain_call_where_its_class_was_not_measured(folder, given):
    whole = Capability(dtypes=(torch.float32,), takes={name for name, _ in given})
    forward = {"local_attention": lambda *arguments, **options: None}
    with (
        attnreg.register(Backend(name="first", capability=whole, rank=1, **forward)),
        attnreg.register(Backend(name="second", capability=whole, rank=2, **forward)),
    ):
        writing.save(table_of({"first": 2.0, "second": 1.0, "torch": 3.0}))
        decision = explain_problem(problem(given=given), None)
        assert (decision.backend, decision.source) == ("second", "tuned")
        assert "the nearest entry, W=8 E=8 D=8 Lq=64 Lk=64 N*H=2 H/Hkv=2" in decision.reason
        own = Table(
            here(), {as_measured(problem(given=given)): {"first": Figure(seconds=1.0), "second": Figure(seconds=2.0)}}
        )
        writing.save(own)
        decision = explain_problem(problem(given=given), None)
        assert decision.backend == "first"
        assert "nearest" not in decision.reason
        assert explain_problem(problem(), None).backend == "second"


def test_a_pack_of_any_number_of_sequences_is_one_call_in_a_table(folder):
    rows = {as_measured(problem(given=PACKED)): {"torch": Figure(seconds=1.0), "torch_block": Figure(seconds=2.0)}}
    writing.save(Table(here(), rows))
    tensors = empty_tensors()
    for offsets in ([0, 64], [0, 3, 9, 64]):
        decision = attnreg.explain(*tensors, Window.causal(8), cu_seqlens_q=torch.tensor(offsets, dtype=torch.int32))
        assert decision.source == "tuned"
        assert "nearest" not in decision.reason


def test_rows_that_may_stand_anywhere_see_the_whole_window_as_far_as_there_are_keys():
    one_query = replace(problem(length=64, query_length=1), window=Window(20, 9))
    assert as_measured(one_query).window.size == 21
    assert as_measured(replace(one_query, given=STARTS)).window.size == 30
    assert as_measured(replace(one_query, given=STARTS, window=Window(2**60, 2**60))).window.size == 64


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
    for asked in calls_around_a_table(table, 1500, seed=len(path.name)):
        all_of_them = sorted((distance(row, asked), place, row) for place, row in enumerate(table.rows))
        expected = [(octaves, row) for octaves, _, row in all_of_them[:MOST_ENTRIES] if octaves <= FAR]
        assert [(octaves, entry.call) for octaves, entry in stored.nearest(asked)] == expected, asked


# Files


def test_a_call_survives_its_text():
    for each in (
        problem(),
        problem(9, grad=True, batch=3),
        problem(given=BIAS + LENGTHS + SCALE),
        problem(given=LENGTHS + STARTS + SOFTCAP + SINKS + DROPOUT),
        problem(given=PACKED_BOTH + SINKS + ALL_RESULTS, grad=True),
        replace(problem(given=PACKED), op="local_dot_product", value_dim=0),
    ):
        assert call_from_json(json.loads(json.dumps(call_to_json(each))), CPU) == each
        assert as_measured(as_measured(each)) == as_measured(each)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"cu_seqlens_q": {"shape": [3], "dtype": "int32"}}, "cu_seqlens_q has 0 dimensions"),
        ({"cu_seqlens_q": {"shape": [], "dtype": "float32"}}, "'float32' is no integer dtype"),
        ({"sinks": {"shape": [], "dtype": "float32"}}, "sinks has 1 dimensions"),
        ({"seed": {"shape": [1, 1], "dtype": "int64"}}, "seed has 1 dimensions"),
        ({"softcap": {"shape": [], "dtype": "float32"}}, "softcap is a number"),
        ({"grad_log_sum_exp": {"shape": [2]}}, "grad_log_sum_exp is a number"),
        ({"grad_output": {}}, "local_attention takes no 'grad_output'"),
    ],
)
def test_what_a_call_cannot_give_is_no_call(given, error):
    with pytest.raises(ValueError, match=error):
        call_from_json({**call_to_json(problem()), "given": given}, CPU)


def test_the_shape_of_what_is_given_follows_the_calls():
    of_batch = problem(batch=3, given=(*LENGTHS, *SINKS))
    assert as_measured(of_batch).given == (LENGTHS[0], ("sinks", Given((6,), torch.float32)))


FIRST_FORM = """{"format": 1, "environment": %s, "rows": [
{"call": {"op": "local_attention", "dtype": "float32", "head_dim": 8, "value_dim": 8, "group": 2, "window": 8, "queries": 64,
 "keys": 64, "sequences": 2, "gradients": false}, "candidates": {"torch": {"seconds": 1.0, "spread": 0.1, "measured": "2026-01-01"}}}]}"""


def test_a_table_in_the_first_form_is_read():
    text = FIRST_FORM % json.dumps(asdict(here()))
    figure = Figure(seconds=1.0, spread=0.1, measured="2026-01-01")
    assert from_json(text) == Table(here(), {as_measured(problem()): {"torch": figure}})


def test_a_table_survives_its_file():
    table = table_of({"torch": 1.0}).merged(
        Table(here(), {as_measured(problem(9)): {"x": Figure(reason="no", measured="2026-01-01")}})
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


def otherwise(row):
    return {name: row[name] for name in sorted(row, reverse=True)}


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("change", ["call", "row", "spaces"])
def test_a_row_is_found_whatever_the_order_of_its_keys(which, change):
    table = table_of({"torch": 1.0}).merged(table_of({"torch": 2.0}, grad=True)).merged(table_of({"x": 3.0}, window=9))
    head, *rows = to_json(table).split('{"call": ')
    assert len(rows) == 3
    for place in which:
        text, end = rows[place][: rows[place].rindex("}") + 1], rows[place][rows[place].rindex("}") + 1 :]
        if place == 2:
            text, end = rows[place].removesuffix("\n  ]\n}\n"), "\n  ]\n}\n"
        row = json.loads(f'{{"call": {text}')
        if change == "call":
            row["call"] = otherwise(row["call"])
        text = json.dumps(otherwise(row) if change == "row" else row)
        if change == "spaces":
            text = text.replace('"needs_grad": ', '"needs_grad":')
        rows[place] = text.removeprefix('{"call": ') + end
    text = head + "".join(row if row.startswith('{"candidates"') else f'{{"call": {row}' for row in rows)
    assert from_json(text) == table
    for needs_grad in (False, True):
        kind = ("local_attention", frozenset((torch.float32,)), needs_grad)
        assert TableText(text).of_kind(*kind) == table.of_kind(*kind)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_table_breaks_no_call_is_reported_and_left_alone(folder, kind):
    name = here().file_name
    folder.mkdir()
    (folder / name).write_text(broken_text(kind))
    assert call().shape == (1, 2, 64, 8)
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert any(name in remark and "is not used" in remark for remark in decision.remarks)
    assert name in str(decision)
    path = writing.save(table_of({"torch": 1.0, "torch_block": 2.0}))
    assert path.name != name
    assert (folder / name).read_text() == broken_text(kind)
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).source == "tuned"


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


def test_what_cannot_be_written_serves_the_process_alone(folder):
    folder.write_text("a file where the folder should be")
    assert writing.keep(table_of({"torch": 1.0, "torch_block": 2.0})) is not None
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).backend == "torch"
    attnreg.reset()
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).source == "heuristic"


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
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
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
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert (decision.source, decision.remarks) == ("tuned", ())
    with pytest.raises(TableError, match="it is not JSON"):
        store.load(path)


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


# A stale plan is a bug


def test_an_edited_table_serves_the_next_new_call(folder):
    path = writing.save(table_of({"torch": 1.0, "torch_block": 2.0}))
    before = registry.tables.stamp()
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).backend == "torch"
    assert registry.tables.stamp() == before
    with path.open("r+") as file:  # in place: neither the folder nor the inode changes
        text = file.read().replace('"seconds": 1.0,', '"seconds": 3.00,')
        file.seek(0)
        file.write(text)
    assert registry.tables.stamp() != before
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).backend == "torch_block"
    path.unlink()
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).source == "heuristic"


def test_a_changed_table_takes_effect_on_the_next_call_in_every_thread_and_after_fork(folder):
    ran = []
    with attnreg.register(spy("one", ran)), attnreg.register(spy("two", ran)):
        writing.save(table_of({"one": 1.0, "two": 2.0}))
        call()
        writing.save(Table(here(), {as_measured(problem()): {"two": Figure(seconds=0.1, measured="2026-02-01")}}))
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert ran == ["one", "two", "two"]
        child = os.fork()
        if child == 0:
            try:
                writing.save(
                    Table(here(), {as_measured(problem()): {"one": Figure(seconds=0.01, measured="2026-03-01")}})
                )
                call()
                os._exit(0 if ran[-1] == "one" else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_pinned_table_stands_for_all_of_the_users_and_takes_effect_at_once(folder, tmp_path, monkeypatch):
    writing.save(table_of({"one": 1.0, "two": 2.0}))
    pin = tmp_path / "pinned.json"
    writing.write(table_of({"one": 2.0, "two": 1.0}), pin)
    ran = []
    with attnreg.register(spy("one", ran)), attnreg.register(spy("two", ran)):
        call()
        monkeypatch.setenv("ATTNREG_TABLE", str(pin))
        call()
        monkeypatch.setenv("ATTNREG_TABLE", str(tmp_path / "missing.json"))
        assert "missing.json is not used: it cannot be read" in str(attnreg.explain(*empty_tensors(), Window.causal(8)))
        monkeypatch.delenv("ATTNREG_TABLE")
        call()
    assert ran == ["one", "two", "one"]


def test_a_call_goes_by_the_table_of_as_many_threads_as_torch_has_now(folder, as_set):
    torch.set_num_threads(1)
    writing.save(table_of({"one": 1.0, "two": 2.0}))
    torch.set_num_threads(2)
    writing.save(table_of({"one": 2.0, "two": 1.0}))
    ran = []
    with attnreg.register(spy("one", ran)), attnreg.register(spy("two", ran)):
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            settles()
            call()
            assert attnreg.explain(*empty_tensors(), Window.causal(8)).backend == ran[-1]
    assert ran == ["two", "one", "two"]


def test_float32_figures_with_products_in_less_are_of_a_class_of_their_own(folder, as_set):
    window = Window.causal(8)
    exact, half = (
        table_of({"torch": 1.0, "torch_block": 2.0}),
        table_of({"torch": 1.0, "torch_block": 2.0}, dtype=torch.bfloat16),
    )
    writing.save(exact)
    torch.set_float32_matmul_precision("high")
    # Nothing else was measured: it serves, and that is said.
    decision = attnreg.explain(*empty_tensors(), window)
    assert (decision.backend, decision.source) == ("torch", "tuned")
    assert any("products in float32, here tf32" in remark for remark in decision.remarks)
    path = writing.save(table_of({"torch": 2.0, "torch_block": 1.0}).merged(half))
    assert store.load(path).environment.float32 == "tf32"
    decision = attnreg.explain(*empty_tensors(), window)
    assert (decision.backend, decision.remarks) == ("torch_block", ())
    torch.set_float32_matmul_precision("highest")
    # Never the other way round; what is no float32 is the same in both.
    decision = attnreg.explain(*empty_tensors(), window)
    assert decision.backend == "torch"
    assert any(f"{path.name} is not used: for float32" in remark for remark in decision.remarks)
    decision = attnreg.explain(*(each.bfloat16() for each in empty_tensors()), window)
    assert (decision.backend, decision.source, decision.remarks) == ("torch", "tuned", ())


def test_a_running_process_notices_that_the_precision_has_changed(folder, as_set):
    writing.save(table_of({"one": 1.0, "two": 2.0}))
    torch.set_float32_matmul_precision("high")
    writing.save(table_of({"one": 2.0, "two": 1.0}))
    ran = []
    with attnreg.register(spy("one", ran)), attnreg.register(spy("two", ran)):
        for precision in ("high", "highest", "high"):
            torch.set_float32_matmul_precision(precision)
            settles()
            call()
    assert ran == ["two", "one", "two"]


def test_the_users_table_as_one_leaves_out_float32_figures_of_another_precision(folder, as_set):
    single, half = table_of({"torch": 1.0}), table_of({"torch": 2.0}, dtype=torch.bfloat16)
    torch.set_float32_matmul_precision("high")
    writing.save(Table(here(), {**single.rows, **half.rows}))
    assert writing.own_table(CPU).rows == {**single.rows, **half.rows}
    torch.set_float32_matmul_precision("highest")
    assert writing.own_table(CPU) == half


def test_an_environment_in_which_products_are_exact_is_written_as_it_always_was(as_set):
    exact = here()
    assert "float32" not in exact.to_json()
    torch.set_float32_matmul_precision("high")
    assert here().to_json() == {**exact.to_json(), "float32": "tf32"}
    assert here().file_name != exact.file_name == replace(here(), float32=None).file_name
    assert from_json(to_json(Table(here()))).environment == here()


# Whatever a file holds


def hostile(change):
    """The text of a table with one row, changed as JSON."""
    given = json.loads(to_json(table_of({"torch": 1.0, "torch_block": 2.0})))
    change(given, given["rows"][0]["call"], given["rows"][0]["candidates"])
    rows = given.pop("rows")
    return json.dumps({**given, "rows": rows})


HUGE = int("9" * 400)
HOSTILE = {
    "a size of 400 digits": lambda t, call, c: call.update(key_length=HUGE),
    "a window of 400 digits": lambda t, call, c: call.update(window=[HUGE, 0]),
    "a window of three": lambda t, call, c: call.update(window=[1, 2, 3]),
    "a window of text": lambda t, call, c: call.update(window="11"),
    "a size that is true": lambda t, call, c: call.update(batch=True),
    "heads that do not divide": lambda t, call, c: call.update(heads=3, kv_heads=2),
    "an op that is a list": lambda t, call, c: call.update(op=["local_attention"]),
    "a dtype of integers": lambda t, call, c: call.update(dtype="int64"),
    "a dtype that is a module": lambda t, call, c: call.update(dtype="_inductor"),
    "a dtype that is a list": lambda t, call, c: call.update(dtype=[]),
    "a bias of one dimension": lambda t, call, c: call.update(given={"bias": {"shape": [1], "dtype": "float32"}}),
    "a bias of 400 digits": lambda t, call, c: call.update(
        given={"bias": {"shape": [1, 1, 1, HUGE], "dtype": "float32"}}
    ),
    "a bias without a shape": lambda t, call, c: call.update(given={"bias": {}}),
    "lengths of floats": lambda t, call, c: call.update(given={"key_lengths": {"shape": [1], "dtype": "float32"}}),
    "an argument that is none": lambda t, call, c: call.update(given={"\x1b[31m": {}}),
    "a given that is a list": lambda t, call, c: call.update(given=["bias"]),
    "an unknown part of a call": lambda t, call, c: call.update(evil=1),
    "a time of 400 digits": lambda t, call, c: c["torch"].update(seconds=HUGE),
    "a time that is true": lambda t, call, c: c["torch"].update(seconds=True),
    "a time that is no number": lambda t, call, c: c["torch"].update(seconds=float("nan")),
    "a time without end": lambda t, call, c: c["torch"].update(seconds=float("inf")),
    "a spread below 0": lambda t, call, c: c["torch"].update(spread=-1.0),
    "neither time nor reason": lambda t, call, c: c.update(torch={"measured": "2026-01-01"}),
    "a reason that is none": lambda t, call, c: c.update(torch={"reason": None, "measured": "2026-01-01"}),
    "a date in words": lambda t, call, c: c["torch"].update(measured="tomorrow"),
    "a date in other digits": lambda t, call, c: c["torch"].update(measured="\u0662\u0660\u0662\u0666-01-01"),
    "a date with an escape": lambda t, call, c: c["torch"].update(measured="2026-01-01\x1b[2J"),
    "a figure of another form": lambda t, call, c: c["torch"].update(evil="x"),
    "a figure that is passing": lambda t, call, c: c["torch"].update(passing=True),
    "a name with an escape": lambda t, call, c: c.update({"\x1b[31mtorch": c["torch"]}),
    "a name with half a pair": lambda t, call, c: c.update({"\ud800": c["torch"]}),
    "candidates that are a list": lambda t, call, c: t["rows"][0].update(candidates=[1, 2]),
    "many candidates": lambda t, call, c: c.update({f"x{n}": c["torch"] for n in range(1000)}),
    "rows that are an object": lambda t, call, c: t.update(rows={"a": 1}),
    "rows that are text": lambda t, call, c: t.update(rows="abc"),
    "a row with more in it": lambda t, call, c: t["rows"][0].update(evil=1),
    "a format that is true": lambda t, call, c: t.update(format=True),
    "a format of 400 digits": lambda t, call, c: t.update(format=HUGE),
    "a copy that takes no time": lambda t, call, c: t.update(copy_seconds=0),
    "a copy in words": lambda t, call, c: t.update(copy_seconds="fast"),
    "threads in words": lambda t, call, c: t["environment"].update(threads="many"),
    "threads of 400 digits": lambda t, call, c: t["environment"].update(threads=HUGE),
    "a version with an escape": lambda t, call, c: t["environment"].update(torch="2.13\x1b]0;evil\x07"),
    "a version with half a pair": lambda t, call, c: t["environment"].update(driver="\udfff"),
    "a version that turns writing round": lambda t, call, c: t["environment"].update(triton="3\u202e6"),
    "a version without end": lambda t, call, c: t["environment"].update(attnreg="0.1." + "0" * 10_000),
    "backends that are a list": lambda t, call, c: t["environment"].update(backends=["torch"]),
    "a backend from nowhere": lambda t, call, c: t["environment"].update(backends={"torch": None}),
    "backends with an escape": lambda t, call, c: t["environment"].update(backends={"torch": "\x1b[31m"}),
    "precision with an escape": lambda t, call, c: t["environment"].update(float32="\x9b31m"),
    "a device that torch does not know": lambda t, call, c: t["environment"]["device"].update(type="evil"),
    "a device with a number": lambda t, call, c: t["environment"]["device"].update(type="cpu:0"),
    "a device with an escape": lambda t, call, c: t["environment"]["device"].update(name="\x1b[31m"),
    "a device of more parts": lambda t, call, c: t["environment"]["device"].update(evil=1),
    "an environment of text": lambda t, call, c: t.update(environment="here"),
}


@pytest.mark.parametrize("layout", ["ours", "others"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_a_table_holds_it_is_not_used_because(folder, caplog, kind, layout):
    folder.mkdir()
    text = hostile(HOSTILE[kind])
    if layout == "ours":  # as it is read in steps
        text = text.replace('"rows": [{"call"', '"rows": [\n    {"call"')
        text = f"{text[:-2]}\n  ]\n}}\n" if text.endswith("]}") else text
    (folder / "x.json").write_text(text)
    modules = {name for name in sys.modules if name.startswith("torch.")}
    assert call().shape == (1, 2, 64, 8)
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert decision.source == "heuristic"
    # Of a table as attnreg writes it, the rows of another kind than the call's are not read.
    is_read = layout == "others" or kind not in ("a dtype of integers", "a dtype that is a module")
    assert len(decision.remarks) == is_read
    for remark in decision.remarks:
        assert remark.startswith("the table x.json is not used: ")
        assert len(remark) < 400
    assert str(decision).replace("\n", "").isprintable()
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert {name for name in sys.modules if name.startswith("torch.")} == modules
    with pytest.raises(TableError):
        store.load(folder / "x.json")


def test_a_reason_is_shown_without_what_a_terminal_obeys(folder):
    folder.mkdir()
    reason = "Error: \x1b[31m\ud800\u202e" + "long " * 1000

    def change(table, call, candidates):
        candidates["other"] = {"reason": reason, "measured": "2026-01-01"}

    (folder / "x.json").write_text(hostile(change))
    with attnreg.register(as_torch_block("other")):
        decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert decision.source == "tuned"
    assert str(decision).replace("\n", "").isprintable()
    assert "not timed: Error: \\x1b[31m\\ud800\\u202elong" in str(decision)
    assert len(str(decision)) < 3000


def test_a_file_may_have_any_name(folder):
    folder.mkdir()
    (folder / "\x1b[31m.json").write_text("no table")
    os.close(os.open(os.fsencode(folder) + b"/\xff.json", os.O_CREAT))
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert len(decision.remarks) == 2
    assert str(decision).replace("\n", "").isprintable()


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "folder", "link to itself", "large", "sparse"])
def test_what_is_no_regular_file_or_too_large_is_not_read(folder, tmp_path, monkeypatch, kind):
    folder.mkdir()
    path = folder / "x.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "device":
        monkeypatch.setenv("ATTNREG_TABLE", "/dev/zero")
        path = Path("zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        path.write_text(to_json(table_of({"torch": 1.0})) + (" " * MOST_BYTES if kind == "large" else ""))
        if kind == "sparse":
            os.truncate(path, 2**40)
    start = time.monotonic()
    assert call().shape == (1, 2, 64, 8)
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert time.monotonic() - start < 2
    assert any(f"{path.name} is not used" in remark for remark in decision.remarks)


def large_table(count, **changes):
    calls = [as_measured(problem(8, length=64 + number, **changes)) for number in range(count)]
    figures = {
        "torch": Figure(seconds=1.0, measured="2026-01-01"),
        "torch_block": Figure(seconds=2.0, measured="2026-01-01"),
    }
    return Table(here(), dict.fromkeys(calls, figures))


def test_a_table_of_too_many_rows_is_not_used_and_none_is_written(folder, monkeypatch):
    folder.mkdir()
    (folder / "x.json").write_text(to_json(large_table(MOST_ROWS + 1)))
    assert any(
        f"it has {MOST_ROWS + 1} rows" in each for each in attnreg.explain(*empty_tensors(), Window.causal(8)).remarks
    )
    with pytest.raises(TableError, match=f"it has {MOST_ROWS + 1} rows"):
        from_json((folder / "x.json").read_text())
    monkeypatch.setattr(writing, "MOST_ROWS", 3)
    old = large_table(3)
    writing.save(old)
    path = writing.save(table_of({"torch": 1.0}, window=40))
    rows = store.load(path).rows
    assert len(rows) == 3
    assert as_measured(problem(40)) in rows
    monkeypatch.setattr(writing, "MOST_BYTES", 2000)
    writing.write(large_table(40), path)
    assert 0 < len(path.read_text()) <= 2000
    assert store.load(path).rows


def test_the_largest_table_costs_a_first_call_half_a_second_and_a_plan_some_milliseconds(folder):
    folder.mkdir()
    (folder / "x.json").write_text(to_json(large_table(MOST_ROWS)))
    start = time.thread_time()
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).source == "tuned"
    first = time.thread_time() - start
    start = time.thread_time()
    for size in range(2, 22):
        call(window=size, length=100)
    assert first < 2  # four times what it takes
    assert (time.thread_time() - start) / 20 < 0.02


def in_one_line(table):
    given = json.loads(to_json(table))
    return json.dumps({**given, "rows": given["rows"]}, separators=(",", ":"))


def of_late_faults():
    return to_json(large_table(50)).replace('"seconds": 1.0', '"seconds": "x"', 1)


def junk_before_rows(size):
    return '{"format":2,"environment":{"a":[' + ",".join(["[]"] * (size // 3)) + ']},"rows":[]}'


def junk_rows(size):
    return in_one_line(Table(here())).replace('"rows":[', '"rows":[' + ",".join(["[]"] * (size // 3)), 1)


# By what is in the folder, how many files of it there are, and what they hold.
FOLDERS = {
    "junk before the rows": (64, lambda: junk_before_rows(MOST_BYTES - 100)),
    "junk in many heads": (64, lambda: junk_before_rows(2**16 - 100)),
    "junk for rows": (64, lambda: junk_rows(MOST_BYTES - 2000)),
    "a little junk for rows": (64, lambda: junk_rows(2**15)),
    "lists in lists": (64, lambda: "[" * (MOST_BYTES - 1)),
    "large ones": (64, lambda: to_json(large_table(MOST_ROWS))),
    "large ones in one line": (64, lambda: in_one_line(large_table(MOST_ROWS // 2))),
    "late faults": (64, of_late_faults),
    "many": (4096, lambda: "{}"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_no_folder_makes_a_first_call_wait(folder, kind):
    folder.mkdir()
    count, make = FOLDERS[kind]
    text = make()
    assert len(text) <= MOST_BYTES
    (folder / "0.json").write_text(text)
    for number in range(1, count):
        os.link(folder / "0.json", folder / f"{number}.json")
    start = time.thread_time()
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert time.thread_time() - start < 2  # four times what it takes
    assert decision.remarks
    assert decision.source == ("tuned" if "large" in kind else "heuristic")


def test_of_more_than_can_be_parsed_for_a_call_the_newest_are_used_and_that_is_said(folder, monkeypatch, caplog):
    folder.mkdir()
    ages = {"older": 3e9, "newest": 2e9, "newer": 1.5e9, "old": 1e9}  # the first is of the future
    for name, age in ages.items():
        (folder / f"{name}.json").write_text(to_json(large_table(40)))
        os.utime(folder / f"{name}.json", (age,) * 2)
    # What is never parsed for a call of one kind counts for nothing.
    rows = {**large_table(40).rows, **large_table(40, dtype=torch.bfloat16).rows}
    (folder / "newest.json").write_text(to_json(Table(here(), rows)))
    os.utime(folder / "newest.json", (1.6e9,) * 2)
    monkeypatch.setattr(store, "MOST_PARSED", 2.5 * len(to_json(large_table(40))))
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert decision.source == "tuned"
    (record,) = caplog.records
    assert (
        f"of 4 tables of this device the 2 newest are used, as all would keep calls waiting: remove some of {folder}"
        in (record.getMessage())
    )
    stored, _ = registry.tables.stored(here(), of_float32=True)
    assert {each.name for each in stored} == {"newest.json", "newer.json"}


def test_of_more_than_can_be_read_the_newest_are_used_and_that_is_said(folder, monkeypatch):
    folder.mkdir()
    text = to_json(table_of({"torch": 1.0, "torch_block": 2.0}))
    for number in range(5):
        (folder / f"{number}.json").write_text(text)
        os.utime(folder / f"{number}.json", (1e9 + number,) * 2)
    # One that is too large is not read, and leaves room for others.
    (folder / "large.json").write_text(text + " " * MOST_BYTES)
    monkeypatch.setattr(store, "MOST_BYTES_READ", 2 * len(text))
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert any("of 6 tables the 3 newest are used: remove some of" in each for each in decision.remarks)
    stored, _ = registry.tables.stored(here(), of_float32=True)
    assert {each.name for each in stored} == {"3.json", "4.json"}


def test_a_table_whose_environment_does_not_come_first_is_read_if_it_is_short():
    table = table_of({"torch": 1.0})
    given = json.loads(to_json(table))
    text = json.dumps({name: given[name] for name in ("rows", "format", "environment")})
    assert from_json(text) == table
    with pytest.raises(TableError, match="its first 65536 characters hold no format and environment"):
        from_json(text + " " * 2**16)


def test_of_a_backend_that_is_called_rows_the_table_is_read():
    table = replace(table_of({"rows": 1.0}), environment=replace(here(), backends={"rows": "x 1"}))
    assert from_json(to_json(table)) == table


@pytest.mark.parametrize("error", [TypeError("boom"), MemoryError(), AttributeError("\x1b[31m")])
def test_whatever_goes_wrong_as_a_table_is_read_it_is_not_used_because(folder, monkeypatch, error):
    writing.save(table_of({"torch": 1.0, "torch_block": 2.0}))

    def fail(*_):
        raise error

    for where, name in ((store, "TableText"), (store, "_read"), (TableText, "_of_kind"), (TableText, "_row")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fail)
            registry.tables.forget()
            decision = attnreg.explain(*empty_tensors(), Window.causal(8))
        assert decision.source == "heuristic"
        assert any("is not used: " in each and type(error).__name__ in each for each in decision.remarks)
        assert str(decision).replace("\n", "").isprintable()


@pytest.mark.parametrize("target", ["/proc/self/status", "/proc/self/mem", "/proc/self/pagemap"])
def test_what_the_kernel_makes_up_is_no_table(folder, target):
    if not os.path.exists(target):
        pytest.skip(f"there is no {target}")
    folder.mkdir()
    (folder / "x.json").symlink_to(target)
    for _ in range(2):
        registry.tables.forget()
        (remark,) = attnreg.explain(*empty_tensors(), Window.causal(8)).remarks
        assert remark.startswith("the table x.json is not used: ")


def test_a_file_that_has_nothing_to_give_now_is_no_table(folder, monkeypatch):
    path = writing.save(table_of({"torch": 1.0}))

    class Empty(io.BytesIO):
        def read(self, size=-1):
            return None  # as where reading would wait

    monkeypatch.setattr("builtins.open", lambda *_, **__: Empty())
    with pytest.raises(TableError, match="it cannot be read now"):
        store.load(path)


def test_what_cannot_be_read_is_left_open_by_nobody(folder):
    folder.mkdir()
    (folder / "folder.json").mkdir()
    (folder / "text.json").write_text("no table")
    os.mkfifo(folder / "pipe.json")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        registry.tables.forget()
        assert len(attnreg.explain(*empty_tensors(), Window.causal(8)).remarks) == 3
    assert len(os.listdir("/proc/self/fd")) <= before


def test_no_device_is_opened(folder, monkeypatch):
    folder.mkdir()
    (folder / "x.json").symlink_to("/dev/null")
    opened = []
    monkeypatch.setattr(store.os, "open", lambda path, *_: opened.append(path))
    with pytest.raises(TableError, match="it is no regular file"):
        store.load(folder / "x.json")
    assert not opened


def test_of_many_tables_the_newest_are_used_and_that_is_said(folder):
    folder.mkdir()
    text = to_json(table_of({"torch": 1.0, "torch_block": 2.0}))
    for number in range(store.MOST_FILES + 3):
        path = folder / f"{number:03}.json"
        path.write_text(text)
        os.utime(path, (1e9 + number,) * 2)
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert decision.source == "tuned"
    assert any(
        f"of {store.MOST_FILES + 3} tables the {store.MOST_FILES} newest are used" in each for each in decision.remarks
    )
    stored, _ = registry.tables.stored(here(), of_float32=True)
    assert {each.name for each in stored}.isdisjoint(("000.json", "001.json", "002.json"))


def test_a_date_in_the_future_goes_before_nothing():
    key = as_measured(problem())
    future, now = Figure(seconds=1.0, measured="9999-01-01"), Figure(seconds=2.0, measured="2026-01-01")
    tables = [Table(here(), {key: {"x": figure}}) for figure in (future, now)]
    for first, second in (tables, tables[::-1]):
        assert first.merged(second).rows[key]["x"] is now


FUTURE = "9999-12-31T23:59:59.000000+00:00"


def of_the_future(count, **changes):
    rows = {key: {"x": Figure(seconds=1.0, measured=FUTURE)} for key in large_table(count, **changes).rows}
    return Table(here(), rows)


def test_what_was_just_measured_is_in_the_file_whatever_was_there(folder, monkeypatch):
    monkeypatch.setattr(writing, "MOST_ROWS", 3)
    path = folder / here().file_name
    folder.mkdir()
    path.write_text(to_json(of_the_future(3)))
    for window, date in ((40, "2026-01-01"), (41, ""), (42, FUTURE)):  # a clock may be wrong, too
        table = Table(here(), {as_measured(problem(window)): {"torch": Figure(seconds=1.0, measured=date)}})
        assert writing.save(table) == path
        assert len(store.load(path).rows) == 3
        assert table.rows.items() <= store.load(path).rows.items()
    # Nor is it left out of a file that would be too large.
    monkeypatch.setattr(writing, "MOST_ROWS", 100)
    path.write_text(to_json(large_table(100)))
    monkeypatch.setattr(writing, "MOST_BYTES", 3000)
    table = Table(here(), {as_measured(problem(43)): {"torch": Figure(seconds=1.0)}})
    writing.save(table)
    assert table.rows.items() <= store.load(path).rows.items()


def test_a_row_takes_what_was_just_measured_however_many_candidates_it_has(folder):
    key = as_measured(problem())
    many = {f"x{number}": Figure(seconds=1.0, measured=FUTURE) for number in range(MOST_CANDIDATES)}
    new = {name: Figure(seconds=1.0, measured="2026-01-01") for name in ("torch", "torch_block")}
    folder.mkdir()
    (folder / here().file_name).write_text(to_json(Table(here(), {key: many})))
    figures = store.load(writing.save(Table(here(), {key: new}))).rows[key]
    assert new.items() <= figures.items()
    assert len(figures) == MOST_CANDIDATES


def test_of_more_kinds_of_call_than_are_looked_through_those_of_the_future_go_first():
    rows = {**of_the_future(MOST_SHAPES + 100).rows, **table_of({"torch": 1.0}, length=7).rows}
    (found, *_) = measured(problem(length=7), [Stored(Table(here(), rows), "tuned", "t", ())])
    assert set(found.figures) == {"torch"}
    assert "nearest" not in found.text
    (found,) = measured(problem(), [Stored(of_the_future(1), "tuned", "t", ())])
    assert found.text == "t, no date"


def test_a_copy_that_takes_less_time_than_any_can_is_none_and_is_not_kept(folder):
    table = table_of({"torch": 1.0})
    path = writing.save(replace(table, copy_seconds=1e-12))
    assert store.load(path).copy_seconds is None
    writing.save(replace(table, copy_seconds=2.0))
    assert store.load(path).copy_seconds == 2.0
    assert '"copy_seconds": 2.0' in path.read_text()


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
    decision = attnreg.explain(*empty_tensors(2048), Window.causal(32))
    # Where nothing can be compiled the entry's other candidate is chosen.
    assert decision.source == "shipped"
    assert decision.backend in ("attnreg_cpu", "torch_block")
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
    (said,) = before.soft_mismatches(now, of_float32=True)
    assert (
        said
        == f"the backend torch_block of {entry.distribution}, pluggy 0.1, here {entry.distribution}, pluggy {version}"
    )
    # Where it is not installed the backend cannot run, and what another one was measured with is of no account.
    assert environment(CPU, [without_it]).backends == {}
    assert now.soft_mismatches(environment(CPU, [without_it]), of_float32=True) == ()


def test_an_environment_is_described_by_what_it_runs_on():
    found = here()
    assert found.device.type == "cpu"
    assert found.torch == torch.__version__
    assert found.backends["torch"].startswith("attnreg ")
    assert isinstance(json.loads(to_json(Table(found)))["environment"], dict)
    assert Environment(**found.__dict__).file_name == found.file_name
    with pytest.raises(TableError):
        from_json("{}")
