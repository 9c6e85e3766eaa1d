"""What a call costs beside the work: dispatch, the public function over the backend's own, and the import.

Run with ``make bench`` or ``python -m pytest benchmarks/test_overhead.py --benchmark-json=FILE``. The first figure is also a
figure that the project holds itself to: see ``test_figures``.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import timeit

import pytest
import torch

import attnreg
from attnreg import Window
from attnreg.registry import registry

WINDOW = Window(2, 1)
BACKEND = "torch_block"

torch.set_num_threads(1)


def tiny(requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, 1, 2, 4, requires_grad=requires_grad) for _ in range(3)]


class StopHere(Exception):
    """Raised where the backend's function is known, instead of calling it."""


def known_function(query, key, value):
    """local_attention from its entry until the backend's function is known, and no further.

    A differentiable backend's function is called straight from the plan: this one only raises.
    """
    with contextlib.suppress(StopHere):
        attnreg.local_attention(query, key, value, WINDOW, backend="stops_here")


def raise_stop(*_, **__):
    raise StopHere


def just_raise(query, key, value):
    """What the measuring of ``known_function`` costs by itself: the call, the exception and its capture."""
    with contextlib.suppress(StopHere):
        raise_stop(query, key, value, WINDOW, bias=None, key_lengths=None, scale=1.0)


@pytest.fixture
def stops_here():
    backend = attnreg.Backend(
        name="stops_here",
        capability=attnreg.Capability(dtypes={torch.float32}),
        local_attention=raise_stop,
        differentiable=True,
    )
    with attnreg.register(backend):
        yield


def test_dispatch_warm(benchmark, stops_here):
    benchmark(known_function, *tiny())


def test_dispatch_warm_zero_line(benchmark):
    benchmark(just_raise, *tiny())


def test_backend_function(benchmark):
    function = registry.functions(BACKEND)["local_attention"]
    query, key, value = tiny()
    benchmark(lambda: function(query, key, value, WINDOW, bias=None, key_lengths=None, scale=0.5))


def test_public_call(benchmark):
    query, key, value = tiny()
    benchmark(lambda: attnreg.local_attention(query, key, value, WINDOW))


def test_public_call_with_gradients(benchmark):
    query, key, value = tiny(requires_grad=True)
    benchmark(lambda: attnreg.local_attention(query, key, value, WINDOW))


def difference(first, second, number: int = 1000, rounds: int = 15) -> float:
    """Seconds a call of ``first`` costs over one of ``second``: the median of differences of neighbouring rounds."""
    differences = []
    for _ in range(rounds):
        differences.append((timeit.timeit(first, number=number) - timeit.timeit(second, number=number)) / number)
    return statistics.median(differences)


def test_figures(stops_here, record_property):
    """The figures, printed and recorded: dispatch, and the public call over the backend's function."""
    query, key, value = tiny()
    grad_query, grad_key, grad_value = tiny(requires_grad=True)
    function = registry.functions(BACKEND)["local_attention"]
    window = attnreg.Window(1, 1)  # what the plan makes of WINDOW for two keys

    def direct():
        return function(query, key, value, window, bias=None, key_lengths=None, scale=0.5)

    figures = {
        "dispatch_us": difference(
            lambda: known_function(query, key, value), lambda: just_raise(query, key, value), 20000
        ),
        "public_call_us": difference(lambda: attnreg.local_attention(query, key, value, WINDOW), direct),
        "public_call_with_gradients_us": difference(
            lambda: attnreg.local_attention(grad_query, grad_key, grad_value, WINDOW), direct
        ),
    }
    for name, seconds in figures.items():
        record_property(name, round(seconds * 1e6, 2))
        print(f"{name}: {seconds * 1e6:.2f}")
    assert figures["dispatch_us"] < 5e-6
    assert figures["public_call_us"] < 30e-6
    assert figures["public_call_with_gradients_us"] < 75e-6


def test_import(record_property):
    """``import attnreg`` after ``import torch``."""
    script = "import torch, time; start = time.perf_counter(); import attnreg; print(time.perf_counter() - start)"
    seconds = []
    for _ in range(5):
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        seconds.append(float(run.stdout))
    record_property("import_ms", round(min(seconds) * 1e3, 1))
    print(f"import_ms: {min(seconds) * 1e3:.1f}")
    assert min(seconds) < 0.5
