"""The store of one node against np.take, against itself without latches, and against the C++ original's figures.

    python -m benchmarks.local [--rounds 15] [--only NAME ...]

All sides of a comparison take turns in one run; medians. Needs the package built in place, and compiles local_loops.pyx.
"""
import argparse
import multiprocessing
import statistics
import threading
import time
from pathlib import Path

import numpy as np

from tests.ext.probe_build import load_extension

HERE = Path(__file__).resolve().parent

BATCH = 1000
CALLS = 300


def loops():
    return load_extension(HERE / "local_loops.pyx")


def alternate(sides, rounds):
    """Run every side once per round; {name: median nanoseconds}."""
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(run())
    return {name: statistics.median(t) for name, t in times.items()}


def from_python(call, batches):
    def run():
        start = time.perf_counter_ns()
        for keys in batches:
            call(keys)
        return time.perf_counter_ns() - start
    return run


def batches(length=100, num_keys=100_000, rounds=15):
    """Million rows per second of each side, random keys, 1,000 per call, one thread."""
    rng = np.random.default_rng(1)
    calls = max(20, min(CALLS, CALLS * 200 // length))
    table = loops().Table(num_keys, length)
    base = rng.random((num_keys, length), dtype=np.float32)
    for first in range(0, num_keys, BATCH):
        table.push(np.arange(first, first + BATCH), base[first:first + BATCH].ravel())
    keys = rng.integers(0, num_keys, (calls, BATCH))
    out = np.zeros(BATCH * length, np.float32)
    rows = out.reshape(BATCH, length)
    table.pull(keys[0], out)
    assert (rows == base[keys[0]]).all()
    times = alternate({
        "np.take": from_python(lambda k: np.take(base, k, axis=0, out=rows), keys),
        "np.take clip": from_python(lambda k: np.take(base, k, axis=0, out=rows, mode="clip"), keys),
        "pull from Python": from_python(lambda k: table.pull(k, out), keys),
        "pull": lambda: table.run("pull", keys, out),
        "pull without latches": lambda: table.run("pull without latches", keys, out),
        "push": lambda: table.run("push", keys, out),
        "set": lambda: table.run("set", keys, out),
    }, rounds)
    return {name: calls * BATCH * 1e3 / t for name, t in times.items()}


def single(length=100, num_keys=100_000, rounds=15):
    """Nanoseconds of a call with one random key, from C; "few": 1,000 different keys, which the caches hold."""
    rng = np.random.default_rng(2)
    table = loops().Table(num_keys, length)
    out = np.ones(length, np.float32)
    many, few = (rng.integers(0, n, 100_000) for n in (num_keys, 1000))
    times = alternate({f"{what}, {name}": (lambda what=what, keys=keys: table.run_single(what, keys, out))
                       for what in ("pull", "push") for name, keys in (("all", many), ("few", few))}, rounds)
    return {name: t / len(many) for name, t in times.items()}


def _half(table, rank, num_keys, length, what, ready, go, seconds, results):
    """Calls on one half of the keys for some seconds; rows per nanosecond."""
    keys = rank * (num_keys // 2) + np.random.default_rng(rank).integers(0, num_keys // 2, (100, BATCH))
    out = np.ones(BATCH * length, np.float32)
    table.run(what, keys, out)
    ready.wait(60)
    go.wait(60)
    done = spent = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        spent += table.run(what, keys, out)
        done += keys.size
    results[rank] = done / spent


def _half_process(rank, num_keys, length, what, ready, go, seconds, results):
    _half(loops().Table(num_keys, length), rank, num_keys, length, what, ready, go, seconds, results)


def two(what="pull", length=100, num_keys=100_000, rounds=3, seconds=0.5):
    """Million rows per second of two threads on one store, of two processes with a store each, and of one thread."""
    rates = {"1 thread": [], "2 threads": [], "2 processes": []}
    context = multiprocessing.get_context("spawn")
    table = loops().Table(num_keys, length)
    for _ in range(rounds):
        for name, reached in rates.items():
            ranks = [0] if name == "1 thread" else [0, 1]
            kind = context if name == "2 processes" else threading
            ready, go = kind.Barrier(len(ranks)), kind.Event()
            results = context.Array("d", 2)
            rest = (num_keys, length, what, ready, go, seconds, results)
            if kind is threading:
                tasks = [threading.Thread(target=_half, args=(table, r, *rest), daemon=True) for r in ranks]
            else:
                tasks = [context.Process(target=_half_process, args=(r, *rest), daemon=True) for r in ranks]
            for t in tasks:
                t.start()
            go.set()
            for t in tasks:
                t.join(120)
            reached.append(sum(results) * 1e3)
    return {name: statistics.median(r) for name, r in rates.items()}


def table_row(name, value, unit, ratio="", goal=""):
    print(f"{name:46s} {value:8.1f} {unit:10s} {ratio:32s} {goal}")


def show_batches(rounds):
    r = batches(100, rounds=rounds)
    unit = "M rows/s"
    pull = r["pull from Python"]
    print("100,000 keys, 100 float32 per key, 1,000 random keys a call, one thread")
    table_row("np.take(out=)", r["np.take"], unit)
    table_row('np.take(out=, mode="clip")', r["np.take clip"], unit)
    table_row("pull, called from Python", pull, unit, f"{pull / r['np.take']:.2f} np.take, {pull / r['np.take clip']:.2f} clip",
              "goal >= 1.2, >= 0.6")
    table_row("pull, called from C", r["pull"], unit, f"{r['pull'] / 11.8:.1f} C++ (11.8)", "goal > 2")
    table_row("  without latches", r["pull without latches"], unit,
              f"latch: {100 * (1 - r['pull'] / r['pull without latches']):.0f} % of the rate", "goal <= 20 %")
    table_row("push", r["push"], unit, f"{r['push'] / r['pull']:.2f} pull, {r['push'] / 3.9:.1f} C++ (3.9)", "goal >= 0.8, > 4")
    table_row("set", r["set"], unit)


def show_lengths(rounds):
    print("\nother lengths (C++: 24.5 and 1.7 M rows/s pull, 21.8 and 0.76 M push)")
    for length, pull, push, goal in ((10, 24.5, 21.8, 1.2), (1000, 1.7, 0.76, 1.5)):
        r = batches(length, rounds=rounds)
        table_row(f"length {length}: np.take / clip", r["np.take"], "M rows/s", f"{r['np.take clip']:.1f} clip")
        table_row("  pull", r["pull"], "M rows/s", f"{r['pull'] / pull:.1f} C++, {r['pull'] / r['np.take']:.2f} np.take",
                  f"goal > {goal} C++")
        table_row("  without latches", r["pull without latches"], "M rows/s",
                  f"latch: {100 * (1 - r['pull'] / r['pull without latches']):.0f} % of the rate")
        table_row("  push", r["push"], "M rows/s", f"{r['push'] / push:.1f} C++")


def show_single(rounds):
    print("\none key a call, from C, 100 float32 per key")
    for name, t in single(rounds=rounds).items():
        table_row(name + " keys", t, "ns")


def show_two(rounds):
    print("\ntwo at once, each on its half of the keys, 100 float32 per key")
    for what in ("pull", "push"):
        r = two(what, rounds=max(1, rounds // 5))
        table_row(f"{what}: 1 thread", r["1 thread"], "M rows/s")
        table_row("  2 processes", r["2 processes"], "M rows/s")
        table_row("  2 threads", r["2 threads"], "M rows/s", f"{r['2 threads'] / r['2 processes']:.2f} of 2 processes",
                  "goal >= 0.9")


SHOWN = {"batches": show_batches, "lengths": show_lengths, "single": show_single, "two": show_two}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=sorted(SHOWN), default=list(SHOWN))
    args = parser.parse_args()
    for name in args.only:
        SHOWN[name](args.rounds)


if __name__ == "__main__":
    main()
