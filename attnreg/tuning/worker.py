"""The process that candidates run in, and its other end: one that dies, hangs or spoils its device takes nothing along.

Orders and answers are lines of JSON. An order has a number, which stands in what answers it: first that it was begun, then what
was found. What ends before it began is nobody's fault; a line with another number, or with none, is no answer.

The process is a session of its own, which is ended as a whole, and with it what has left it: by a guard in it, to which Linux
gives all that a candidate detached, when the parent says so or has ended.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, NoReturn, TextIO

import torch

from attnreg.device import why_unusable
from attnreg.measured import Figure
from attnreg.printable import printable, told
from attnreg.problem import Problem
from attnreg.tables.call import LARGEST_SIZE, call_from_json, call_to_json
from attnreg.tuning.candidate import Measurement, failed, measure_candidate
from attnreg.tuning.settings import settings, take_over
from attnreg.window import Window

# A candidate may compile for that long; one that takes longer is given up.
LONGEST_SECONDS = 300.0
# So long a process may take until it begins: it imports torch, perhaps from a slow file system.
STARTING_SECONDS = 120.0
# How often a process is started for one order that it does not begin.
ATTEMPTS = 2
# It is looked so often whether a process is still there.
_TICK_SECONDS = 0.05
# A killed process is waited for no longer: one that hangs in a driver cannot be ended.
_ENDING_SECONDS = 5.0
# The guard has so long to end what a candidate started; then the session is ended without it.
_GUARD_SECONDS = 2.0
# What a process writes without a line's end is no answer.
_LONGEST_LINE = 2**20
_LONGEST_ERROR = 2**14

# Set in the process: what it starts must not start another one.
_MARK = "ATTNREG_WORKER"
_NOT_FOR_THE_CHILD = ("ATTNREG_BACKEND", "ATTNREG_AUTOTUNE", "PYTHONINSPECT", "PYTHONSTARTUP")
# As Python is installed, with the letters of a build without the lock or for debugging.
_PYTHON = re.compile(r"pythonw?([0-9.]+[dt]{0,2})?(\.exe)?", re.IGNORECASE)
# The path of imports is the parent's, and set before anything is imported: `python -m` would look into the current folder first,
# and with `-c` alone Python 3.10 would, too.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from attnreg.tuning.worker import main; main(int(sys.argv[1]))"
_SAFE_PATH = ("-P",) if sys.version_info >= (3, 11) else ()


class NoPython(RuntimeError):
    """This program cannot start a process to measure in; the message says why."""


def python() -> str:
    """The program that runs Python code, for a child process.

    Raises:
        NoPython: there is none, or this is such a child itself: it would start the program again, and this one again.
    """
    program: object = sys.executable or ""
    if os.environ.get(_MARK):
        raise NoPython("this process was itself started to measure")
    main = sys.modules.get("__main__")
    if main is None:
        raise NoPython("this program has no module __main__: it is no Python that could measure")
    if getattr(sys, "frozen", False) or hasattr(main, "__compiled__"):
        raise NoPython(
            f"this program is frozen: {program!r} would be started again, and is no Python that could measure"
        )
    if not isinstance(program, str) or not _is_python(program):
        raise NoPython(f"sys.executable is {program!r}, which is no Python that could measure")
    return program


def _is_python(program: str) -> bool:
    return any(_PYTHON.fullmatch(os.path.basename(path)) for path in (program, os.path.realpath(program)))


class Worker:
    """A child process that measures; started when it is needed, and again when it died.

    Attributes:
        longest: seconds after which a measurement is given up.
    """

    def __init__(self) -> None:
        self.longest = LONGEST_SECONDS
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._orders = 0
        # Why no process begins; then none is started any more.
        self._unstartable: str | None = None

    def measure(self, problem: Problem, backend: str, seconds: float) -> Measurement:
        """As ``measure_candidate``, in the child, under this process' settings.

        Raises:
            NoPython: no child can be started.
        """
        order = {
            "problem": call_to_json(_as_told(problem)),
            "device": str(problem.device),
            "backend": backend,
            "seconds": seconds,
            "settings": settings(),
        }
        for _ in range(ATTEMPTS if self._unstartable is None else 0):
            if self._begin(order):
                return self._found()
            self.close()
        return failed(f"no process that measures could be started: {self._unstartable}", passing=True)

    def close(self) -> None:
        """End the child, and all that it started; the next measurement starts another."""
        process, self._process, self._unread = self._process, None, b""
        if process is None:
            return
        # Before it is waited for: until then nobody else can have its number. The guard comes first: it alone finds what has
        # left the session.
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGTERM)
        until = time.monotonic() + _GUARD_SECONDS
        while _exit_code(process.pid) is None and time.monotonic() < until:
            time.sleep(0.002)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            # What cannot be written any more, to a process that has ended, is no loss.
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING_SECONDS)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_THE_CHILD}
        environment[_MARK] = "1"
        command = [python(), *_SAFE_PATH, "-c", _PROGRAM, str(os.getpid()), *(path for path in sys.path if path)]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the child has died
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            # Ctrl-C is the parent's: it ends the child itself, between two candidates or in one.
            start_new_session=True,
        )
        return self._process

    def _begin(self, order: Mapping[str, Any]) -> bool:
        """Hand over an order; whether the child has begun it. Where it has not, ``_unstartable`` says why."""
        self._orders += 1
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            process.stdin.write(json.dumps({**order, "number": self._orders}).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._unstartable = self._how_it_ended()
            return False
        except OSError as error:
            self._unstartable = str(error)
            return False
        answer = self._answer(time.monotonic() + STARTING_SECONDS)
        if answer is None:
            ended = self._has_ended()
            self._unstartable = self._how_it_ended() if ended else f"it did not begin within {STARTING_SECONDS:g} s"
            return False
        self._unstartable = None
        return True

    def _found(self) -> Measurement:
        """What the child has found, or why it found nothing."""
        answer = self._answer(time.monotonic() + self.longest)
        if answer is None:
            if not self._has_ended():
                self.close()
                return failed(f"it was given up after {self.longest:g} s", passing=True)
            how, killed = self._how_it_ended(), self._exit_code() == -signal.SIGKILL
            self.close()
            # That is how a system ends a process where memory runs out.
            return failed(f"the process that measured it ended with {how}", passing=killed)
        try:
            found = Measurement(Figure(**answer["figure"]), answer["copy_seconds"], answer["waited"])
            is_unusable = answer["unusable"] is not None
        except (KeyError, TypeError):
            found, is_unusable = failed("it wrote over the answer of the process that measured it"), True
        if is_unusable:
            self.close()
        return found

    def _answer(self, until: float) -> dict[str, Any] | None:
        """The next answer to the last order; None where the child has ended, or none has come ``until`` then."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        while True:
            line, found, rest = self._unread.partition(b"\n")
            if found:
                self._unread = rest
                answer = _parsed(line)
                if answer.get("number") == self._orders:
                    return answer
                continue
            # What the child has forked may hold its end of the pipe open, so that it has ended shows elsewhere. That is asked
            # before the pipe is read: what it wrote before its end is there then.
            has_ended = self._has_ended()
            wait = 0 if has_ended else min(until - time.monotonic(), _TICK_SECONDS)
            if wait < 0 or len(self._unread) > _LONGEST_LINE:
                return None
            if select.select([process.stdout], [], [], wait)[0]:
                read = os.read(process.stdout.fileno(), 2**16)
                self._unread += read
                if read:
                    continue
                # The child has closed its end and lives on.
                time.sleep(0 if has_ended else _TICK_SECONDS)
            if has_ended:
                return None

    def _has_ended(self) -> bool:
        return self._exit_code() is not None

    def _exit_code(self) -> int | None:
        """The child's exit code, negative for a signal; None while it runs. Its number stays its own until it is waited for."""
        assert self._process is not None
        return _exit_code(self._process.pid)

    def _how_it_ended(self) -> str:
        code = self._exit_code()
        if code is None:
            return "its pipe closed"
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(size - _LONGEST_ERROR, 0))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return how + (f": {printable(lines[-1])}" if lines else "")


def _as_told(problem: Problem) -> Problem:
    """With a window that a text of it holds: further than that there are no keys."""
    window = problem.window
    return replace(problem, window=Window(min(window.left, LARGEST_SIZE), min(window.right, LARGEST_SIZE)))


def _parsed(line: bytes) -> dict[str, Any]:
    """What a line of the child says; nothing where it is no answer, but what a candidate wrote into its pipe."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def main(parent: int) -> None:
    """Carry out orders until there are no more, in a process that ends, with all that it starts, where the ``parent`` does."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    worker = os.fork()
    if worker:
        _guard(worker, parent)
    # It is killed when the guard ends: then nobody would end it.
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != guard:
        os._exit(1)
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what a backend reads is no order
    os.dup2(2, 1)  # what a backend prints is no answer
    _carry_out(orders, answers)


def _carry_out(orders: Iterable[str], answers: TextIO) -> None:
    own = os.getpid()

    def answer(order: Mapping[str, Any], **said: Any) -> None:
        json.dump({**said, "number": order["number"]}, answers)
        print(file=answers, flush=True)

    for line in orders:
        order = json.loads(line)
        device = torch.device(order["device"])
        answer(order)
        take_over(order["settings"])
        try:
            found = measure_candidate(call_from_json(order["problem"], device), order["backend"], order["seconds"])
        except SystemExit as error:
            found = failed(told(error))
        if os.getpid() != own:
            os._exit(0)  # a candidate has forked: its child has nothing to say here
        answer(order, **asdict(found), unusable=why_unusable(device))
        # What lives now is torch's and the compilers': to look through it after every candidate would take 0.2 s each time.
        gc.freeze()


def _guard(worker: int, parent: int) -> NoReturn:
    """Wait for the worker, and end as it does; where the parent has ended or says so, end the worker. Nothing is left then.

    A process of its own, as a candidate may hold the worker's interpreter for as long as it likes.
    """

    def end(*_: object) -> NoReturn:
        _end_descendants()
        # What Linux does not tell of is ended with the session, this process with it.
        os.killpg(0, signal.SIGKILL)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    while True:
        ended, status = _wait()
        if ended == worker:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _end_descendants()
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                with suppress(OSError):  # SIGKILL is what it always is
                    signal.signal(-code, signal.SIG_DFL)
                os.kill(os.getpid(), -code)
            os._exit(code)
        if os.getppid() != parent:
            end()
        if not ended:
            time.sleep(_TICK_SECONDS)


def _wait() -> tuple[int, int]:
    """A child that has ended, and how; 0 where none has."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0, 0


def _end_descendants() -> None:
    """Kill all that this process started, and what that started, again and again: whose parent has ended becomes its child."""
    until = time.monotonic() + _GUARD_SECONDS / 2
    while (found := _descendants(os.getpid())) and time.monotonic() < until:
        for each in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
        while _wait()[0]:
            pass
        time.sleep(0.002)


def _descendants(of: int) -> list[int]:
    """The processes below one, as far as the system tells."""
    children: dict[int, list[int]] = {}
    with suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                _, parent = file.read().rpartition(b")")[2].split()[:2]
                children.setdefault(int(parent), []).append(int(name))
    found, wanted = [], [of]
    while wanted:
        below = children.pop(wanted.pop(), [])
        found += below
        wanted += below
    return found


_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    """Ask Linux for something; other systems have no such thing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _exit_code(process: int) -> int | None:
    status = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if status is None:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
