"""What the benchmarks share: interleaved timing in one process, and the machine's own ceilings."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Container, Mapping
from contextlib import nullcontext

import torch

from fdda_fast.memory import resident_memory

Run = Callable[[], object]
Clock = Callable[[], float]
_SETTLED, _MOST_CALLS = 256, 12  # page faults (1 MiB), calls


def interleaved(
    runs: Mapping[str, Run], rounds: int, plain_memory: Container[str] = ()
) -> dict[str, float]:
    """Median seconds of every run: all in turn, `rounds` times, each after an untimed call.

    Args:
        plain_memory: runs for which memory is as PyTorch has it. For all others it stays with the
            process, as in this library's training loop, and calls are repeated until one asks for
            no new pages, which counts: that state, not the way to it, is what a long training sees.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            plain = name in plain_memory
            with nullcontext() if plain else resident_memory():
                run()
                seconds[name].append(_plain_call(run) if plain else _settled_call(run))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _plain_call(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _settled_call(run: Run) -> float:
    for _ in range(_MOST_CALLS):
        before = _page_faults()
        seconds = _plain_call(run)
        if _page_faults() - before < _SETTLED:
            break
    return seconds


def bursts(
    runs: Mapping[str, Run], rounds: int, clock: Clock = time.perf_counter, length: float = 0.1
) -> dict[str, float]:
    """Median seconds of one call of every run, for calls of milliseconds and less.

    All in turn, `rounds` times, each with as many calls as fit into `length` seconds. As long an
    untimed burst comes before: weights return to the cache, threads of the last run fall asleep.

    Args:
        clock: `time.process_time` leaves out what other processes take of a core.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            _burst(run, clock, length)
            seconds[name] += _burst(run, clock, length)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _burst(run: Run, clock: Clock, length: float) -> list[float]:
    """Seconds of every call, one at least."""
    seconds: list[float] = []
    while sum(seconds) < length:
        start = clock()
        run()
        seconds.append(clock() - start)
    return seconds


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def copy_run(numel: int, dtype: torch.dtype) -> Run:
    """Copies `numel` numbers between two tensors that stay: 2 * numel * itemsize bytes move."""
    source, target = torch.ones(numel, dtype=dtype), torch.ones(numel, dtype=dtype)
    return lambda: target.copy_(source)


def read_run(numel: int, dtype: torch.dtype) -> Run:
    """Reads `numel` numbers: as the sum of as many bytes in float32, which memory bounds."""
    source = torch.ones(numel * dtype.itemsize // 4)
    return source.sum


def multiply_run(dtype: torch.dtype, size: int = 1024) -> tuple[Run, float]:
    """A square matrix product, and its multiply-adds."""
    a, b = torch.randn(2, size, size).to(dtype)
    return lambda: a @ b, float(size) ** 3
