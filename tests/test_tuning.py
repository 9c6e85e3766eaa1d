"""Tables of measured times: what they hold, which entry serves a call, and how they are measured, kept and shown."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

import attnreg
from attnreg import Backend, Capability, Window
from attnreg.cli import app
from attnreg.dispatch import TIE, Entry, choose
from attnreg.measured import Figure, Measured
from attnreg.measuring import steadiness
from attnreg.measuring.timing import cache_bytes
from attnreg.problem import OPS, attention_problem
from attnreg.registry import registry
from attnreg.tuning import command, store
from attnreg.tuning.candidate import Measurement
from attnreg.tuning.environment import Device, Environment, environment
from attnreg.tuning.lookup import FAR, NEAR, distance, measured, same_class
from attnreg.tuning.table import Table, TableError, from_json, key_of, problem_of, to_json
from attnreg.tuning.worker import Worker

CPU = torch.device("cpu")
SHIPPED = sorted(store.SHIPPED.glob("*.json"))  # before the tests are kept from them
SMALL = {"ops": ["local_attention"], "dtypes": [torch.float32], "head_dims": [8], "lengths": [64], "heads": [(2, 1)]}


def problem(window=8, length=64, head_dim=8, heads=2, kv_heads=1, dtype=torch.float32, grad=False):
    query = torch.empty(1, heads, length, head_dim, dtype=dtype)
    key = torch.empty(1, kv_heads, length, head_dim, dtype=dtype)
    return attention_problem(query, key, key, Window.causal(window), bias=None, key_lengths=None, needs_grad=grad)


def call(window=8, length=64, **options):
    query, key = torch.ones(1, 2, length, 8), torch.ones(1, 1, length, 8)
    return attnreg.local_attention(query, key, key, Window.causal(window), **options)


def here():
    return environment(CPU, registry.entries)


def table_of(times, **sizes):
    figures = {
        name: Figure(seconds=time, spread=time / 1000, measured="2026-01-01T00:00:00+00:00")
        for name, time in times.items()
    }
    return Table(here(), {key_of(problem(**sizes)): figures})


def as_torch_block(name, **changes):
    (block,) = (entry.backend for entry in registry.entries if entry.backend.name == "torch_block")
    return replace(block, name=name, **changes)


@pytest.fixture
def folder(tmp_path, monkeypatch, no_interpreter):
    """The user's tables lie here, and none is shipped."""
    monkeypatch.setattr(store, "table_dir", lambda: tmp_path / "tables")
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    store.forget()
    return tmp_path / "tables"


# What is chosen


def test_the_fastest_measured_backend_is_chosen_whatever_its_rank(folder):
    assert attnreg.explain(*_tensors(), Window.causal(8)).backend == "torch_block"
    store.save(table_of({"torch": 1e-3, "torch_block": 2e-3}))
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
    store.save(table_of({"torch": 1e-3, "torch_block": 2e-3}))
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
    assert distance(key_of(problem(**changes)), key_of(problem())) == float("inf")


def test_half_precisions_stand_in_for_each_other():
    ours, theirs = key_of(problem(dtype=torch.float16)), key_of(problem(dtype=torch.bfloat16))
    assert 0 < distance(theirs, ours) < NEAR
    assert not same_class(theirs, ours)


def test_the_nearest_entry_by_logarithm_serves_a_call(folder):
    table = table_of({"torch": 1.0, "torch_block": 2.0}, window=8).merged(
        table_of({"torch": 2.0, "torch_block": 1.0}, window=32)
    )
    store.save(table)
    found = {window: attnreg.explain(*_tensors(), Window.causal(window)).backend for window in (4, 8, 15, 17, 32, 60)}
    assert found == {4: "torch", 8: "torch", 15: "torch", 17: "torch_block", 32: "torch_block", 60: "torch_block"}


def test_an_entry_of_the_same_head_dim_goes_before_one_of_the_same_window():
    ours, other_window, other_head_dim = (key_of(problem(w, head_dim=e)) for w, e in ((8, 64), (64, 64), (8, 128)))
    assert distance(other_window, ours) < distance(other_head_dim, ours)


def test_an_entry_that_compares_nothing_leaves_the_call_to_the_next_one(folder):
    table = table_of({"torch": 1.0, "torch_block": 2.0}, window=8)
    store.save(table.merged(table_of({"torch_block": 1.0}, window=10)))
    decision = attnreg.explain(*_tensors(), Window.causal(10))
    assert (decision.backend, decision.source) == ("torch", "tuned")
    assert "the nearest entry, W=8" in decision.reason


def test_a_call_further_off_than_the_rule_allows_is_left_to_the_heuristic(folder):
    store.save(table_of({"torch": 1.0, "torch_block": 2.0}, window=2))
    tensors = _tensors(4096)
    assert attnreg.explain(*tensors, Window.causal(2)).source == "tuned"
    assert distance(key_of(problem(2)), key_of(problem(512, length=4096))) > FAR
    assert attnreg.explain(*tensors, Window.causal(512)).source == "heuristic"


def test_a_window_beyond_the_sequence_counts_as_far_as_it_reaches():
    assert key_of(problem(window=5000)).window == key_of(problem(window=64)).window == 64


def test_a_users_table_goes_before_a_shipped_one_even_if_less_near_as_long_as_it_is_near(folder):
    tuned, shipped = (
        table_of({"torch": 1.0, "torch_block": 2.0}, window=8),
        table_of({"torch": 2.0, "torch_block": 1.0}, window=12),
    )
    stored = [store.Stored(shipped, "shipped", "s", ()), store.Stored(tuned, "tuned", "t", ())]
    assert [each.source for each in measured(problem(12), stored)] == ["tuned", "shipped"]
    assert next(each.source for each in measured(problem(64), stored)) == "tuned"
    far = table_of({"torch": 1.0, "torch_block": 2.0}, window=1)
    stored[1] = store.Stored(far, "tuned", "t", ())
    assert [each.source for each in measured(problem(12), stored)] == ["shipped", "tuned"]


def test_sizes_within_a_quarter_of_an_octave_are_of_one_class():
    assert same_class(key_of(problem(32)), key_of(problem(36)))
    assert not same_class(key_of(problem(32)), key_of(problem(44)))


# Files


def test_a_table_survives_its_file():
    table = table_of({"torch": 1.0}).merged(
        Table(here(), {key_of(problem(9)): {"x": Figure(reason="no", measured="m")}})
    )
    assert from_json(to_json(table)) == table


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
        return text.replace('"window": 8', '"window": -8')
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
    path = store.save(table_of({"torch": 1.0, "torch_block": 2.0}))
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
    assert store.keep(table_of({"torch": 1.0, "torch_block": 2.0})) is not None
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
    store.save(Table(replace(table.environment, **changes), table.rows))
    decision = attnreg.explain(*_tensors(), Window.causal(8))
    assert decision.source == ("tuned" if used else "heuristic")
    if used:
        assert any(", here " in remark for remark in decision.remarks)
    elif "attnreg" in changes:
        assert any("attnreg 99.0" in remark for remark in decision.remarks)


def test_merging_keeps_both_and_of_the_same_the_one_measured_last():
    old = Figure(seconds=1.0, measured="2026-01-01")
    new = Figure(seconds=2.0, measured="2026-02-01")
    key = key_of(problem())
    first, second = Table(here(), {key: {"a": new, "b": old}}), Table(here(), {key: {"a": old, "c": old}})
    for merged in (first.merged(second), second.merged(first)):
        assert merged.rows == {key: {"a": new, "b": old, "c": old}}


def _save_many(folder, first):
    store.table_dir = lambda: folder
    for window in range(first, first + 12):
        store.save(table_of({"torch": 1.0}, window=window))


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


# A stale plan is a bug


def test_a_changed_table_takes_effect_on_the_next_call_in_every_thread_and_after_fork(folder):
    ran = []

    def spy(name):
        def forward(query, *arguments, **options):
            ran.append(name)
            return query.clone(), query[..., 0]  # nothing parallel: torch's threads do not survive a fork

        return as_torch_block(name, local_attention=forward, rank=1)

    with attnreg.register(spy("one")), attnreg.register(spy("two")):
        store.save(table_of({"one": 1.0, "two": 2.0}))
        call()
        store.save(Table(here(), {key_of(problem()): {"two": Figure(seconds=0.1, measured="2027")}}))
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert ran == ["one", "two", "two"]
        child = os.fork()
        if child == 0:
            try:
                store.save(Table(here(), {key_of(problem()): {"one": Figure(seconds=0.01, measured="2028")}}))
                call()
                os._exit(0 if ran[-1] == "one" else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_pinned_table_stands_for_all_of_the_users_and_takes_effect_at_once(folder, tmp_path, monkeypatch):
    store.save(table_of({"torch": 1.0, "torch_block": 2.0}))
    pin = tmp_path / "pinned.json"
    store.write(table_of({"torch": 2.0, "torch_block": 1.0}), pin)
    tensors, window = _tensors(), Window.causal(8)

    def chosen():
        attnreg.local_attention(*tensors, window)
        return list(registry.plans.values())[-1].backend

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
    assert {(step.backend, step.gradients) for step in seen} == {
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

    (task,) = grid(**{**SMALL, "batch": 1, "windows": [4]})
    with Worker(CPU) as worker:
        assert worker.measure(task, False, "torch", 0.01).figure.seconds
        patient, worker.longest = worker.longest, 5  # now that the child has started
        assert reason in worker.measure(task, False, name, 0.01).figure.reason
        worker.longest = patient
        assert worker.measure(task, False, "torch_block", 0.01).figure.seconds


@pytest.fixture
def copies(monkeypatch):
    """What the copies take that tell whether something else uses the device, one for each measurement in turn."""
    times = []

    def measure(self, task, gradients, backend, seconds):
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
    assert [(key.window, name) for key, name in found.disturbed] == disturbed


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
    store.write(foreign, tmp_path / "foreign.json")
    result = run("--import", str(tmp_path / "foreign.json"))
    assert result.exit_code == 0, result.output
    assert "calls on this machine do not go by it: it was measured on Another CPU (AVX9)" in result.output
    assert store.load(folder / foreign.environment.file_name) == foreign


def test_the_plot_marks_what_is_chosen_a_tie_by_rank(folder, tmp_path, monkeypatch):
    marked = {}
    monkeypatch.setattr(command, "plot", lambda table, chosen, *_: marked.update(chosen))
    near = {"torch": Figure(seconds=1.0, spread=0.1), "torch_block": Figure(seconds=1.02, spread=0.1)}
    far = {"torch": Figure(seconds=1.0, spread=0.1), "torch_block": Figure(seconds=1.2, spread=0.1)}
    keys = key_of(problem(4)), key_of(problem(8))
    store.save(Table(here(), dict(zip(keys, (near, far)))))
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
    monkeypatch.setattr(command, "plot", lambda table, *_: shown.extend(key.window for key in table.rows))
    figures = {"torch": Figure(seconds=1.0), "torch_block": Figure(seconds=2.0)}
    problems = (problem(4), problem(8), problem(16, heads=4, kv_heads=4, grad=True))
    store.save(Table(here(), {key_of(each): figures for each in problems}))
    command.plot_table(CPU, tmp_path / "p.png", **asked)
    assert set(shown) == drawn
    with pytest.raises(ValueError, match="the table has none of these calls"):
        command.plot_table(CPU, tmp_path / "p.png", windows=[5])


def test_whole_tables_are_exported_and_imported(folder, tmp_path):
    store.save(table_of({"torch": 1.0, "torch_block": 2.0}))
    result = run("--export", str(tmp_path / "x.json"), "--device", "cpu", "--window", "4")
    assert result.exit_code == 2
    assert "--export and --import take whole tables" in result.output


@pytest.mark.parametrize("sizes", [{}, {"grad": True}, {"heads": 4, "kv_heads": 1}, {"window": 500}])
def test_a_key_is_that_of_a_call(sizes):
    key = key_of(problem(**sizes))
    assert key_of(problem_of(key, CPU)) == key


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
    assert {(key.op, key.gradients) for key in table.rows} == {(op, g) for op in OPS for g in (False, True)}
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
        "print(*(name for name in sys.modules if name.startswith(('attnreg.measuring', 'attnreg.tuning.tune', 'matplotlib'))))"
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
