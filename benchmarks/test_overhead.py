"""What a call costs beside the work: dispatch, the public function over the backend's own, and the import.

``make bench`` prints the figures and stores them, with the machine and the commit, in ``benchmarks/results/``. Each is of the
fastest of many rounds, as timeit's documentation advises: what is above it is the machine's other work.
"""

from __future__ import annotations

import inspect
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable

import pytest
import torch

import attnreg
from attnreg import Backend, Capability, Window, functional
from attnreg.registry import registry

WINDOW = Window(1, 1)
QUERY, KEY, VALUE = torch.randn(3, 1, 1, 2, 4)
LEAVES = tuple(tensor.clone().requires_grad_() for tensor in (QUERY, KEY, VALUE))
OPTIONS = {"bias": None, "key_lengths": None, "scale": 0.5}

torch.set_num_threads(1)


def no_work(query, key, value, window, *, bias, key_lengths, scale):
    return torch.empty(1, 1, 2, 4), torch.empty(1, 1, 2)


def no_work_backward(*_, **__):
    return (*LEAVES, None)


@pytest.fixture(autouse=True)
def no_work_backend():
    """A backend that does nothing: what is left of a call is its overhead."""
    backend = Backend(
        name="no_work",
        capability=Capability(dtypes={torch.float32}),
        local_attention=no_work,
        local_attention_backward=no_work_backward,
    )
    with attnreg.register(backend):
        attnreg.local_attention(QUERY, KEY, VALUE, WINDOW, backend="no_work")
        yield


def look_up():
    """``local_attention`` as it stands in its source, cut off where the plan, and so the backend's function, is known."""
    source = inspect.getsource(functional.local_attention)
    known = "        plan = registry.plans[call]\n"
    assert source.count(known) == 1
    source = source[: source.index(known)] + "        return registry.plans[call]\n    finally:\n        pass\n"
    namespace = dict(vars(functional))
    exec(compile(source.replace("def local_attention", "def look_up"), "look_up", "exec", dont_inherit=True), namespace)
    return namespace["look_up"]


def seconds_over(first: Callable[[], object], second: Callable[[], object], number: int, rounds: int = 25) -> float:
    """What one call of ``first`` costs over one of ``second``: the fastest rounds of both, taken in turns."""
    times = [(timeit.timeit(first, number=number), timeit.timeit(second, number=number)) for _ in range(rounds)]
    return (min(first for first, _ in times) - min(second for _, second in times)) / number


def report(benchmark, name: str, microseconds: float) -> None:
    benchmark.extra_info[name] = round(microseconds, 2)
    print(f"\n{name}: {microseconds:.2f}")


def public(backend: str, tensors):
    return lambda: attnreg.local_attention(*tensors, WINDOW, backend=backend)


def test_dispatch(benchmark):
    """From ``local_attention``'s entry until the backend's function is known; the aim is 1 us."""
    find = look_up()
    assert find(QUERY, KEY, VALUE, WINDOW, backend="no_work").backend == "no_work"
    tensors = (QUERY, KEY, VALUE)
    loop = "call(query, key, value, window, backend='no_work')"
    names = dict(zip(("query", "key", "value"), tensors), window=WINDOW)
    rounds = timeit.repeat(loop, globals={**names, "call": find}, number=20000, repeat=15)
    dispatch_us = min(rounds) / 20000 * 1e6
    report(benchmark, "dispatch_us", dispatch_us)
    benchmark(public("no_work", (QUERY, KEY, VALUE)))
    assert dispatch_us < 10


@pytest.mark.parametrize(
    ("tensors", "aim"), [((QUERY, KEY, VALUE), 6), (LEAVES, 15)], ids=["forward", "with_gradients"]
)
@pytest.mark.parametrize("backend", ["no_work", "torch_block"])
def test_public_call_over_the_backends_own_function(benchmark, backend, tensors, aim):
    """The aim is 6 us without gradients and 15 us with them (forward, tiny tensors)."""
    function = registry.functions(backend)["local_attention"]
    call = public(backend, tensors)
    number = 5000 if backend == "no_work" else 500
    over_us = seconds_over(call, lambda: function(QUERY, KEY, VALUE, WINDOW, **OPTIONS), number) * 1e6
    report(benchmark, "over_the_function_us", over_us)
    report(benchmark, "aim_us", aim)
    benchmark(call)
    assert over_us < 10 * aim


def test_import(benchmark):
    """``import attnreg`` after ``import torch``; the aim is 50 ms."""
    script = "import torch, time; start = time.perf_counter(); import attnreg; print(time.perf_counter() - start)"

    def import_ms() -> float:
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return float(run.stdout) * 1e3

    milliseconds = statistics.median(import_ms() for _ in range(5))
    report(benchmark, "import_ms", milliseconds)
    benchmark.pedantic(import_ms, rounds=1)
    assert milliseconds < 500
