"""What a draw costs by each scheme and distribution, with everything local: CPU time of the drawing thread, at C level.

A sample of 64 draws each, as a sentence or a batch of triples needs them, keys only; and, for word2vec's five negatives, samples of 5.
The rival is numpy's generator, many draws per call. The last rows pull the values too.
"""
from __future__ import annotations

import time

import numpy as np

import lapse
from benchmarks import sampling_loops
from benchmarks.report import Row, against, median, progress

LENGTH = 100
SCHEMES = ("naive", "preloc", "pool", "local")
DISTRIBUTIONS = ("uniform", "log-uniform", "weights")


def nanoseconds(call, draws: int) -> float:
    """CPU time of one draw: of this thread, or what a thread beside it does counts as well."""
    start = time.thread_time_ns()
    wrong = call()
    took = time.thread_time_ns() - start
    if wrong:
        raise RuntimeError("a sample was refused")
    return took / draws


def numpy_draws(name: str, weights: np.ndarray, draws: int):
    """Draw the same by numpy."""
    rng = np.random.default_rng(1)
    bounds = np.cumsum(weights)
    if name == "uniform":
        rng.integers(0, len(weights), draws)
    elif name == "log-uniform":
        np.exp(rng.random(draws) * np.log(len(weights) + 1)).astype(np.int64)
    else:
        np.searchsorted(bounds, rng.random(draws) * bounds[-1])


def measure(scheme: str, name: str, size: dict) -> dict[str, list[float]]:
    num_keys, draws = size["num_keys"], size["draws"]
    weights = np.random.default_rng(1).random(num_keys)**3
    lapse.setup(num_keys, 1)
    with lapse.Server(LENGTH) as server:
        server.enable_sampling_support(scheme, True, weights if name == "weights" else name, seed=1)
        found: dict[str, list[float]] = {"64": [], "5": [], "pulled": [], "numpy": []}
        with lapse.Worker(0, server) as kv:
            for keys in np.array_split(np.arange(num_keys), max(1, num_keys // 1000)):
                kv.set(keys, np.ones((len(keys), LENGTH), np.float32))
            for number in range(size["rounds"] + 1):
                took = {"64": nanoseconds(lambda: sampling_loops.run_draws(kv, 64, draws // 64), draws),
                        "5": nanoseconds(lambda: sampling_loops.run_draws(kv, 5, draws // 5), draws),
                        "pulled": nanoseconds(lambda: sampling_loops.run_pulls(kv, 64, draws // 640, 4 * LENGTH), draws // 10),
                        "numpy": nanoseconds(lambda: numpy_draws(name, weights, draws), draws)}
                if number > 0:
                    for what, value in took.items():
                        found[what].append(value)
    return found


def sizes(quick: bool) -> dict:
    return {"num_keys": 100_000, "draws": 500_000 if quick else 2_000_000, "rounds": 3 if quick else 7}


def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    size = size or sizes(quick)
    rows, last = [], []
    for scheme in SCHEMES:
        for name in DISTRIBUTIONS:
            progress(f"sampling: {scheme}, {name}")
            found = measure(scheme, name, size)
            row = against(f"a draw, {scheme}, {name}", found["64"], "ns", "numpy", found["numpy"])
            row.note = f"of samples of 5: {median(found['5']):.1f} ns"
            rows.append(row)
            if name == "uniform":
                last.append(Row(f"pull_sample, {scheme}, {LENGTH} float32", median([1000 / took for took in found["pulled"]]),
                                "M samples/s"))
    return rows + last
