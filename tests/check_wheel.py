"""A script, not a test: what a built wheel must hold, and that it works from an empty folder. ``check_wheel.py WHEEL``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile

MUST_HOLD = (
    "attnreg/__init__.py",
    "attnreg/extension.py",
    "attnreg/py.typed",
    "attnreg/tables/shipped/cpu.json",
    "attnreg/tables/shipped/nvidia-h100-80gb-hbm3.json",
    "attnreg/tables/shipped/nvidia-h200.json",
    "attnreg_adapters/plugin.py",
    "attnreg_torch/plugin.py",
    "attnreg_triton/plugin.py",
    "attnreg_triton/hopper/attention.py",
    "attnreg_cublas/plugin.py",
    "attnreg_cublas/csrc/library.cu",
    "attnreg_cublas/csrc/unpack.cuh",
    "attnreg_benchmarks/run.py",
    "attnreg_benchmarks/peers/flash2.py",
)
MUST_RUN = """
import importlib.util, torch, attnreg
assert attnreg.__file__.startswith({folder!r}), attnreg.__file__
assert importlib.util.find_spec("backends") is None, "the wheel has a package called backends"
names = [status.name for status in attnreg.backends()]
assert sorted(names) == ["cublas_block", "flash", "flash4", "flex", "torch", "torch_block", "triton"], names
query = torch.randn(1, 4, 256, 64)
assert attnreg.local_attention(query, query, query, attnreg.Window.causal(3)).shape == query.shape
decision = attnreg.explain(query, query, query, attnreg.Window.causal(3))
assert decision.source == "shipped", decision
from attnreg_benchmarks.workloads import select
assert select("cpu")
from attnreg_cublas import build
sources = build.LIBRARY.sources()
assert (sources / "library.cu").is_file() and str(sources).startswith({folder!r}), sources
library = build.LIBRARY.packaged()
assert (library is None) == (build.LIBRARY.find_compiler() is None), (library, build.LIBRARY.find_compiler())
if library is not None:
    build.load(library)
    packed = torch.empty(4, 1, 8)
    torch.ops.attnreg_cublas.pack(torch.ones(1, 1, 4, 8), packed, None, 4, False, 4, 0, 0, 0, 1)
    assert (packed == 1).all()
"""


def main(wheel: str) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in MUST_HOLD if name not in names]
    assert not missing, f"{wheel} lacks {missing}"
    unwanted = [name for name in names if name.split("/")[0] in ("backends", "tests", "benchmarks", "csrc")]
    assert not unwanted, f"{wheel} holds {unwanted}"
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}/site", wheel]
        subprocess.run(install, check=True)
        code = f"import sys; sys.path.insert(0, {folder + '/site'!r})\n" + MUST_RUN.format(folder=folder)
        # -I keeps the checkout and its editable install's folder off the path; the installed wheel goes before both.
        environment = {**os.environ, "ATTNREG_CACHE_DIR": folder}
        subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=folder, env=environment)
    print(f"{wheel}: {len(names)} files, all that is needed and nothing else")


if __name__ == "__main__":
    main(sys.argv[1])
