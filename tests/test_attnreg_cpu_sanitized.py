"""``attnreg_cpu`` under AddressSanitizer and UndefinedBehaviorSanitizer: calls of every kind, by the kernels of every instruction set.

The library is built with them and loaded by child processes, which run this file; torch's tensors are watched as well. What this
processor lacks, AVX-512 and the matrix unit, is emulated: ``tests/emulated``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from attnreg_cpu import build
from torch import Tensor

import attnreg
from attnreg import Window, extension
from attnreg.op import OPS, ROWS

# What is left out doubles the time of the compiler, and finds bad pointers before they are used; ASan finds them when they are.
SANITIZERS = (
    *("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fno-sanitize=null,object-size,pointer-overflow,return,vptr",
)
FLAGS = tuple(flag for flag in build.LIBRARY.flags if flag != "-O3") + SANITIZERS

EMULATED = Path(__file__).parent / "emulated"

# How far a result may be off, by the largest number of the reference, which is made in float64.
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """The shapes of a call and what is given beside its tensors."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 1
    queries: int = 37
    keys: int = 41
    head_dim: int = 19
    value_dim: int = 7
    window: tuple[int, int] = (9, 4)
    # Which dimensions of the bias broadcast: those that are "1" of these four letters.
    bias: str | None = None
    bias_dtype: torch.dtype | None = None
    sinks: bool = False
    order: str = "contiguous"
    threads: int = 1
    # Of which of its tensors the gradient is wanted; all where there is none.
    wanted: str | None = None
    given: dict[str, Any] = field(default_factory=dict)


PACKED = {"batch": 1, "queries": 61, "keys": 61}
DROPOUT = {"dropout_p": 0.3, "seed": torch.tensor([-(2**40) - 5])}
CASES = {
    "nothing": Case(),
    "one head": Case(batch=1, heads=1, head_dim=64, value_dim=64, queries=130, keys=130, window=(33, 20)),
    "one query, one key": Case(queries=1, keys=1),
    "one query": Case(queries=1, keys=290, window=(250, 0)),
    "one key": Case(queries=45, keys=1),
    "no query": Case(queries=0),
    "no key": Case(keys=0),
    "no sequence": Case(batch=0),
    "large sizes": Case(queries=35, head_dim=301, value_dim=270),
    "sizes of one": Case(head_dim=1, value_dim=1),
    "window of one": Case(window=(0, 0), queries=300, keys=300),
    "small window": Case(window=(2, 1), queries=300, keys=299),
    "window to the right": Case(window=(0, 25)),
    "window beyond the keys": Case(window=(300, 200)),
    "more queries": Case(queries=90, keys=20, window=(3, 30)),
    "more keys": Case(queries=20, keys=300, window=(230, 2)),
    "several chunks": Case(batch=1, queries=1100, keys=1090, head_dim=12, window=(100, 60)),
    "several chunks, wide": Case(batch=1, queries=1030, keys=1030, head_dim=5, window=(700, 0)),
    "long, small window": Case(batch=1, queries=1030, keys=1030, head_dim=5, window=(3, 1)),
    "many heads": Case(heads=6, kv_heads=2, queries=70, keys=70, window=(20, 20)),
    "lengths": Case(given={"key_lengths": torch.tensor([41, 0])}),
    "starts": Case(given={"key_starts": torch.tensor([3, 41], dtype=torch.int32)}),
    "queries that start anywhere": Case(given={"query_starts": torch.tensor([-20, 35])}),
    "queries that start nowhere": Case(given={"query_starts": torch.tensor([-(2**62) - 2**61, 2**63 - 1])}),
    "all of rows": Case(
        given={
            "key_lengths": torch.tensor([30, 41]),
            "key_starts": torch.tensor([8, 0]),
            "query_starts": torch.tensor([0, 17]),
        }
    ),
    "packed": Case(**PACKED, given={"cu_seqlens_q": torch.tensor([0, 0, 5, 30, 30, 31, 61, 61], dtype=torch.int32)}),
    "packed, fewer": Case(**PACKED, given={"cu_seqlens_q": torch.tensor([0, 7, 40])}, bias="1H1W"),
    "packed, no documents": Case(**PACKED, given={"cu_seqlens_q": torch.tensor([0])}),
    "packed, other keys": Case(
        batch=1,
        queries=600,
        keys=350,
        given={
            "cu_seqlens_q": torch.tensor([0, 0, 90, 91, 500, 590]),
            "cu_seqlens_k": torch.tensor([0, 10, 10, 290, 340, 350]),
        },
    ),
    "chunks that see nothing": Case(
        queries=1700,
        keys=1700,
        head_dim=5,
        given={"key_lengths": torch.tensor([1700, 10]), "key_starts": torch.tensor([1200, 0])},
    ),
    "packed, chunks that see nothing": Case(
        batch=1,
        queries=2200,
        keys=650,
        head_dim=5,
        given={"cu_seqlens_q": torch.tensor([0, 300, 1700, 2200]), "cu_seqlens_k": torch.tensor([0, 300, 300, 650])},
    ),
    **{
        f"bias {letters}": Case(bias=letters, heads=4, kv_heads=2, window=(20, 3) if letters[0] == "N" else (9, 4))
        for letters in map("".join, product("N1", "H1", "L1", "W1"))
    },
    "wider bias": Case(bias="NHLW", bias_dtype=torch.float64),
    "bias over chunks": Case(batch=1, queries=1100, keys=1100, head_dim=5, window=(200, 60), bias="1H1W"),
    "bias of rows over chunks": Case(queries=600, keys=600, head_dim=5, window=(20, 13), bias="11LW"),
    "sinks": Case(sinks=True),
    "softcap": Case(given={"softcap": 0.7}, queries=300, keys=300, window=(220, 13)),
    "dropout": Case(given=DROPOUT, window=(33, 20)),
    "everything": Case(
        bias="1HLW",
        sinks=True,
        threads=2,
        given={
            **DROPOUT,
            "softcap": 1.5,
            "scale": 0.6,
            "key_starts": torch.tensor([1, 0]),
            "key_lengths": torch.tensor([41, 36]),
        },
    ),
    **{f"{order} tensors": Case(order=order, bias="NHLW", sinks=True) for order in ("transposed", "cut", "expanded")},
    **{
        f"gradient of {name}": Case(wanted=name, bias="1H1W", sinks=True, given=DROPOUT)
        for name in ("query", "key", "value", "weights", "bias", "sinks")
    },
    "threads": Case(heads=4, kv_heads=2, queries=700, keys=700, head_dim=32, threads=3, bias="1H1W", sinks=True),
}
# Of sizes that the matrix unit multiplies.
CASES |= {
    f"{name}, in pairs": dataclasses.replace(CASES[name], head_dim=64, value_dim=32)
    for name in [
        *(
            "nothing",
            "one query",
            "small window",
            "window beyond the keys",
            "more queries",
            "several chunks",
            "many heads",
        ),
        *("lengths", "all of rows", "packed", "packed, other keys", "bias NHLW", "bias 1H1W", "dropout", "everything"),
        *("transposed tensors", "cut tensors", "expanded tensors", "gradient of key"),
    ]
}


def laid_out(tensor: Tensor, order: str) -> Tensor:
    """The numbers of a tensor (N, H, L, X) in another order of memory."""
    if order == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if order == "cut":
        room = tensor.new_full((*tensor.shape[:3], tensor.shape[3] + 3), torch.nan)
        room[..., 1:-2] = tensor
        return room[..., 1:-2]
    return tensor[:, :1].expand(tensor.shape) if order == "expanded" else tensor


def numbers(*shape: int) -> Tensor:
    """Random numbers that every dtype holds."""
    return torch.randn(shape).mul(16).round().div(16)


def inputs_of(op: str, case: Case) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an op, and what it is given beside them."""
    row, window = ROWS[op], Window(*case.window)
    lengths = (case.batch, case.heads, case.kv_heads, case.queries, case.keys)
    sizes = dict(zip("NHGQKEDW", (*lengths, case.head_dim, case.value_dim, window.size)))
    tensors = {name: numbers(*(sizes[letter] for letter in dims)) for name, dims in row.tensors.items()}
    given = dict(case.given)
    if case.bias is not None:
        whole = {"N": case.batch, "H": case.heads, "L": case.queries, "W": window.size, "1": 1}
        bias = numbers(*(1 if letter == "1" else whole[place] for letter, place in zip(case.bias, "NHLW")))
        given["bias"] = bias.masked_fill(torch.rand_like(bias) < 0.2, -torch.inf)
    if case.sinks:
        given["sinks"] = numbers(case.heads)
    known = {argument.name for argument in row.arguments}
    return tensors, {name: each for name, each in given.items() if name in known}


def results_of(
    op: str, tensors: dict[str, Tensor], given: dict[str, Any], case: Case, backend: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The results and gradients of a call in a dtype, by name."""
    tensors = {name: laid_out(each.to(dtype), case.order) for name, each in tensors.items()}
    given = {
        name: each.to(case.bias_dtype if name == "bias" and case.bias_dtype else dtype)
        if isinstance(each, Tensor) and each.is_floating_point()
        else each
        for name, each in given.items()
    }
    floating = {name: each for name, each in given.items() if isinstance(each, Tensor) and each.is_floating_point()}
    leaves = {
        name: each.detach().requires_grad_()
        for name, each in {**tensors, **floating}.items()
        if case.wanted in (None, name)
    }
    tensors, given = ({name: leaves.get(name, each) for name, each in some.items()} for some in (tensors, given))
    # The log-sum-exp and its gradient with some cases.
    with_lse = op == "local_attention" and (case.bias is not None or case.sinks)
    function = attnreg.local_attention_with_lse if with_lse else getattr(attnreg, op)
    found = function(*tensors.values(), Window(*case.window), **given, backend=backend)
    results = dict(zip(("result", "log_sum_exp"), found if with_lse else (found,)))
    if not leaves:
        return results
    torch.manual_seed(1)
    upstream = {name: numbers(*each.shape).to(each.dtype) for name, each in results.items() if each.requires_grad}
    gradients = torch.autograd.grad(
        [results[name] for name in upstream], list(leaves.values()), list(upstream.values())
    )
    return {**results, **{f"gradient of {name}": each for name, each in zip(leaves, gradients)}}


def differences(expected: dict[str, Tensor], found: dict[str, Tensor], dtype: torch.dtype) -> Iterator[str]:
    """What is wrong with the results of a call."""
    if found.keys() != expected.keys():
        yield f"it has {sorted(found)}, not {sorted(expected)}"
        return
    for name, wide in expected.items():
        finite = wide[wide.isfinite()].abs()
        close = CLOSE[dtype] * (1 + (finite.amax().item() if len(finite) else 0))
        if not torch.allclose(found[name].double(), wide, rtol=0, atol=close):
            off = (found[name].double() - wide).nan_to_num().abs().amax()
            yield f"{name} is off by up to {off}"


def calls(cases: dict[str, Case]) -> Iterator[str]:
    """Makes all calls of some cases by the kernels of all instruction sets; yields what is wrong with each one."""
    for (name, case), op in product(cases.items(), OPS):
        torch.manual_seed(0)
        tensors, given = inputs_of(op, case)
        expected = results_of(op, tensors, given, case, "torch", torch.float64)
        torch.set_num_threads(case.threads)
        for isa, dtype in product(build.isas(), CLOSE):
            build.choose_isa(isa)
            call = f"{op}, {name}, {dtype}, {isa}"
            # A fault ends the process: the last line tells in which call it was.
            print(call, file=sys.stderr, flush=True)
            found = results_of(op, tensors, given, case, "attnreg_cpu", dtype)
            yield "".join(f"{call}: {each}\n" for each in differences(expected, found, dtype))
        torch.set_num_threads(1)


def refusal_of_offsets_that_decrease() -> str:
    """What an op says of such offsets, of which attnreg hands it none: they would lead out of its memory."""
    query, scores, offsets = torch.zeros(1, 1, 6, 4), torch.empty(1, 1, 6, 3), torch.tensor([0, 4, 2, 6])
    for cu_seqlens in ((offsets, None), (offsets.sort().values, offsets)):
        try:
            build.ops().dot_product(query, query, scores, None, None, None, None, *cu_seqlens, 2, 0, 1.0)
        except RuntimeError as error:
            said = str(error)
        else:
            return "nothing"
    return said


def main() -> int:
    """What a child does: ``overflow``, a library and a fault; or ``calls``, a library, and which part of how many."""
    what, library, *further = sys.argv[1:]
    if what == "overflow":
        overflow, tensor = ctypes.CDLL(library), torch.zeros(5, dtype=torch.float64)
        index, summand = {"none": (4, -1), "address": (5, -1), "undefined": (4, 1)}[further[0]]
        overflow.read(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_long(index))
        overflow.add(ctypes.c_int(2**31 - 1), ctypes.c_int(summand))
        print("done")
        return 0
    build.load(Path(library))
    assert "it got offsets that decrease" in refusal_of_offsets_that_decrease()
    part, parts = map(int, further)
    wrong = list(calls(dict(list(CASES.items())[part::parts])))
    print("".join(wrong) or f"{len(wrong)} calls of {' '.join(build.isas())}")
    return int(any(wrong))


def runtime() -> str:
    """What a process must load before anything else: the sanitizers' runtime, and of whose exceptions it is to know."""
    compiler = extension.find_cxx()
    if compiler is None:
        pytest.skip(extension.NO_CXX)
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        asked = subprocess.run([*shlex.split(compiler), f"-print-file-name={name}"], capture_output=True, text=True)
        libraries.append(asked.stdout.strip())
        if not os.path.isabs(libraries[-1]):
            pytest.skip(f"{compiler} has no sanitizers that a process can load first: there is no {name}")
    return ":".join(libraries)


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    """This file, run by a process that the sanitizers watch."""
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime(),
        # What Python and torch never free is none of our business; nor where they allocate, which takes long to find out.
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=2:quarantine_size_mb=32",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment)


def sanitized(tmp_path: Path, **changes: Any) -> Path:
    """The library, or one of other sources, built with the sanitizers by the code that builds it for users."""
    library = dataclasses.replace(build.LIBRARY, package=tmp_path, flags=FLAGS, **changes)
    return library.build(build.TARGET, tmp_path / "builds")


def for_every_instruction_set(folder: Path) -> dict[str, Any]:
    """What is to be changed of the library so that this machine runs all kernels: nothing where its processor does."""
    if "amx" in build.isas():
        return {}
    shutil.copytree(build.LIBRARY.sources(), folder)
    shutil.copy(EMULATED / "matrix_unit.h", folder)
    by_avx2 = next(unit.flags for unit in build.LIBRARY.units if unit.file == "isa_avx2.cpp")
    instead = {
        **dict.fromkeys(("isa_avx512.cpp", "isa_amx.cpp"), (*by_avx2, "-include", str(EMULATED / "avx512.h"))),
        "library.cpp": ("-include", str(EMULATED / "processor.h")),
    }
    units = [dataclasses.replace(unit, flags=instead.get(unit.file, unit.flags)) for unit in build.LIBRARY.units]
    return {"checkout": folder, "units": tuple(units)}


OVERFLOW = """
extern "C" __attribute__((visibility("default"))) double read(const double* from, long index) { return from[index]; }
extern "C" __attribute__((visibility("default"))) int add(int a, int b) { return a + b; }
"""


def test_the_sanitizers_see_a_fault(tmp_path):
    runtime()
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "overflow.cpp").write_text(OVERFLOW)
    library = sanitized(tmp_path, checkout=tmp_path / "sources", units=(extension.Unit("overflow.cpp"),))
    assert child("overflow", str(library), "none").stdout == "done\n"
    for fault, report in (("address", "heap-buffer-overflow"), ("undefined", "signed integer overflow")):
        done = child("overflow", str(library), fault)
        assert done.returncode != 0
        assert "done" not in done.stdout
        assert report in done.stderr


def test_no_call_of_any_kind_has_a_fault(tmp_path, library_for_cpus):
    runtime()
    library = sanitized(tmp_path, **for_every_instruction_set(tmp_path / "sources"))
    parts = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(parts) as pool:
        done = list(pool.map(lambda part: child("calls", str(library), str(part), str(parts)), range(parts)))
    for each in done:
        assert each.returncode == 0, each.stdout + each.stderr[-8000:]
    reports = [each.stdout.split(maxsplit=3) for each in done]
    isas = reports[0][3].split()
    if platform.machine() == "x86_64":
        assert isas == ["amx", "avx512", "avx2", "baseline"]
    assert sum(int(count) for count, *_ in reports) == len(CASES) * len(OPS) * len(CLOSE) * len(isas)


if __name__ == "__main__":
    sys.exit(main())
