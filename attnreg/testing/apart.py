"""The kit in a process of its own: a backend that ends it, or hangs, breaks the property that was tried, and takes nothing along.

The process tells each case before the backend hears of it, and what it found of each property. Where it ends, or says nothing
for too long, another one goes on with the next property. What it writes is pickled: it runs the code of plug-ins that this
process has imported too, for the same user.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch

from attnreg.backend import THIS_PROCESS
from attnreg.registry import registry
from attnreg.request import parse_request
from attnreg.testing.case import Case
from attnreg.testing.conformance import Finding, Report, chosen_properties, find_out, report
from attnreg.testing.property import Failure, Property
from attnreg.testing.subject import find, under_test
from attnreg.tuning.worker import STARTING_SECONDS, NoPython, python

# A case may take that long; on a GPU the first one of a kernel compiles it.
LIMIT_SECONDS = 120.0
# After so many properties in which a case took longer the others are not tried: each may cost as much.
MOST_HANGS = 3
# It is looked so often whether the process is still there.
_TICK_SECONDS = 0.05
# A killed process is waited for no longer: one that hangs in a driver cannot be ended.
_ENDING_SECONDS = 5.0

# OpenMP's threads that have nothing to do are to sleep: calls are tiny, and where others use the cores, too, threads that spin
# take ten times as long. How much is computed by how many threads stays as it is.
_SLEEPY = {"OMP_WAIT_POLICY": "passive"}
_NOT_FOR_THE_CHILD = ("ATTNREG_BACKEND", "ATTNREG_AUTOTUNE", "PYTHONINSPECT", "PYTHONSTARTUP")
# As in attnreg.tuning.worker: the path of imports is the parent's, and set before anything is imported.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from attnreg.testing.apart import main; main(int(sys.argv[1]), sys.argv[2])"
)
_SAFE_PATH = ("-P",) if sys.version_info >= (3, 11) else ()
_SIZE = struct.Struct(">I")


class NoProcess(RuntimeError):
    """No process to test in begins; the message says why."""


@dataclass(frozen=True)
class Step:
    """What a process is about to do.

    Attributes:
        property: the property that is tried; None where it has just begun.
        case: with which case.
        done: how many cases were tried.
        total: how many there are; 0 while they are chosen.
    """

    property: Property | None = None
    case: Case | None = None
    done: int = 0
    total: int = 0


def why_not_apart(backend: str) -> str | None:
    """Why a backend, by name, cannot be tested in a process of its own; None where it can."""
    name = parse_request(backend).name
    if any(entry.backend.name == name and entry.distribution == THIS_PROCESS for entry in registry.entries):
        return f"{name} was registered in this process"
    try:
        python()
    except NoPython as error:
        return str(error)
    return None


def conform_apart(
    backend: str,
    *,
    device: str | torch.device = "cpu",
    quick: bool = False,
    properties: Iterable[str] | None = None,
    shrink: bool = True,
    limit: float = LIMIT_SECONDS,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    found: Callable[[Finding], None] = lambda finding: None,
) -> Report:
    """As :func:`attnreg.testing.conform` in a process of its own, of a backend that is installed.

    Args:
        backend: its name, with options or without.
        device: as there.
        quick: as there.
        properties: as there.
        shrink: as there.
        limit: seconds that a case may take.
        progress: as there.
        found: as there.

    Raises:
        NoPython: this program can start no process.
        NoProcess: one was started, and did not begin.
        LookupError, ValueError: as there.
    """
    tested, title = find(backend)
    start = time.monotonic()
    waiting = list(chosen_properties(properties))
    findings: list[Finding] = []
    hangs = 0

    def add(finding: Finding) -> None:
        del waiting[0]
        findings.append(finding)
        found(finding)

    while waiting:
        if hangs == MOST_HANGS:
            add(_not_tried(waiting[0], f"not tried: {hangs} properties were given up after {limit:g} s in a case"))
            continue
        order = {
            "backend": backend,
            "device": str(device),
            "quick": quick,
            "shrink": shrink,
            "properties": [property.name for property in waiting],
        }
        with _Process(order) as process:
            step, since = process.next(STARTING_SECONDS), time.monotonic()
            if step is None:
                raise NoProcess(f"the process to test in did not begin: {process.how_it_ended(STARTING_SECONDS)}")
            while waiting:
                said = process.next(limit)
                if isinstance(said, Finding):
                    add(said)
                    since = time.monotonic()
                elif isinstance(said, Step):
                    step = said
                    if step.total and step.property is not None:
                        progress(step.property.name, step.done, step.total)
                else:
                    hangs += not process.has_ended()
                    how = process.how_it_ended(limit)
                    if not isinstance(step, Step) or step.case is None:
                        raise NoProcess(f"the process to test in ended before its first case: {how}")
                    add(_ended(waiting[0], step, how, time.monotonic() - since))
                    break
    return report(tested, title, torch.device(device), findings, quick, time.monotonic() - start)


def _ended(property: Property, step: Step, how: str, seconds: float) -> Finding:
    assert step.case is not None
    failure = Failure(property, step.case, f"{how} in the case {step.case}")
    done = step.done + 1 if step.property == property else 0
    return Finding(property, done, (failure,), failure, {}, {}, None, seconds)


def _not_tried(property: Property, reason: str) -> Finding:
    return Finding(property, 0, (), None, {}, {}, reason, 0.0)


class _Process:
    """A process that tests, as a session of its own, which is ended as a whole."""

    def __init__(self, order: dict[str, Any]) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_THE_CHILD}
        arguments = (str(os.getpid()), json.dumps(order), *(path for path in sys.path if path))
        self._process = subprocess.Popen(
            [python(), *_SAFE_PATH, "-c", _PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**_SLEEPY, **environment},
            # Ctrl-C is this process': it ends the other one itself.
            start_new_session=True,
        )
        self._unread = b""

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        # Before it is waited for: until then nobody else can have its number.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.stdout is not None
        self._process.stdout.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_SECONDS)

    def next(self, seconds: float) -> object:
        """What it says next; None where it has ended, has said nothing for so long, or says what nobody understands."""
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        while True:
            size = _SIZE.unpack_from(self._unread)[0] if len(self._unread) >= _SIZE.size else 0
            end = _SIZE.size + size
            if size and len(self._unread) >= end:
                said, self._unread = self._unread[_SIZE.size : end], self._unread[end:]
                try:
                    return pickle.loads(said)
                except Exception:  # a backend has written into the pipe
                    return None
            # What it has started may hold its end of the pipe open, so that it has ended shows elsewhere. That is asked before
            # the pipe is read: what it wrote before its end is there then.
            has_ended = self.has_ended()
            wait = 0 if has_ended else min(until - time.monotonic(), _TICK_SECONDS)
            if wait < 0:
                return None
            if select.select([self._process.stdout], [], [], wait)[0]:
                read = os.read(self._process.stdout.fileno(), 2**16)
                self._unread += read
                if read:
                    continue
                # It has closed its end and lives on.
                time.sleep(0 if has_ended else _TICK_SECONDS)
            if has_ended:
                return None

    def has_ended(self) -> bool:
        """Whether it is there no more."""
        return self._exit_code() is not None

    def how_it_ended(self, seconds: float) -> str:
        """The end of it in words, which is brought about where it has none after so many seconds."""
        code = self._exit_code()
        if code is None:
            return f"the process was ended after {seconds:g} s"
        return f"the process ended with {f'signal {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'}"

    def _exit_code(self) -> int | None:
        """Negative for a signal; None while it runs. Its number stays its own until it is waited for."""
        status = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return None
        return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status


def main(parent: int, order: str) -> None:
    """Carry out an order in a process that ends where the ``parent`` does."""
    _die_with(parent)
    said = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a backend prints is no part of the report
    _carry_out(json.loads(order), said)
    # What a backend has left behind to be done at the end is no matter of the kit.
    os._exit(0)


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends. Elsewhere it ends with the next thing that it says."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _carry_out(order: dict[str, Any], said: BinaryIO) -> None:
    own = os.getpid()

    def say(what: Step | Finding) -> None:
        if os.getpid() != own:
            os._exit(0)  # a backend has forked: its child has nothing to say here
        pickled = pickle.dumps(what)
        said.write(_SIZE.pack(len(pickled)) + pickled)
        said.flush()

    def told(property: Property, case: Case, done: int, total: int) -> None:
        say(Step(property, case, done, total))

    with under_test(order["backend"], order["device"]) as subject:
        say(Step())
        for property in chosen_properties(order["properties"]):
            say(_without_errors(find_out(property, subject, order["quick"], order["shrink"], told)))


def _without_errors(finding: Finding) -> Finding:
    """Without the exceptions, which may be of classes that cannot be pickled; what they say is in the faults."""
    return replace(
        finding,
        failures=tuple(replace(each, error=None) for each in finding.failures),
        minimal=finding.minimal and replace(finding.minimal, error=None),
    )
