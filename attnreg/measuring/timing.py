"""Measuring how long a call takes on its device: steady state, cold cache, the host's work left out on a GPU.

A call is given as several ones over *independent tensors*, taken in turns, so that what one call left in the cache is
gone when its turn comes again. On a GPU, one CUDA graph holds a few milliseconds of such calls, back to back; the time of
a replay is divided by its calls. A launch costs the host nothing then, and neither does autograd.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise

import torch

Call = Callable[[], object]

# The sets of tensors together exceed the cache this many times.
CACHE_MULTIPLE = 4
FEWEST_SETS, MOST_SETS = 2, 64
# What a CPU's cache is taken for: it cannot be asked portably, and a core's share of it is about that.
CPU_CACHE_BYTES = 8 * 2**20

# One replay holds so much work that the events around it and the gap before it are a few thousandths of it.
REPLAY_SECONDS = 2e-3
MOST_CALLS_IN_A_GRAPH = 2000
# Clocks settle for this long before anything counts.
SETTLING_SECONDS = 0.05
FEWEST_SAMPLES, MOST_SAMPLES = 5, 200


@dataclass(frozen=True)
class Timing:
    """What one call was measured to take.

    Attributes:
        median: seconds a call, the median of all samples.
        spread: seconds between the lower and the upper quartile of the samples.
        calls: how many calls were measured, the warm-up not counted.
        method: "graph" for replays of a CUDA graph, "events" for CUDA events around queued calls where the call cannot be
            captured (the host's work can be part of the time then), "clock" for the host's clock on a CPU.
    """

    median: float
    spread: float
    calls: int
    method: str


def cache_bytes(device: torch.device) -> int:
    """The size of the device's last-level cache in bytes; an assumed one for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return CPU_CACHE_BYTES


def sets_for_cold_cache(bytes_per_call: int, device: torch.device) -> int:
    """How many independent sets of tensors a measured call needs, if it touches ``bytes_per_call`` bytes of one set."""
    needed = math.ceil(CACHE_MULTIPLE * cache_bytes(device) / max(bytes_per_call, 1)) + 1
    return min(max(needed, FEWEST_SETS), MOST_SETS)


@contextmanager
def measuring_stream(device: torch.device) -> Iterator[None]:
    """A CUDA stream, always the same one, for all that is to be measured; nothing on a CPU.

    Autograd runs a backward function on the stream of its forward. A backward can therefore be captured only if its
    forward ran on the capturing stream: make inputs and outputs inside such a block. :func:`measure` opens one itself.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole process: memory that one measurement gave back is then there for the next."""
    return torch.cuda.Stream(device)


def measure(calls: Sequence[Call], device: torch.device, *, seconds: float = 0.3) -> Timing:
    """Measure a call, given as one call for each of several independent sets of tensors.

    They are called a few times first, which leaves compilation and tuning on first use outside. What a call returns is
    kept until its next turn, so that the sets' outputs do not share memory either.

    Args:
        calls: the calls, at least one; :func:`sets_for_cold_cache` says how many sets make the cache cold.
        device: where they run. On CUDA that is on the stream of :func:`measuring_stream`.
        seconds: about how long to sample, beside warm-up and settling; a slow call is sampled a few times all the same.

    Raises:
        ValueError: ``calls`` is empty.
        Exception: whatever a call raises.
    """
    if not calls:
        raise ValueError("measure: calls is empty; give at least one call")
    if device.type != "cuda":
        return _by_clock(calls, seconds)
    with measuring_stream(device):
        for _ in range(2):
            for call in calls:
                call()
        torch.cuda.synchronize(device)
        try:
            return _by_graph(calls, device, seconds)
        # Out of memory would meet the events as well. What else capture raises has no type of its own.
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize(device)  # raises what the calls themselves did wrong, if that was it
            _forget_failed_capture()
            return _by_events(calls, device, seconds)


def _by_clock(calls: Sequence[Call], seconds: float) -> Timing:
    results: list[object] = [None] * len(calls)
    durations: list[float] = []

    def run(index: int) -> None:
        start = time.perf_counter()
        result = calls[index]()
        durations.append(time.perf_counter() - start)
        results[index] = result

    run(0)
    # Every set once, if they are not too slow for that: the first touch of new memory costs more than the next ones.
    for index in range(len(calls)):
        run(index)
        if sum(durations) > seconds:
            break
    count = _sample_count(seconds, durations[-1])
    durations.clear()
    for turn in range(count):
        run(turn % len(calls))
    return _summary(durations, count, "clock")


def _by_graph(calls: Sequence[Call], device: torch.device, seconds: float) -> Timing:
    graph, results = _captured(calls, rounds=1)
    round_seconds = min(_replay_seconds([graph.replay] * 5))
    rounds = math.ceil(REPLAY_SECONDS / max(round_seconds, 1e-7))
    rounds = max(min(rounds, MOST_CALLS_IN_A_GRAPH // len(calls)), 1)
    if rounds > 1:
        graph.reset()
        del graph, results
        graph, results = _captured(calls, rounds)
    calls_in_graph = rounds * len(calls)
    samples = _settled_samples(graph.replay, rounds * round_seconds, seconds)
    torch.cuda.synchronize(device)
    graph.reset()
    return _summary([sample / calls_in_graph for sample in samples], calls_in_graph * len(samples), "graph")


def _captured(calls: Sequence[Call], rounds: int) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """A graph of ``rounds`` rounds of calls, and their results, whose memory it writes to."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    results: list[object] = [None] * len(calls)
    pool = torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            for _ in range(rounds):
                for index, call in enumerate(calls):
                    results[index] = None  # gives the memory of this set's last result back for the next
                    results[index] = call()
    except RuntimeError:
        # After a capture that CUDA gave up, torch's allocator stays in that pool, and no later capture would succeed.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    return graph, results


def _forget_failed_capture() -> None:
    """Capture something that cannot fail: torch's random generator, too, takes itself for captured until a capture ends well."""
    number = torch.ones(1, device="cuda")
    with suppress(RuntimeError):
        _captured([lambda: number + 1], rounds=1)


def _by_events(calls: Sequence[Call], device: torch.device, seconds: float) -> Timing:
    results: list[object] = [None] * len(calls)

    def round_of_calls() -> None:
        for index, call in enumerate(calls):
            results[index] = None
            results[index] = call()

    round_seconds = min(_replay_seconds([round_of_calls] * 3))
    rounds = min(math.ceil(REPLAY_SECONDS / max(round_seconds, 1e-7)), 100)

    def queued() -> None:
        for _ in range(rounds):
            round_of_calls()

    samples = _settled_samples(queued, rounds * round_seconds, seconds)
    torch.cuda.synchronize(device)
    count = rounds * len(calls)
    return _summary([sample / count for sample in samples], count * len(samples), "events")


def _settled_samples(run: Call, expected_seconds: float, seconds: float) -> list[float]:
    for _ in range(max(math.ceil(SETTLING_SECONDS / expected_seconds), 1)):
        run()
    return _replay_seconds([run] * _sample_count(seconds, expected_seconds))


def _sample_count(seconds: float, sample_seconds: float) -> int:
    return min(max(math.ceil(seconds / max(sample_seconds, 1e-9)), FEWEST_SAMPLES), MOST_SAMPLES)


def _replay_seconds(runs: Sequence[Call]) -> list[float]:
    """The seconds of each run on the device, all of them queued before the first is waited for."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    events[0].record()
    for run, event in zip(runs, events[1:]):
        run()
        event.record()
    events[-1].synchronize()
    return [first.elapsed_time(second) * 1e-3 for first, second in pairwise(events)]


def _summary(samples: Sequence[float], calls: int, method: str) -> Timing:
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median=median, spread=upper - lower, calls=calls, method=method)
