"""Tuning on first use: a call of a class that was never measured here is measured once, and then remembered."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import torch

from attnreg.backend import THIS_PROCESS, refusals
from attnreg.problem import Problem
from attnreg.registry import registry
from attnreg.tables.call import as_measured
from attnreg.tables.environment import Environment, environment
from attnreg.tables.lookup import Rows, same_class
from attnreg.tables.store import pinned
from attnreg.tables.table import Table, TableError
from attnreg.testing.oracle import knows
from attnreg.tuning.tune import SAMPLING_SECONDS, measure_all
from attnreg.tuning.worker import NoPython
from attnreg.tuning.writing import CALL_SECONDS, check_writable, keep

# Whether this process was forked from one that may have had threads of torch's.
_is_forked = False
# A backend that is measured in this process may make calls of its own, and these be measured first.
_one_at_a_time = threading.RLock()


def tune_on_first_use(problem: Problem) -> bool:
    """Measure the candidates for ``problem``, if none of the user's tables has.

    Returns:
        Whether the matter is settled, as it is where no result could be judged. Where measuring would do harm it is put off, to
        be asked again at the next call: during the capture of a CUDA graph, in what torch compiles, and while torch is to be
        deterministic, as another choice may round otherwise.
    """
    if pinned() is not None or not knows(problem):
        return True
    if _would_do_harm(problem.device):
        return False
    with _one_at_a_time:
        entries = registry.entries
        names = {entry.backend.name for entry in entries if not refusals(entry.backend, problem)}
        here = environment(problem.device, entries)
        stored, _ = registry.tables.stored(here, of_float32=problem.dtype is torch.float32)
        own = [each.table for each in stored if each.source == "tuned"]
        if len(names) < 2 or _is_known(problem, names, own, here):
            return True
        in_process = {entry.backend.name for entry in entries if entry.distribution == THIS_PROCESS} & names
        if _is_forked and in_process:
            listed = ", ".join(sorted(in_process))
            registry.tables.report(
                [f"{listed}: not measured in a forked process, where torch's threads may wait for ever"]
            )
            return True
        try:
            check_writable(here, CALL_SECONDS)
        except OSError as error:
            registry.tables.report([f"what is measured on first use is kept in this process only: {error}"])
        try:
            figures = {step.backend: step.figure for step in measure_all([problem], seconds=SAMPLING_SECONDS)}
        except NoPython as error:
            registry.tables.report([f"nothing is measured on first use: {error}"])
            return True
        fault = keep(Table(here, {as_measured(problem): figures}))
        if fault is not None:
            registry.tables.report([f"what was measured on first use is kept in this process only: {fault}"])
    return True


def _is_known(problem: Problem, names: set[str], own: list[Rows], here: Environment) -> bool:
    for table in own:
        if problem.dtype is torch.float32 and table.environment.float32 != here.float32:
            continue
        with suppress(TableError):  # found to be none only now: it is told when a plan is made
            rows = table.of_kind(problem.op, frozenset((problem.dtype,)), problem.needs_grad)
            if any(same_class(call, problem) and names <= figures.keys() for call, figures in rows):
                return True
    return False


def _would_do_harm(device: torch.device) -> bool:
    if torch.are_deterministic_algorithms_enabled() or torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _after_fork() -> None:
    """In a forked child: a thread that was measuring is not there to finish, nor are those that computed."""
    global _one_at_a_time, _is_forked
    _one_at_a_time, _is_forked = threading.RLock(), True


os.register_at_fork(after_in_child=_after_fork)
