"""The process that candidates run in, and its other end: one that dies, hangs or spoils its device takes nothing along.

Orders and answers are lines of JSON. ``python -m attnreg.tuning.worker`` is that process.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict

import torch

from attnreg.device import why_unusable
from attnreg.measured import Figure
from attnreg.measuring.failure import first_line
from attnreg.problem import Problem
from attnreg.tables.call import call_from_json, call_to_json
from attnreg.tuning.candidate import Measurement, failed, measure_candidate
from attnreg.tuning.settings import settings, take_over

# A candidate may compile for that long; one that takes longer is given up.
LONGEST_SECONDS = 300.0


class Worker:
    """A child process that measures; started when it is needed, and again when it died.

    Attributes:
        longest: seconds after which a measurement is given up.
    """

    def __init__(self) -> None:
        self.longest = LONGEST_SECONDS
        self._process: subprocess.Popen[bytes] | None = None

    def measure(self, problem: Problem, backend: str, seconds: float) -> Measurement:
        """As ``measure_candidate``, in the child, under this process' settings."""
        order = {
            "problem": call_to_json(problem),
            "device": str(problem.device),
            "backend": backend,
            "seconds": seconds,
            "settings": settings(),
        }
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return failed(self._how_it_ended())
        if not select.select([process.stdout], [], [], self.longest)[0]:
            self.close()
            return failed(f"it was given up after {self.longest:g} s")
        line = process.stdout.readline()
        if not line:
            return failed(self._how_it_ended())
        answer = json.loads(line)
        if answer["unusable"] is not None:
            self.close()
        return Measurement(Figure(**answer["figure"]), answer["copy_seconds"])

    def close(self) -> None:
        """End the child; the next measurement starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_THE_CHILD}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the child has died
        self._process = subprocess.Popen(
            [sys.executable, "-m", "attnreg.tuning.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            # Ctrl-C is the parent's: it ends the child itself, between two candidates or in one.
            start_new_session=True,
        )
        return self._process

    def _how_it_ended(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the process that measured it ended with {how}" + (f": {lines[-1]}" if lines else "")


_NOT_FOR_THE_CHILD = ("ATTNREG_BACKEND", "ATTNREG_AUTOTUNE")


def main() -> None:
    """Carry out orders until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a backend prints is no answer
    for line in sys.stdin:
        order = json.loads(line)
        device = torch.device(order["device"])
        take_over(order["settings"])
        try:
            found = measure_candidate(call_from_json(order["problem"], device), order["backend"], order["seconds"])
        except SystemExit as error:
            found = failed(first_line(error))
        json.dump({**asdict(found), "unusable": why_unusable(device)}, answers)
        print(file=answers, flush=True)
        # What lives now is torch's and the compilers': to look through it after every candidate would take 0.2 s each time.
        gc.freeze()


if __name__ == "__main__":
    main()
