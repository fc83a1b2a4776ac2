"""What one call costs, and what a second thread brings, with everything local.

One key per call: a loop of pulls of one random key each, from Python and from Cython, and as the machine's limit the same through
nothing but a slot word and a latch. Two threads: each works on its own half of the keys, against one thread on one half; a pair of
processes, each with a store of its own, does the same in the same round, and shows what the machine gives (memory bandwidth, other load).
"""
from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time

import numpy as np

import lapse
from benchmarks import _loops
from benchmarks.report import Row, against, median, progress

LENGTH = 100
AHEAD = 10_000_000      # nanoseconds between the word to start and the start


def fill(worker: lapse.Worker) -> None:
    """Every key gets its row."""
    for keys in np.array_split(np.arange(worker.num_keys), max(1, worker.num_keys // 1000)):
        worker.set(keys, np.ones((len(keys), LENGTH), np.float32))


# --- one key per call --------------------------------------------------------------------------------------------------------------

def python_calls(worker: lapse.Worker, keys: np.ndarray, vals: np.ndarray) -> int:
    """The arrays of one key are made a few at a time: 100,000 of them would themselves have to come from memory."""
    pull, took = worker.pull, 0
    for part in np.array_split(keys, max(1, len(keys) // 1000)):
        arrays = list(part[:, None])
        start = time.perf_counter_ns()
        for key in arrays:
            pull(key, vals)
        took += time.perf_counter_ns() - start
    return took


def tensor_calls(worker: lapse.Worker, size: dict) -> dict[str, tuple[list[float], list[float]]]:
    """Nanoseconds per call on tensors and on arrays, in the same rounds; nothing where PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    random = np.random.default_rng(2)
    sides: dict[str, tuple[list[float], list[float]]] = {}
    for keys_per_call, calls in ((1, size["calls"]), (size["keys_per_call"], max(10, size["calls"] // size["keys_per_call"]))):
        for name, operation in (("pull", worker.pull), ("push", worker.push)):
            both = sides[f"{name} of {keys_per_call:,} key{'s' if keys_per_call > 1 else ''} per call"] = ([], [])
            vals = np.zeros((keys_per_call, LENGTH), np.float32)
            turns = ((lambda keys: list(torch.from_numpy(keys)), torch.from_numpy(vals), both[0]), (list, vals, both[1]))
            for number in range(2 * size["rounds"] + 2):
                for rows_of, room, side in turns if number % 2 else turns[::-1]:
                    took = 0
                    for _ in range(max(1, calls // 1000)):          # other keys each time: nobody is to find them in the cache
                        rows = rows_of(random.integers(0, worker.num_keys, (min(1000, calls), keys_per_call)))
                        start = time.perf_counter_ns()
                        for row in rows:
                            operation(row, room)
                        took += time.perf_counter_ns() - start
                    if number > 1:
                        side.append(took / (len(rows) * max(1, calls // 1000)))
    return sides


def one_key(worker: lapse.Worker, size: dict) -> tuple[dict[str, list[float]], dict[str, tuple[list[float], list[float]]]]:
    """Nanoseconds per call, one entry per round; and those of tensor_calls."""
    fill(worker)
    random = np.random.default_rng(1)
    calls, num_keys = size["calls"], worker.num_keys
    table = np.ones((num_keys, LENGTH), np.float32)
    slots = table.ctypes.data + np.arange(num_keys, dtype=np.uint64) * np.uint64(table.strides[0])
    vals = np.empty(LENGTH, np.float32)
    figures: dict[str, list[float]] = {}
    for number in range(size["rounds"] + 1):
        keys = random.integers(0, num_keys, calls)
        few = random.integers(0, min(1000, num_keys), calls)
        took = {"Python": python_calls(worker, keys, vals),
                "Cython": _loops.one_key_per_call(worker, keys, vals),
                "copy": _loops.one_copy_per_key(keys, slots, vals.nbytes, vals, False),
                "latched copy": _loops.one_copy_per_key(keys, slots, vals.nbytes, vals, True),
                "Python, 1,000 keys": python_calls(worker, few, vals),
                "Cython, 1,000 keys": _loops.one_key_per_call(worker, few, vals)}
        if number > 0:
            for name, nanoseconds in took.items():
                figures.setdefault(name, []).append(nanoseconds / calls)
    return figures, tensor_calls(worker, size)


# --- two threads, two processes ------------------------------------------------------------------------------------------------------

def work(worker: lapse.Worker, language: str, push: bool, keys: np.ndarray, vals: np.ndarray, start: int, stop: int) -> float:
    """Keys per second, between two instants of the monotonic clock, of at least one call."""
    if language == "Cython":
        count, took = _loops.calls_until(worker, push, keys, vals.reshape(-1), start, stop)
        return 1e9 * count / took
    operation, clock = worker.push if push else worker.pull, time.monotonic_ns
    calls = 0
    while (left := start - clock()) > 0:
        time.sleep(left / 1e9)
    begun = clock()
    while calls == 0 or clock() < stop:
        operation(keys[calls % len(keys)], vals)
        calls += 1
    return 1e9 * calls * keys.shape[1] / (clock() - begun)


class Team:
    """One process with a store of its own and a number of worker threads, each with its part of the keys. It does what its pipe says."""

    def __init__(self, parts: list[int], size: dict):
        context = multiprocessing.get_context("fork")
        self.pipe, pipe = context.Pipe()
        self.process = context.Process(target=self.live, args=(pipe, parts, size), daemon=True)
        self.process.start()
        pipe.close()

    @staticmethod
    def live(pipe, parts: list[int], size: dict) -> None:
        num_keys, per_call = size["num_keys"], size["keys_per_call"]
        lapse.setup(num_keys, len(parts))
        with lapse.Server(LENGTH) as server:
            workers = [lapse.Worker(number, server) for number in range(len(parts))]
            fill(workers[0])
            pipe.send("ready")
            half = num_keys // 2
            keys = [part * half + np.random.default_rng(part).integers(0, half, (500, per_call)) for part in parts]
            vals = [np.zeros((per_call, LENGTH), np.float32) for _ in parts]
            while (order := pipe.recv()) is not None:
                language, push, threads, start, stop = order
                rates = [0.0] * threads
                members = [threading.Thread(target=Team.member, args=(rates, i, workers[i], language, push, keys[i], vals[i], start, stop))
                           for i in range(threads)]
                for member in members:
                    member.start()
                for member in members:
                    member.join()
                pipe.send(sum(rates))
            for worker in workers:
                worker.finalize()

    @staticmethod
    def member(rates: list[float], index: int, *arguments) -> None:
        rates[index] = work(*arguments)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join(20)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


def rate(teams: list[Team], language: str, push: bool, threads: int, size: dict) -> float:
    """Million keys/s of all teams together."""
    start = time.monotonic_ns() + AHEAD
    for team in teams:
        team.pipe.send((language, push, threads, start, start + size["slice"]))
    return sum(team.pipe.recv() for team in teams) / 1e6


def scaling(size: dict) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Million keys/s of 1 thread, 2 threads, 1 process and 2 processes by (language, operation), one entry per round."""
    teams = []
    try:
        for parts in ([0, 1], [0], [1]):
            teams.append(Team(parts, size))
            if not teams[-1].pipe.poll(60) or teams[-1].pipe.recv() != "ready":
                raise RuntimeError("a process did not start")
        both, *apart = teams
        figures = {}
        for language in ("Python", "Cython"):
            for operation in ("pull", "push"):
                progress(f"calls: {operation} by two threads and by two processes, {language}")
                sides = {"1 thread": ([both], 1), "2 threads": ([both], 2), "1 process": (apart[:1], 1), "2 processes": (apart, 1)}
                measured = figures[language, operation] = {name: [] for name in sides}
                for number in range(size["rounds"] + 1):
                    for name, (side, threads) in sides.items():
                        value = rate(side, language, operation == "push", threads, size)
                        if number > 0:
                            measured[name].append(value)
        return figures
    finally:
        for team in teams:
            team.close()


# --- all -----------------------------------------------------------------------------------------------------------------------------

def sizes(quick: bool) -> dict:
    return {"num_keys": 100_000, "rounds": 5 if quick else 15, "calls": 100_000, "keys_per_call": 1000,
            "slice": 100_000_000 if quick else 300_000_000}


def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    size = size or sizes(quick)
    progress("calls: one key per call")
    one, tensors = lapse.launch(one_key, 1, 1, num_keys=size["num_keys"], value_length=LENGTH, args=(size,))[0][0]
    rows = [
        Row("one key per call, from Python", median(one["Python"]), "ns", bound="< 400", cpp="1300 ns"),
        Row("one key per call, from Cython", median(one["Cython"]), "ns", median(one["latched copy"]), "slot, latch and copy",
            bound="< 100", cpp="140-180 ns"),
        Row("slot and copy without a latch", median(one["copy"]), "ns"),
        Row("one key per call of 1,000 different keys, from Python", median(one["Python, 1,000 keys"]), "ns"),
        Row("one key per call of 1,000 different keys, from Cython", median(one["Cython, 1,000 keys"]), "ns"),
    ]
    for what, (ours, arrays) in tensors.items():
        rows.append(against(f"tensors, {what}", ours, "ns", "arrays", arrays, "<= 1.1"))
    for (language, operation), measured in scaling(size).items():
        threads = [two / single for two, single in zip(measured["2 threads"], measured["1 thread"], strict=True)]
        processes = [two / single for two, single in zip(measured["2 processes"], measured["1 process"], strict=True)]
        row = against(f"2 threads against 1, {operation}, {language}", threads, "x", "2 processes", processes, ">= 0.9")
        row.note = f"{median(measured['1 thread']):.1f} -> {median(measured['2 threads']):.1f} M keys/s"
        rows.append(row)
    return rows
