"""Many schedules: configurations in turn, seeds counted up, more than one process if wanted."""
from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from statistics import median
from typing import NamedTuple

from lapse.testing.simulation import LENGTHS, MODES, SAMPLING, Simulation, Violation

SLICE = 500         # schedules between two reports of progress


# What the configurations do not have: many keys, many of them in a call, and values so large that two fill a message.
WIDE = [
    {"nodes": 3, "workers": 2, "keys": 60, "registers": 4, "ops": 14, "mode": "async", "lengths": "mixed", "positions": 80, "caches": True},
    {"nodes": 2, "workers": 3, "keys": 12, "registers": 4, "ops": 20, "mode": "mixed", "positions": 20, "caches": True},
    {"nodes": 2, "workers": 2, "keys": 63, "ops": 14, "mode": "async", "positions": 80},
    {"nodes": 3, "workers": 2, "keys": 10, "ops": 20, "mode": "async", "positions": 20, "shared_memory": False},
]
LARGE = [
    {"nodes": 3, "workers": 1, "keys": 6, "registers": 2, "ops": 6, "mode": "async", "lengths": "large"},
    {"nodes": 2, "workers": 2, "keys": 6, "ops": 6, "mode": "async", "lengths": "large", "caches": True},
    {"nodes": 3, "workers": 1, "keys": 6, "ops": 6, "mode": "mixed", "lengths": "large", "shared_memory": False},
]


class Tally(NamedTuple):
    """Sums over schedules, and the first violation (of the lowest seed that was run)."""
    schedules: int = 0
    turns: int = 0
    messages: int = 0
    operations: int = 0
    relocations: int = 0
    trace_hash: int = 0             # of all schedules: the same however a range of seeds is cut
    violation: Violation | None = None

    def __add__(self, other: Tally) -> Tally:
        violations = [tally.violation for tally in (self, other) if tally.violation is not None]
        return Tally(*(a + b for a, b in zip(self[:5], other[:5])), (self.trace_hash + other.trace_hash) % 2**64,
                     min(violations, key=lambda violation: violation.seed, default=None))


def configurations(*, nodes: Iterable[int] | None = None, workers: Iterable[int] | None = None, modes: Iterable[str] | None = None,
                   caches: Iterable[bool] | None = None, shared_memory: Iterable[bool] | None = None,
                   lengths: Iterable[str] | None = None, sampling: Iterable[str] | None = None,
                   keys: Iterable[int] | None = None) -> list[dict]:
    """Every combination of what is given; by default sync, mixed, async; 2 to 5 nodes of 1 to 3 workers; caches off and on; local memory
    shared or not; lengths uniform and mixed; no sampling, and every scheme; 1 to 4 keys. (Without shared memory nothing is cached.)"""
    chosen = itertools.product(modes or MODES, nodes or (2, 3, 4, 5), workers or (1, 2, 3), caches or (False, True),
                               shared_memory or (True, False), lengths or LENGTHS, sampling or SAMPLING, keys or (1, 2, 3, 4))
    names = ("mode", "nodes", "workers", "caches", "shared_memory", "lengths", "sampling", "keys")
    made = [dict(zip(names, values)) for values in chosen]
    return [one for one in made if one["shared_memory"] or not one["caches"] or caches is not None]


def setting_of(seed: int, settings: list[dict]) -> dict:
    """Which of the settings a seed runs with: its own in every range that holds it, and unlike that of its neighbours."""
    return settings[seed * 7919 % len(settings)]        # (a prime, so that all of them come up)


def varied(seed: int, settings: list[dict]) -> dict:
    """The same, but every fifth seed is of the wide ones, and every hundredth of the large ones, which take long."""
    if seed % 100 == 0:
        return LARGE[seed // 100 % len(LARGE)]
    return WIDE[seed // 5 % len(WIDE)] if seed % 5 == 0 else setting_of(seed, settings)


def faulty(fault: str, schedules: int, settings: list[dict]) -> tuple[int, Violation] | None:
    """The first of the seeds 1, 2, ... that finds the fault, and what it found; None if `schedules` of them do not."""
    for seed in range(1, schedules + 1):
        try:
            Simulation(seed, **setting_of(seed, settings), faults=fault).run()
        except Violation as violation:
            return seed, violation
    return None


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
                                                     "fordblks", "keepcost")]


def leaked(seed: int, settings: dict) -> int:
    """Bytes that each run of this schedule leaves behind; 0 where the C library does not tell (it has to be glibc)."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _Mallinfo
    for runs in (7, 30):        # glibc counts what its thread caches hold, up to 7 blocks of a size, as used: those may grow for some runs
        used = []
        for _ in range(runs):
            Simulation(seed, **settings).run()
            gc.collect()
            info = libc.mallinfo2()
            used.append(info.uordblks + info.hblkhd)
        grown = median(b - a for a, b in zip(used[1:], used[2:]))
        if grown < 48:          # less than the smallest thing that the core allocates: noise of Python's
            return 0
    return int(grown)


def smaller(settings: dict) -> Iterator[dict]:
    """Settings that have less of one thing, the largest steps first."""
    least = {"nodes": 2, "workers": 1, "keys": 1, "registers": 0, "ops": 1, "positions": 1}
    for name, low in least.items():
        for value in sorted({low, (low + settings[name]) // 2, settings[name] - 1}):
            if low <= value < settings[name]:
                yield {**settings, name: value}
    for name, plain in (("sampling", "none"), ("lengths", "uniform"), ("caches", False)):
        if settings[name] != plain:
            yield {**settings, name: plain}


def shrink(violation: Violation, tries: int = 100) -> Violation:
    """A violation of as few nodes, workers, keys and operations as are found with the next `tries` seeds of each smaller setting."""
    found = True
    while found:
        found = False
        for settings in smaller(violation.settings):
            less = next(filter(None, (attempt(seed, settings) for seed in range(1, tries + 1))), None)
            if less is not None:
                violation, found = less, True
                break
    return violation


def attempt(seed: int, settings: dict) -> Violation | None:
    try:
        Simulation(seed, **settings).run()
    except Violation as violation:
        return violation
    return None


def as_test(violation: Violation) -> str:
    """A test to paste that runs this schedule: it fails as long as the violation is there."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in violation.settings.items())
    return (f"from lapse.testing import Simulation\n\n\ndef test_seed_{violation.seed}():\n"
            f"    # {violation.problem.splitlines()[0]}\n    Simulation({violation.seed}, {arguments}).run()\n")


def run(first_seed: int, schedules: int, settings: list[dict], *, processes: int = 1,
        progress: Callable[[Tally], None] | None = None) -> Tally:
    """Run schedules with the seeds from first_seed on, each with its own one of the settings; stop soon after a violation."""
    total = Tally()
    slices = [(seed, min(SLICE, first_seed + schedules - seed), settings)
              for seed in range(first_seed, first_seed + schedules, SLICE)]
    for tally in map(_run_slice, slices) if processes == 1 else _in_processes(slices, processes):
        total += tally
        if progress is not None:
            progress(total)
        if total.violation is not None:
            break
    return total


def _run_slice(part) -> Tally:
    first_seed, schedules, settings = part
    turns = messages = operations = relocations = trace = 0
    for i in range(schedules):
        try:
            result = Simulation(first_seed + i, **setting_of(first_seed + i, settings)).run()
        except Violation as violation:
            return Tally(i + 1, turns, messages, operations, relocations, trace, violation)
        turns += result.turns
        messages += result.messages
        operations += result.operations
        relocations += result.relocations
        trace = (trace + result.trace_hash) % 2**64
    return Tally(schedules, turns, messages, operations, relocations, trace)


def _in_processes(slices, processes: int):
    # spawned, not forked: a Lapse object of the parent is of no use in a child, and greenlets do not survive it
    # either. Ctrl-C is for the parent: they end with the slices that they are at.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"),
                             initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        futures = [pool.submit(_run_slice, part) for part in slices]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
