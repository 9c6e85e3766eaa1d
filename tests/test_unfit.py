"""Backends that can run a call and are not to be chosen for it: measured as wrong, or too large for the memory there is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tabled import as_torch_block, empty_tensors, here, problem, table_of

import attnreg
from attnreg import Window, dispatch
from attnreg.composition import workspace
from attnreg.device import memory_bytes
from attnreg.measured import Figure
from attnreg.plan import explain_problem
from attnreg.printable import type_name
from attnreg.registry import registry
from attnreg.tables.call import as_measured
from attnreg.tables.table import Table
from attnreg.tuning import writing


def test_a_backend_that_was_measured_as_wrong_is_not_chosen_unless_it_is_asked_for(folder):
    wrong = Figure(reason="wrong: output: relative error 1.0e+00 exceeds 1.0e-06", measured="2026-01-01")
    # Nearer than NEAR, with no time of the others: the heuristic would choose it.
    writing.save(Table(here(), {as_measured(problem(10)): {"torch_block": wrong}}))
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert (decision.backend, decision.source) == ("torch", "heuristic")
    assert "its result was measured as wrong: output: relative error" in str(decision)
    assert attnreg.explain(*empty_tensors(), Window.causal(8), backend="torch_block").backend == "torch_block"
    query, key, value = torch.randn(1, 2, 64, 8), torch.randn(1, 1, 64, 8), torch.randn(1, 1, 64, 8)
    attnreg.local_attention(query, key, value, Window.causal(8))
    assert {each.backend.name for each in registry.chosen.values()} == {"torch"}
    # One measured right at a nearer call counts.
    writing.save(table_of({"torch": 2.0, "torch_block": 1.0}, window=8))
    assert attnreg.explain(*empty_tensors(), Window.causal(8)).backend == "torch_block"


def test_where_all_were_measured_as_wrong_a_call_is_refused_unless_it_asks_for_one(folder):
    wrong = Figure(reason="wrong: output: relative error 1.0e+00 exceeds 1.0e-06", measured="2026-01-01")
    writing.save(Table(here(), {as_measured(problem(8)): {"torch": wrong, "torch_block": wrong}}))
    query, key, value = torch.randn(1, 2, 64, 8), torch.randn(1, 1, 64, 8), torch.randn(1, 1, 64, 8)
    for refused in (attnreg.explain, attnreg.local_attention):
        with pytest.raises(attnreg.BackendError, match=r"torch_block:\n.*its result was measured as wrong"):
            refused(query, key, value, Window.causal(8))
    assert attnreg.local_attention(query, key, value, Window.causal(8), backend="torch").shape == query.shape


def test_a_candidate_measured_alone_is_not_chosen_and_that_is_said(folder):
    writing.save(table_of({"torch": 1.0}))
    decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert decision.backend == "torch_block"
    assert "torch was measured alone, which compares nothing: tune the others, too" in decision.reason


def test_no_entry_chooses_a_backend_that_needs_more_memory_than_there_is(folder, monkeypatch):
    writing.save(
        table_of({"torch": 1.0, "torch_block": 2.0}, window=512, length=4096, heads=8, kv_heads=8, head_dim=64)
    )
    large = problem(512, length=16384, heads=8, kv_heads=8, head_dim=64)
    monkeypatch.setattr(dispatch, "memory_bytes", lambda type, index: 24 * 2**30)
    decision = explain_problem(large, None)
    assert (decision.backend, decision.source) == ("torch_block", "tuned")
    assert "it needs 32.0 GiB beside the tensors; cpu has 24.0 GiB, of which a call may take 50%" in str(decision)
    assert explain_problem(large, "torch").backend == "torch"
    monkeypatch.setattr(dispatch, "memory_bytes", lambda type, index: 128 * 2**30)
    assert explain_problem(large, None).backend == "torch"
    monkeypatch.setattr(dispatch, "memory_bytes", lambda type, index: 2**28)  # too little for each: a call goes on
    assert explain_problem(large, None).backend == "torch"


def test_a_window_wider_than_the_sequences_needs_no_more_memory(folder):
    """It is cut before a backend sees it."""
    assert (
        explain_problem(problem(10**9, length=6), None).backend == explain_problem(problem(6, length=6), None).backend
    )


def test_a_workspace_that_raises_is_a_reason_against_its_backend(folder):
    def unable(problem):
        raise SystemExit("boom")

    with attnreg.register(as_torch_block("bad", rank=1, workspace=unable)):
        decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert decision.backend == "torch_block"
    assert "its workspace() raised SystemExit: boom" in str(decision)


@pytest.mark.parametrize(
    "answer",
    [-5, True, "12", None, float("nan"), 1e300, 4096.0, 10**308, 10**400, 10**5000, 2**63, [], torch.ones(2)],
    ids=type_name,
)
def test_a_workspace_that_is_no_number_of_bytes_is_a_reason_against_its_backend(folder, answer):
    with attnreg.register(as_torch_block("bad", rank=1, workspace=lambda problem: answer)):
        decision = attnreg.explain(*empty_tensors(), Window.causal(8))
        assert attnreg.explain(*empty_tensors(), Window.causal(8), backend="bad").backend == "bad"
    assert decision.backend == "torch_block"
    (bad,) = (candidate for candidate in decision.candidates if candidate.name == "bad")
    assert "its workspace() raised " in bad.refusals[0]
    assert len(bad.refusals[0]) < 200


@pytest.mark.parametrize("answer", [0, 4096, torch.tensor(4096)])
def test_a_workspace_is_an_integer_of_any_kind(answer):
    assert workspace(as_torch_block("good", workspace=lambda problem: answer), problem(8)) == int(answer)


def test_the_largest_workspace_is_told_in_few_figures(folder):
    with attnreg.register(as_torch_block("vast", rank=1, workspace=lambda problem: 2**63 - 1)):
        decision = attnreg.explain(*empty_tensors(), Window.causal(8))
    assert "it needs 8589934592.0 GiB beside the tensors" in str(decision)


def test_the_memory_of_a_device_that_is_not_there_is_not_known(monkeypatch):
    def properties(index):
        raise AssertionError("Invalid device id")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert memory_bytes.__wrapped__("cuda", 99) is None


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("name", ["torch", "torch_block", "composed"])
def test_the_workspace_of_a_backend_is_about_what_it_takes(folder, name, grad):
    code = """
import re, sys, torch, attnreg
from attnreg import Window
from tabled import as_torch_block
attnreg.register(as_torch_block("composed", local_attention=None, local_attention_backward=None))
def run(length):
    q, k, v = (torch.randn(1, 4, length, 64, requires_grad=sys.argv[2] == "True") for _ in range(3))
    # Scores too large for the kernel that torch_block calls where it can, and which needs much less.
    out = attnreg.local_attention(q, k, v, Window.causal(256), scale=100.0, backend=sys.argv[1])
    if out.requires_grad: out.sum().backward()
def peak():  # of this process alone: ru_maxrss begins with that of the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
run(256)
before = peak()
run(4096)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(grad)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    taken = int(done.stdout)
    parts = {"local_attention": None, "local_attention_backward": None}
    block = as_torch_block("composed", **(parts if name == "composed" else {}))
    (backend,) = [e.backend for e in registry.entries if e.backend.name == name] or [block]
    said = workspace(backend, problem(256, length=4096, heads=4, kv_heads=4, head_dim=64, grad=grad))
    assert 0.4 * taken < said < 3 * taken, (said / 2**20, taken / 2**20)
