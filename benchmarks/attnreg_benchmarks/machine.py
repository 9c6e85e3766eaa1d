"""Where a benchmark ran: the environment that its figures belong to, and the ceilings of the machine, measured."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import attnreg
from attnreg.measuring.timing import measure, measuring_stream
from attnreg.packages import package_version
from attnreg.tables.environment import cpu_name, driver
from attnreg_benchmarks.floor import Ceilings

PACKAGES = ("attnreg", "torch", "triton", "transformers", "flash-attn-4", "nvidia-cudnn-frontend")


@dataclass(frozen=True)
class Environment:
    """What a result depends on beside the workload; nothing of whose machine it is.

    Attributes:
        device: the GPU's name, or the CPU's.
        cpu: the CPU's name and its number of threads in use by torch.
        driver: of the GPU; None without one.
        cuda: the version that torch was built with; None on a CPU build.
        cudnn: the version of cuDNN that torch loads; None without.
        python: its version.
        packages: versions of those that are installed, by name.
        commit: of the checkout that attnreg is imported from; None if it comes from none.
        dirty: whether that checkout holds changes that are not committed; None without a commit.
    """

    device: str
    cpu: str
    driver: str | None
    cuda: str | None
    cudnn: int | None
    python: str
    packages: dict[str, str]
    commit: str | None
    dirty: bool | None


def environment(device: torch.device) -> Environment:
    """The environment of a benchmark on ``device``."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return Environment(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        cpu=f"{cpu_name()}, {torch.get_num_threads()} threads",
        driver=driver() if device.type == "cuda" else None,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if device.type == "cuda" else None,
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := package_version(name)) is not None},
        commit=commit,
        dirty=None if changes is None else bool(changes),
    )


def ceilings(device: torch.device) -> Ceilings:
    """Measure the device's copy bandwidth and its matmul rates, on random data."""
    on_gpu = device.type == "cuda"
    with measuring_stream(device):
        bandwidth = _copy_bandwidth(device, 4 * 2**30 if on_gpu else 2**28)
        if not on_gpu:
            return Ceilings(bandwidth, {"fp32": _matmul_rate(device, torch.float32, 1024)})
        rates = {"bf16": _matmul_rate(device, torch.bfloat16, 8192)}
        for name, precision in (("tf32", "high"), ("fp32", "highest")):
            with float32_precision(precision):
                rates[name] = _matmul_rate(device, torch.float32, 8192)
    return Ceilings(bandwidth, rates)


@contextmanager
def float32_precision(name: str) -> Iterator[None]:
    """How torch multiplies float32, as for ``torch.set_float32_matmul_precision``: "high" allows TF32, "highest" does not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _copy_bandwidth(device: torch.device, most_bytes: int) -> float:
    """Bytes a second, read plus written, of a copy between two tensors on the device.

    It negates what it copies: a plain copy becomes a memcpy node in a CUDA graph, which reaches two thirds of the rate.
    """
    size = most_bytes
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    timing = measure([lambda: torch.neg(source, out=target)], device)
    return 2 * source.numel() * source.element_size() / timing.median


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a square product."""
    first, second = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    timing = measure([lambda: first @ second], device)
    return float(2 * size**3 / timing.median)


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that attnreg lies in; None where it lies in none."""
    root = Path(attnreg.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
