"""Matrix factorization: `python -m benchmarks.mf [--quick]`.

The matrix is the one on which the C++ program was measured: 20,000 x 10,000, 2 million cells of rank 10 and noise, factors of rank 100,
float64. Whatever is compared runs in turn. s/epoch is the training of the slowest worker, from barrier to barrier, without losses.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.report import Row, against, against_cpp, machine, markdown, median, plain, progress

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "build/bench_data/mf"
MOVIELENS = ROOT / "build/data/movielens-100k"
ROWS, COLS, CELLS, TESTS, RANK = 20_000, 10_000, 2_000_000, 20_000, 100
TRAINING = ["-r", RANK, "--eps", 0.0005]
LOSSES = ((2.499, 2.776), (1.553, 1.691), (1.471, 1.644))       # of the C++ program, after epochs 1 to 3: train, test


def make_matrix():
    """Write the matrix if it is not there; the same numbers as in the C++ program's runs."""
    if (DATA / "test.mmc").exists():
        return
    progress("mf: writing the matrix")
    DATA.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    w = random.normal(size=(ROWS, 10)) / 10**0.25
    h = random.normal(size=(COLS, 10)) / 10**0.25
    cells = np.unique(random.integers(0, ROWS * COLS, size=int((CELLS + TESTS) * 1.05)))
    cells = random.permutation(cells)[:CELLS + TESTS]
    rows, cols = cells // COLS, cells % COLS
    values = np.einsum("nr,nr->n", w[rows], h[cols]) + 0.1 * random.normal(size=len(cells))
    for name, part in ("train.mmc", slice(0, CELLS)), ("test.mmc", slice(CELLS, None)):
        with tempfile.NamedTemporaryFile("w", dir=DATA, delete=False) as file:
            file.write(f"%%MatrixMarket matrix coordinate real general\n{ROWS} {COLS} {len(rows[part])}\n")
            for i, j, x in zip(rows[part].tolist(), cols[part].tolist(), values[part].tolist()):
                file.write(f"{i + 1} {j + 1} {x:.8g}\n")
        os.replace(file.name, DATA / name)


# --- the program ------------------------------------------------------------------------------------------------------------------

def start(nodes, threads, epochs, *options, data=DATA):
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


def program_rows(rounds, epochs):
    times = {key: [] for key in ("1x1", "1x2", "2x1", "alone", "together")}
    memory, shares, deviations = [], [], []
    for number in range(rounds):
        progress(f"mf: dsgd, round {number + 1} of {rounds}")
        for name, nodes, threads in (("1x1", 1, 1), ("1x2", 1, 2), ("2x1", 2, 1)):
            found, peak = finish(start(nodes, threads, epochs, *TRAINING, "--compute_loss", 0))
            times[name].append(seconds(found))
            if nodes == 2:
                shares += [epoch["local_share"] for epoch in found]
        pair = [start(1, 1, epochs, *TRAINING, "--compute_loss", 0) for _ in range(2)]
        both = [seconds(finish(one)[0]) for one in pair]
        times["alone"].append(times["1x1"][-1])
        times["together"].append(median(both) / 2)           # as two processes share out the work of one
    for name, nodes, threads in (("1x1", 1, 1), ("1x2", 1, 2), ("2x1", 2, 1)):
        found, peak = finish(start(nodes, threads, 3, *TRAINING))
        memory.append((name, max(peak)))
        for epoch, (train, test) in zip(found[1:], LOSSES):
            deviations += [abs(epoch["train_loss"] / train - 1), abs(epoch["test_loss"] / test - 1)]
    rows = [Row("losses of 3 epochs on 1x1, 1x2, 2x1: furthest from C++", 100 * max(deviations), "%", bound="<= 1"),
            against_cpp("dsgd, 1 node x 1 thread", times["1x1"], "s/epoch", 1.65, "< 0.25", "1.65")]
    for name in "1x2", "2x1":
        gain = [one / other for one, other in zip(times["1x1"], times[name])]
        ideal = [one / other for one, other in zip(times["alone"], times["together"])]
        rows.append(against(f"dsgd, gain of {name} over 1x1", gain, "x", "two processes", ideal, ">= 0.9"))
        rows.append(Row(f"dsgd, {name}", median(times[name]), "s/epoch", cpp={"1x2": "0.88-1.25", "2x1": "0.80-1.07"}[name]))
    rows.append(Row("dsgd, local share on 2 nodes", 100 * min(shares), "%", bound=">= 99.7", cpp="99.7"))
    rows += [Row(f"peak memory of a node, {name}", peak, "MiB", bound="< 120", cpp="174") for name, peak in memory]
    for algorithm, options in (("columnwise", ["--prelocalize_steps", 5]),
                               ("plain_sgd", ["--prelocalize_steps", 2, "--prelocalize_groupsize", 100])):
        progress(f"mf: {algorithm}")
        found, _ = finish(start(2, 1, epochs, *TRAINING, "--compute_loss", 0, "--algorithm", algorithm, *options))
        note = " ".join(map(str, options))
        rows.append(Row(f"{algorithm} on 2 nodes, local share", 100 * min(epoch["local_share"] for epoch in found), "%", bound="> 95",
                        note=note))
        rows.append(Row(f"{algorithm} on 2 nodes", seconds(found), "s/epoch",
                        note=f"{median([epoch['relocations'] for epoch in found]):.0f} relocations an epoch"))
    return rows


# --- the kernel -------------------------------------------------------------------------------------------------------------------------

def kernel_rows(rounds):
    """The training loop with and without the parameter server, in one thread; CPU time, which other work disturbs less."""
    from apps.mf._kernel import Trainer, train_arrays

    import lapse
    from apps.mf.data import open_cells
    with open_cells(DATA / "train.mmc") as opened:
        cells = np.concatenate([block.copy() for block in opened.blocks()])
        of_row, of_col = opened.row_counts, opened.col_counts
    rows = []
    for dtype in "float64", "float32":
        progress(f"mf: kernel, {dtype}")
        lapse.setup(ROWS + COLS, 1)
        with lapse.Server(RANK, dtype=dtype) as server:
            kv = lapse.Worker(0, server)
            trainer = Trainer(kv, rank=RANK, double_precision=dtype == "float64", row_begin=0, row_end=ROWS, num_cols=COLS,
                              column_key=ROWS, row_counts=of_row, col_counts=of_col, regularization=0.05, seed=1)
            trainer.set_random(0, ROWS + COLS, 1, 0)
            values = kv.pull(np.arange(ROWS + COLS))
            w, h = values[:ROWS].copy(), values[ROWS:].copy()
            trainer.begin_epoch(0.0005)
            ours, arrays = [], []
            for _ in range(rounds + 1):
                began = time.thread_time()
                trainer.train(cells)
                ours.append(time.thread_time() - began)
                began = time.thread_time()
                train_arrays(cells, w, h, 0.0005, of_row, of_col, 0.05, 1)
                arrays.append(time.thread_time() - began)
            kv.finalize()
        bound = "<= 1.3" if dtype == "float64" else ""
        rows.append(against(f"kernel, 2 M updates in random order, {dtype}", ours[1:], "s", "plain arrays", arrays[1:], bound))
    return rows


# --- reading ----------------------------------------------------------------------------------------------------------------------------

def reading_rows(rounds):
    from apps.mf.data import open_cells
    try:
        from scipy.io import mmread
    except ImportError:
        mmread = None
    text, cache = DATA / "train.mmc", DATA / "train.mmc.cache"
    parsed, cached, scipy, copied = [], [], [], []
    room = np.empty(CELLS * 16, dtype=np.uint8)
    source = np.ones(CELLS * 16, dtype=np.uint8)
    progress("mf: reading")
    for _ in range(rounds + 1):
        cache.unlink(missing_ok=True)
        began = time.perf_counter()
        open_cells(text).close()
        parsed.append(time.perf_counter() - began)
        began = time.perf_counter()
        with open_cells(text) as cells:
            for _block in cells.blocks():
                pass
        cached.append(time.perf_counter() - began)
        began = time.perf_counter()
        room[:] = source
        copied.append(time.perf_counter() - began)
        if mmread is not None:
            began = time.perf_counter()
            mmread(text)
            scipy.append(time.perf_counter() - began)
    rows = []
    if scipy:
        rows.append(against("reading 2 M cells of text, cache written", [1 / t for t in parsed[1:]], "files/s", "scipy.io.mmread",
                            [1 / t for t in scipy[1:]], ">= 0.5"))
    else:
        rows.append(Row("reading 2 M cells of text, cache written (SciPy is not installed)", median(parsed[1:]), "s"))
    rows.append(against("reading the cache: checked, counted, all cells passed on", [0.032 / t for t in cached[1:]], "GB/s", "copying",
                        [0.032 / t for t in copied[1:]]))
    return rows


# --- MovieLens --------------------------------------------------------------------------------------------------------------------------

PEERS = {10: "13.3 Surprise, 14.2 LIBMF, 55 cornac", 100: "5.1, 5.0, 15.5"}


def movielens_rows(rounds):
    if not (MOVIELENS / "train.mmc").exists():
        return []
    rows = []
    for rank, options in ((10, ["-l", 12, "--eps", 0.005, "--init_scale", 0.3]), (100, ["-l", 12, "--eps", 0.005, "--init_scale", 0.1])):
        for dtype in "float64", "float32":
            progress(f"mf: MovieLens, rank {rank}, {dtype}")
            speeds, errors = [], []
            for _ in range(rounds):
                found, _ = finish(start(1, 1, 30, "-r", rank, *options, "--dtype", dtype, data=MOVIELENS))
                speeds.append(median([epoch["updates_per_cpu_second"] for epoch in found if epoch["epoch"] > 1]) / 1e6)
                errors.append(found[-1]["test_rmse"])
            bound = f">= {max(0.6 * {10: 55, 100: 15.5}[rank], {10: 14.2, 100: 5.1}[rank]):g}"
            rows.append(Row(f"MovieLens 100K, rank {rank}, {dtype}", median(speeds), "M updates/cpu-s", bound=bound,
                            note=f"peers elsewhere {PEERS[rank]}"))
            rows.append(Row(f"MovieLens 100K, rank {rank}, {dtype}: test RMSE after 30 epochs", max(errors), "stars", bound="<= 0.93"))
    return rows


def run(quick: bool = False) -> list[Row]:
    make_matrix()
    rounds = 2 if quick else 5
    return [*program_rows(rounds, 4 if quick else 8), *kernel_rows(rounds + 2), *reading_rows(rounds + 2), *movielens_rows(rounds)]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mf", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, noisier")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = run(options.quick)
    print("; ".join(machine().values()) + f"; load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    print(markdown(rows) if options.markdown else plain(rows))
    return 0 if not any(math.isnan(row.measured) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
