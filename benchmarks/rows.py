"""Rows per second with everything local: pull and push of 1,000 random keys a call, from Python, against NumPy and the C++ original.

np.take copies the same rows out of a plain array; mode="clip" lets it skip its check of the indices. What the latch costs is seen on the
store alone (local_loops.pyx), where the same loop exists without it.
"""
from __future__ import annotations

import time

import numpy as np

import lapse
from benchmarks import local_loops
from benchmarks.report import Row, against, against_cpp, progress

CPP_PULL = {10: (24.5, "> 1.2", "23.7-24.5 M"), 100: (11.8, "> 2", "8.8-11.8 M"), 1000: (1.7, "> 1.5", "1.4-1.7 M")}
CPP_PUSH = (3.9, "> 4", "3.7-3.9 M")


def rate(call, batches: np.ndarray) -> float:
    """Million rows/s of call(keys), one call per row of `batches`."""
    start = time.perf_counter_ns()
    for keys in batches:
        call(keys)
    return 1e3 * batches.size / (time.perf_counter_ns() - start)


def on_node(worker: lapse.Worker, length: int, size: dict) -> dict[str, list[float]]:
    num_keys, per_call = worker.num_keys, size["keys_per_call"]
    for keys in np.array_split(np.arange(num_keys), max(1, num_keys // 1000)):
        worker.set(keys, np.ones((len(keys), length), np.float32))
    table = np.ones((num_keys, length), np.float32)
    out = np.zeros((per_call, length), np.float32)
    zeros = np.zeros((per_call, length), np.float32)
    sides = {
        "pull": lambda keys: worker.pull(keys, out),
        "take": lambda keys: np.take(table, keys, axis=0, out=out),
        "take clip": lambda keys: np.take(table, keys, axis=0, out=out, mode="clip"),
        "push": lambda keys: worker.push(keys, zeros),
    }
    figures: dict[str, list[float]] = {name: [] for name in sides}
    random = np.random.default_rng(1)
    calls = max(1, size["rows"] // per_call * 100 // max(length, 100))
    for number in range(size["rounds"] + 1):
        keys = random.integers(0, num_keys, (calls, per_call))
        for name, call in sides.items():
            value = rate(call, keys)
            if number > 0:
                figures[name].append(value)
    return figures


def latch(size: dict) -> dict[str, list[float]]:
    """Nanoseconds per row of the store's pull, and of the same loop without latches."""
    per_call = size["keys_per_call"]
    table = local_loops.Table(size["num_keys"], 100)
    vals = np.zeros(per_call * 100, np.float32)
    random = np.random.default_rng(1)
    figures: dict[str, list[float]] = {"pull": [], "pull without latches": []}
    for number in range(size["rounds"] + 1):
        keys = random.integers(0, size["num_keys"], (max(1, size["rows"] // per_call), per_call))
        for name, values in figures.items():
            value = table.run(name, keys, vals) / keys.size
            if number > 0:
                values.append(value)
    return figures


def sizes(quick: bool) -> dict:
    return {"num_keys": 100_000, "keys_per_call": 1000, "rounds": 7 if quick else 31, "rows": 1_000_000}


def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    size = size or sizes(quick)
    rows = []
    for length in (100, 10, 1000):
        progress(f"local: pull and push, {length} values per key")
        rates = lapse.launch(on_node, 1, 1, num_keys=size["num_keys"], value_length=length, args=(length, size))[0][0]
        unit = "M rows/s"
        if length == 100:
            rows += [against("local pull", rates["pull"], unit, "np.take", rates["take"], ">= 1.2"),
                     against("local pull", rates["pull"], unit, "np.take clip", rates["take clip"], ">= 0.6"),
                     against_cpp("local pull", rates["pull"], unit, *CPP_PULL[length])]
            progress("local: the latch")
            costs = latch(size)
            rows += [against("local pull, store alone", costs["pull"], "ns", "without latches", costs["pull without latches"], "<= 1.2"),
                     against("local push", rates["push"], unit, "pull", rates["pull"], ">= 0.8"),
                     against_cpp("local push", rates["push"], unit, *CPP_PUSH)]
        else:
            rows.append(against_cpp(f"local pull, {length} values per key", rates["pull"], unit, *CPP_PULL[length]))
    return rows
