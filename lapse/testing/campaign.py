"""Many schedules: configurations in turn, seeds counted up, more than one process if wanted."""
from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

from lapse.testing.simulation import LENGTHS, MODES, SAMPLING, Simulation, Violation

SLICE = 500         # schedules between two reports of progress


class Tally(NamedTuple):
    """Sums over schedules, and the first violation (of the lowest seed that was run)."""
    schedules: int = 0
    turns: int = 0
    messages: int = 0
    operations: int = 0
    relocations: int = 0
    violation: Violation | None = None

    def __add__(self, other: Tally) -> Tally:
        violations = [tally.violation for tally in (self, other) if tally.violation is not None]
        return Tally(*(a + b for a, b in zip(self[:5], other[:5])), min(violations, key=lambda violation: violation.seed, default=None))


def configurations(*, nodes: Iterable[int] | None = None, workers: Iterable[int] | None = None, modes: Iterable[str] | None = None,
                   caches: Iterable[bool] | None = None, shared_memory: Iterable[bool] | None = None,
                   lengths: Iterable[str] | None = None, sampling: Iterable[str] | None = None) -> list[dict]:
    """Every combination of what is given; by default sync, mixed, async; 2 to 4 nodes of 2 or 3 workers; caches off and on; local memory
    shared or not; lengths uniform and mixed; no sampling, and every scheme. (Without shared memory nothing is cached.)"""
    chosen = itertools.product(modes or MODES, nodes or (2, 3, 4), workers or (2, 3), caches or (False, True),
                               shared_memory or (True, False), lengths or LENGTHS, sampling or SAMPLING)
    names = ("mode", "nodes", "workers", "caches", "shared_memory", "lengths", "sampling")
    made = [dict(zip(names, values)) for values in chosen]
    return [one for one in made if one["shared_memory"] or not one["caches"] or caches is not None]


def run(first_seed: int, schedules: int, settings: list[dict], *, processes: int = 1,
        progress: Callable[[Tally], None] | None = None) -> Tally:
    """Run schedules with the seeds from first_seed on, each with the next of the settings; stop soon after a violation."""
    total = Tally()
    slices = [(seed, min(SLICE, first_seed + schedules - seed), (seed - first_seed) % len(settings), settings)
              for seed in range(first_seed, first_seed + schedules, SLICE)]
    for tally in map(_run_slice, slices) if processes == 1 else _in_processes(slices, processes):
        total += tally
        if progress is not None:
            progress(total)
        if total.violation is not None:
            break
    return total


def _run_slice(part) -> Tally:
    first_seed, schedules, first_setting, settings = part
    turns = messages = operations = relocations = 0
    for i in range(schedules):
        try:
            result = Simulation(first_seed + i, **settings[(first_setting + i) % len(settings)]).run()
        except Violation as violation:
            return Tally(i + 1, turns, messages, operations, relocations, violation)
        turns += result.turns
        messages += result.messages
        operations += result.operations
        relocations += result.relocations
    return Tally(schedules, turns, messages, operations, relocations)


def _in_processes(slices, processes: int):
    # spawned, not forked: a Lapse object of the parent is of no use in a child, and greenlets do not survive it either
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_run_slice, part) for part in slices]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
