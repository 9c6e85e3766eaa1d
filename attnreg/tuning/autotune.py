"""Tuning on first use: a call of a class that was never measured here is measured once, and then remembered."""

from __future__ import annotations

import threading

import torch

from attnreg.backend import refusals
from attnreg.measuring.task import Task
from attnreg.problem import Problem
from attnreg.registry import registry
from attnreg.tuning.environment import environment
from attnreg.tuning.lookup import same_class
from attnreg.tuning.store import keep, pinned, report, tables
from attnreg.tuning.table import Table, key_of
from attnreg.tuning.tune import SAMPLING_SECONDS, measure_all

_one_at_a_time = threading.Lock()


def tune_on_first_use(problem: Problem) -> bool:
    """Measure the candidates for ``problem``, if none of the user's tables has.

    Returns:
        Whether the matter is settled. Where measuring would do harm it is put off, to be asked again at the next call: during
        the capture of a CUDA graph, in what torch compiles, and while torch is to be deterministic, as another choice may
        round otherwise.
    """
    task = task_of(problem)
    if task is None or pinned() is not None:
        return True
    if _would_do_harm(problem.device):
        return False
    with _one_at_a_time:
        entries = registry.entries
        names = {entry.backend.name for entry in entries if not refusals(entry.backend, problem)}
        here = environment(problem.device, entries)
        own = [each.table for each in tables(here)[0] if each.source == "tuned"]
        if len(names) < 2 or _is_known(problem, names, own):
            return True
        figures = {
            step.backend: step.figure
            for step in measure_all([task], [problem.needs_grad], problem.device, seconds=SAMPLING_SECONDS)
        }
        fault = keep(Table(here, {key_of(problem): figures}))
        if fault is not None:
            report([f"what was measured is kept in this process only: {fault}"])
    return True


def task_of(problem: Problem) -> Task | None:
    """The task that measures ``problem``; None where a measurement does not model it: Lq and Lk, or E and D, differ."""
    head_dims = {problem.head_dim, problem.value_dim} - {0}
    if problem.query_length != problem.key_length or len(head_dims) != 1 or not problem.query_length:
        return None
    return Task(
        op=problem.op,
        batch=problem.batch,
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        length=problem.query_length,
        head_dim=head_dims.pop(),
        window=problem.window,
        dtype=problem.dtype,
    )


def _is_known(problem: Problem, names: set[str], own: list[Table]) -> bool:
    wanted = key_of(problem)
    return any(
        same_class(key, wanted) and names <= figures.keys() for table in own for key, figures in table.rows.items()
    )


def _would_do_harm(device: torch.device) -> bool:
    if torch.are_deterministic_algorithms_enabled() or torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
