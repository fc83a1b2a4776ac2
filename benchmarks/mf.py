"""Matrix factorization: `python -m benchmarks --only mf [--quick]`; `python -m benchmarks.mf --cells N` for a matrix of any size.

The matrix is the one on which the C++ program was measured: 20,000 x 10,000, 2 million cells of rank 10 and noise, factors of rank 100,
float64. Whatever is compared runs in turn. s/epoch is the training of the slowest worker, from barrier to barrier, without losses.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import mf_large, mf_movielens
from benchmarks.report import Row, against, against_cpp, median, plain, progress

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ((2.499, 2.776), (1.553, 1.691), (1.471, 1.644))       # of the C++ program, after epochs 1 to 3: train, test


def sizes(quick: bool) -> dict:
    return {"rows": 20_000, "cols": 10_000, "cells": 2_000_000, "tests": 20_000, "rank": 100, "rounds": 2 if quick else 5,
            "epochs": 4 if quick else 8, "movielens": 1 if quick else 3}


def make_matrix(size: dict) -> Path:
    """Write the matrix if it is not there, the same numbers as in the C++ program's runs; return its folder."""
    rows, cols, count, tests = (size[name] for name in ("rows", "cols", "cells", "tests"))
    folder = ROOT / f"build/bench_data/mf-{rows}x{cols}x{count}"
    if (folder / "test.mmc").exists():
        return folder
    progress("mf: writing the matrix")
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    w = random.normal(size=(rows, 10)) / 10**0.25
    h = random.normal(size=(cols, 10)) / 10**0.25
    cells = np.unique(random.integers(0, rows * cols, size=int((count + tests) * 1.05)))
    cells = random.permutation(cells)[:count + tests]
    i, j = cells // cols, cells % cols
    values = np.einsum("nr,nr->n", w[i], h[j]) + 0.1 * random.normal(size=len(cells))
    for name, part in ("train.mmc", slice(0, count)), ("test.mmc", slice(count, None)):
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write(f"%%MatrixMarket matrix coordinate real general\n{rows} {cols} {len(i[part])}\n")
            for cell in zip(i[part].tolist(), j[part].tolist(), values[part].tolist()):
                file.write(f"{cell[0] + 1} {cell[1] + 1} {cell[2]:.8g}\n")
        os.replace(file.name, folder / name)
    return folder


# --- the program ------------------------------------------------------------------------------------------------------------------

def start(nodes, threads, epochs, *options, data):
    """Start the program on so many nodes and threads."""
    report = tempfile.NamedTemporaryFile(suffix=".jsonl", delete=False)  # noqa: SIM115 (finish removes it)
    report.close()
    program = [sys.executable, "apps/matrix_factorization.py", "-d", data, "-t", threads, "-e", epochs, "--report", report.name, *options]
    launcher = [sys.executable, "-m", "lapse", "run", "-s", nodes] if nodes > 1 else []
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([str(word) for word in (*launcher, *program)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return process, Path(report.name)


def finish(started, timeout=600):
    """Return the epochs (dicts; from 1 on with losses the start comes first) and the nodes' peak memory in MiB."""
    process, report = started
    output, _ = process.communicate(timeout=timeout)
    epochs = [json.loads(line) for line in report.read_text().splitlines()]
    report.unlink()
    if process.returncode:
        raise RuntimeError(output)
    return epochs, [float(number) for number in re.findall(r"had at most (\d+) MiB", output)]


def seconds(epochs):
    """The median time of an epoch; the first one warms up."""
    return median([epoch["seconds"] for epoch in epochs if epoch["epoch"] > 1])


JOBS = {"1x1": (1, 1), "1x2": (1, 2), "2x1": (2, 1)}
CPP = {"1x2": "0.88-1.25", "2x1": "0.80-1.07"}


def speed_rows(data, size):
    """s/epoch of dsgd, and what two workers gain over one beside what two processes gain that have nothing to do with each other."""
    options = ["-r", size["rank"], "--eps", 0.0005, "--compute_loss", 0]
    times, shares = {name: [] for name in (*JOBS, "apart")}, []
    for number in range(size["rounds"]):
        progress(f"mf: dsgd, round {number + 1} of {size['rounds']}")
        for name, (nodes, threads) in JOBS.items():
            found, _ = finish(start(nodes, threads, size["epochs"], *options, data=data))
            times[name].append(seconds(found))
            if nodes == 2:
                shares += [epoch["local_share"] for epoch in found]
        pair = [start(1, 1, size["epochs"], *options, data=data) for _ in range(2)]
        times["apart"].append(median([seconds(finish(one)[0]) for one in pair]))
    rows = [against_cpp("dsgd, 1 node x 1 thread", times["1x1"], "s/epoch", 1.65, "< 0.25", "1.65")]
    ideal = [2 * alone / apart for alone, apart in zip(times["1x1"], times["apart"], strict=True)]      # each of the two does all the work
    for name in "1x2", "2x1":
        gain = [one / other for one, other in zip(times["1x1"], times[name], strict=True)]
        rows += [against(f"dsgd, gain of {name} over 1x1", gain, "x", "two processes", ideal, ">= 0.9"),
                 Row(f"dsgd, {name}", median(times[name]), "s/epoch", cpp=CPP[name])]
    return [*rows, Row("dsgd, local share on 2 nodes", 100 * min(shares), "%", bound=">= 99.7", cpp="99.7")]


def loss_rows(data, size):
    """Losses beside those of the C++ program, and memory."""
    deviations, rows = [], []
    for name, (nodes, threads) in JOBS.items():
        progress(f"mf: losses and memory, {name}")
        found, peak = finish(start(nodes, threads, len(LOSSES), "-r", size["rank"], "--eps", 0.0005, data=data))
        rows.append(Row(f"peak memory of a node, {name}", max(peak), "MiB", bound="< 120", cpp="174"))
        for epoch, (train, test) in zip(found[1:], LOSSES, strict=True):
            deviations += [abs(epoch["train_loss"] / train - 1), abs(epoch["test_loss"] / test - 1)]
    return [Row("losses of 3 epochs on 1x1, 1x2, 2x1: furthest from C++", 100 * max(deviations), "%", bound="<= 1"), *rows]


def algorithm_rows(data, size):
    """columnwise and plain_sgd on 2 nodes."""
    rows = []
    for algorithm, options in (("columnwise", ["--prelocalize_steps", 5]),
                               ("plain_sgd", ["--prelocalize_steps", 2, "--prelocalize_groupsize", 100])):
        progress(f"mf: {algorithm}")
        found, _ = finish(start(2, 1, size["epochs"], "-r", size["rank"], "--eps", 0.0005, "--compute_loss", 0, "--algorithm", algorithm,
                                *options, data=data))
        rows.append(Row(f"{algorithm} on 2 nodes, local share", 100 * min(epoch["local_share"] for epoch in found), "%", bound="> 95",
                        note=" ".join(map(str, options))))
        rows.append(Row(f"{algorithm} on 2 nodes", seconds(found), "s/epoch",
                        note=f"{median([epoch['relocations'] for epoch in found]):.0f} relocations an epoch"))
    return rows


# --- the kernel -------------------------------------------------------------------------------------------------------------------------

def kernel_rows(data, size):
    """The training loop with and without the parameter server, in one thread; CPU time, which other work disturbs less."""
    from apps.mf._kernel import Trainer, train_arrays

    import lapse
    from apps.mf.data import open_cells
    with open_cells(data / "train.mmc") as opened:
        cells = np.concatenate([block.copy() for block in opened.blocks()])
        of_row, of_col = opened.row_counts, opened.col_counts
    num_rows, num_cols, rank = size["rows"], size["cols"], size["rank"]
    rows = []
    for dtype in "float64", "float32":
        progress(f"mf: kernel, {dtype}")
        lapse.setup(num_rows + num_cols, 1)
        with lapse.Server(rank, dtype=dtype) as server:
            kv = lapse.Worker(0, server)
            trainer = Trainer(kv, rank=rank, double_precision=dtype == "float64", row_begin=0, row_end=num_rows, num_cols=num_cols,
                              column_key=num_rows, row_counts=of_row, col_counts=of_col, regularization=0.05, seed=1)
            trainer.set_random(0, num_rows + num_cols, 1, 0)
            values = kv.pull(np.arange(num_rows + num_cols))
            w, h = values[:num_rows].copy(), values[num_rows:].copy()
            trainer.begin_epoch(0.0005)
            ours, arrays = [], []
            for _ in range(size["rounds"] + 3):
                began = time.thread_time()
                trainer.train(cells)
                ours.append(time.thread_time() - began)
                began = time.thread_time()
                train_arrays(cells, w, h, 0.0005, of_row, of_col, 0.05, 1)
                arrays.append(time.thread_time() - began)
            kv.finalize()
        bound = "<= 1.3" if dtype == "float64" else ""
        what = f"kernel, {size['cells'] / 1e6:g} M updates in random order, {dtype}"
        rows.append(against(what, ours[1:], "s", "plain arrays", arrays[1:], bound))
    return rows


# --- reading ----------------------------------------------------------------------------------------------------------------------------

def reading_rows(data, size):
    """The text beside SciPy's reader; the cache beside a copy in memory of as many bytes, and beside a bare read of the same file."""
    from apps.mf.data import open_cells
    try:
        from scipy.io import mmread
    except ImportError:
        mmread = None
    text, cache = data / "train.mmc", data / "train.mmc.cache"
    open_cells(text).close()
    source = np.fromfile(cache, dtype=np.uint8)
    room, gigabytes = np.empty_like(source), source.nbytes / 1e9
    times = {name: [] for name in ("text", "mmread", "cache", "all cells", "copy", "read")}

    def measure(name, function):
        began = time.perf_counter()
        function()
        times[name].append(time.perf_counter() - began)

    def all_cells():
        with open_cells(text) as cells:
            for _block in cells.blocks():
                pass

    def bare():
        with cache.open("rb", buffering=0) as file:
            while file.readinto(room[:1 << 19]):
                pass
    progress("mf: reading")
    for _ in range(2 * size["rounds"] + 1):
        cache.unlink(missing_ok=True)
        measure("text", lambda: open_cells(text).close())
        if mmread is not None:
            measure("mmread", lambda: mmread(text))
        measure("cache", lambda: open_cells(text).close())
        measure("all cells", all_cells)
        measure("copy", lambda: np.copyto(room, source))
        measure("read", bare)
    speed = {name: [gigabytes / one for one in found[1:]] for name, found in times.items()}
    rows = []
    if mmread is not None:
        per_second = {name: [1 / one for one in times[name][1:]] for name in ("text", "mmread")}
        rows.append(against(f"reading {size['cells'] / 1e6:g} M cells of text, cache written", per_second["text"], "files/s",
                            "scipy.io.mmread", per_second["mmread"], ">= 0.5"))
    return [*rows, against("opening the cache (read, checksum over all)", speed["cache"], "GB/s", "reading the file", speed["read"]),
            against("the same, then all cells passed on", speed["all cells"], "GB/s", "copying in memory", speed["copy"])]


# --- all --------------------------------------------------------------------------------------------------------------------------------

def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    size = size or sizes(quick)
    data = make_matrix(size)
    return [*loss_rows(data, size), *speed_rows(data, size), *algorithm_rows(data, size), *kernel_rows(data, size),
            *reading_rows(data, size), *(mf_movielens.rows(start, finish, size["movielens"]) if size["movielens"] else [])]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mf", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, noisier")
    parser.add_argument("--cells", type=int, metavar="N", help="instead: train on so many cells (22 bytes of text each, in the folder for "
                        "temporary files), and measure the memory")
    options = parser.parse_args()
    print(plain(mf_large.rows(start, finish, options.cells) if options.cells else run(options.quick)))


if __name__ == "__main__":
    main()
