"""What a figure depends on beside the call: the device, and the versions of all that has a part in it."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnreg.backend import THIS_PROCESS, Entry
from attnreg.memo import asked_once
from attnreg.packages import own_version, package_version
from attnreg.precision import reduced_precision


@dataclass(frozen=True)
class Device:
    """The hardware that figures belong to.

    Attributes:
        type: torch's device type.
        name: the GPU's name, or the CPU's.
        capability: the compute capability ("9.0"), or a CPU's instruction set as torch uses it ("AVX512").
    """

    type: str
    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})"


@dataclass(frozen=True)
class Environment:
    """Where and with which versions a table was measured.

    Attributes:
        device: the hardware.
        attnreg, torch, triton, driver: versions; None where there is none.
        threads: torch's threads where the device is a CPU, else None.
        backends: the distribution that each backend came from, with its version and that of the library that it calls, by the
            backend's name.
        float32: in what less than float32 torch was allowed to compute float32 products, such as "tf32"; None for nothing less.
    """

    device: Device
    attnreg: str
    torch: str
    triton: str | None = None
    driver: str | None = None
    threads: int | None = None
    backends: Mapping[str, str] = field(default_factory=dict)
    float32: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The environment as JSON; without ``float32`` where that is None, as in tables older than it."""
        written = asdict(self)
        if self.float32 is None:
            del written["float32"]
        return written

    @property
    def file_name(self) -> str:
        """One name for each environment, told apart by what it holds."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:10]
        return f"{re.sub(r'[^a-z0-9]+', '-', self.device.name.lower()).strip('-')}-{digest}.json"

    def hard_mismatches(self, here: Environment, *, of_float32: bool) -> tuple[str, ...]:
        """Why figures from this environment say nothing ``here``: another device, or other kernels of attnreg.

        ``of_float32`` is for figures of float32 calls: those of products in less, such as TF32, are of a class of their own.
        """
        found = []
        if self.device != here.device:
            found.append(f"it was measured on {self.device}, this is {here.device}")
        if _release(self.attnreg) != _release(here.attnreg):
            found.append(f"it was measured with attnreg {self.attnreg}, this is {here.attnreg}")
        if of_float32 and self.float32 not in (None, here.float32):
            found.append(
                f"for float32, it was measured with products in {self.float32}, here {here.float32 or 'float32'}"
            )
        return tuple(found)

    def soft_mismatches(self, here: Environment, *, of_float32: bool) -> tuple[str, ...]:
        """What differs ``here`` and may move a figure; ``of_float32`` as in :meth:`hard_mismatches`."""
        names = ("attnreg", "torch", "triton", "driver", "threads")
        pairs = [(name, getattr(self, name), getattr(here, name)) for name in names]
        pairs += [
            (f"the backend {name} of", source, here.backends[name])
            for name, source in self.backends.items()
            if name in here.backends
        ]
        if of_float32:
            pairs.append(("products in", self.float32 or "float32", here.float32 or "float32"))
        return tuple(f"{name} {was}, here {now}" for name, was, now in pairs if was != now)


def environment(device: torch.device, entries: Iterable[Entry]) -> Environment:
    """The environment of this process for calls on ``device``, with these backends."""
    return Environment(
        device=describe(device.type, device.index),
        attnreg=own_version(),
        torch=torch.__version__,
        triton=package_version("triton") if device.type == "cuda" else None,
        driver=driver() if device.type == "cuda" else None,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        backends=_sources(entries),
        float32=reduced_precision(device.type),
    )


def _sources(entries: Iterable[Entry]) -> dict[str, str]:
    found = {}
    for entry in sorted(entries, key=lambda entry: entry.backend.name):
        library = entry.backend.library
        version = None if library is None else package_version(library)
        # One without its library cannot run.
        if entry.distribution != THIS_PROCESS and (library is None or version is not None):
            found[entry.backend.name] = (
                entry.distribution if version is None else f"{entry.distribution}, {library} {version}"
            )
    return found


@asked_once
def describe(type: str, index: int | None) -> Device:
    """The hardware behind a torch device; a device that is not there has its type for a name."""
    if type == "cuda" and torch.cuda.is_available() and (index or 0) < torch.cuda.device_count():
        major, minor = torch.cuda.get_device_capability(index)
        return Device(type, torch.cuda.get_device_name(index), f"{major}.{minor}")
    if type == "cpu":
        return Device(type, cpu_name(), torch.backends.cpu.get_cpu_capability())
    return Device(type, type, "unknown")


def cpu_name() -> str:
    """The CPU's name, as Linux has it; the architecture where it has none."""
    try:
        with open("/proc/cpuinfo") as lines:  # a long file on a large machine: no further than needed
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.machine()


@asked_once
def driver() -> str | None:
    """The NVIDIA driver's version: a file of the kernel module says it, without a child process."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found.group() if found else None


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
