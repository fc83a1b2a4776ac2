"""MovieLens 100K beside Surprise, LIBMF and cornac: part of `python -m benchmarks --only mf`.

Same ratings, same split, one thread, all programs in turn in each round. The peers get the ratings as they are, and learn their biases
(LIBMF has none); ours gets what the biases leave over, which apps/data/fetch_movielens.py has found by least squares. So one row counts
that time, too, and our error is computed here from the written factors, the biases and the ratings as they are. Speeds are of the
training alone, in CPU time; the peers' clock has ticks of 10 ms, so they are timed over more epochs than those after which their error
is taken (their defaults).
"""
from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from apps.data.fetch_movielens import find_biases
from apps.mf.movielens import FOLDER, options
from benchmarks import peers
from benchmarks.report import Row, against, median, progress

ROOT = Path(__file__).resolve().parents[1]
TIMED_EPOCHS = {"cornac": 300, "libmf": 60, "surprise": 10}
BOUNDS = {"cornac": ">= 0.6", "libmf": "> 1", "surprise": "> 1"}
GOAL = "<= 0.93"


def fetched():
    """Whether the ratings are here, or could be fetched."""
    if not (FOLDER / "ratings/train.mmc").is_file():
        progress("mf: fetching MovieLens 100K")
        subprocess.run([sys.executable, "apps/data/fetch_movielens.py", str(FOLDER)], cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    return (FOLDER / "ratings/train.mmc").is_file()


def read(name):
    """Rows, columns and ratings of a file of ratings."""
    table = np.loadtxt(FOLDER / "ratings" / name, skiprows=2)
    return table[:, 0].astype(np.int64) - 1, table[:, 1].astype(np.int64) - 1, table[:, 2]


def real_error(factors):
    """RMSE of the predicted ratings of the test part."""
    rows, cols, ratings = read("test.mmc")
    w, h, biases = np.load(factors / "W.npy"), np.load(factors / "H.npy"), np.load(FOLDER / "biases.npz")
    found = biases["mean"] + biases["by_user"][rows] + biases["by_item"][cols] + np.einsum("nr,rn->n", w[rows], h[:, cols])
    return float(np.sqrt(((found - ratings) ** 2).mean()))


def biases_seconds():
    """CPU time of the biases."""
    rows, cols, ratings = read("train.mmc")
    shape = np.load(FOLDER / "biases.npz")
    shape = len(shape["by_user"]), len(shape["by_item"])
    began = time.process_time()
    for _ in range(5):
        find_biases(rows, cols, ratings, shape)
    return (time.process_time() - began) / 5


def ours(start, finish, rank, dtype):
    """Updates and CPU seconds of the training, and the RMSE."""
    with tempfile.TemporaryDirectory(prefix="lapse-") as folder:
        epochs, _ = finish(start(1, 1, 0, *options(rank), "--dtype", dtype, "--output", folder, data=FOLDER))
        error = real_error(Path(folder))
    trained = [epoch for epoch in epochs if epoch["epoch"]]
    updates = sum(epoch["points"] for epoch in trained)
    return updates, sum(epoch["points"] / epoch["updates_per_cpu_second"] for epoch in trained), error


def rank_rows(start, finish, rank, rounds):
    """The rows of one rank."""
    mine = {name: [] for name in ("float64", "float32", "with biases")}
    others, errors, lost = {name: [] for name in TIMED_EPOCHS}, {}, set()
    for number in range(rounds):
        progress(f"mf: MovieLens, rank {rank}, round {number + 1} of {rounds}")
        for dtype in "float64", "float32":
            updates, cpu, errors[dtype] = ours(start, finish, rank, dtype)
            mine[dtype].append(updates / cpu / 1e6)
            if dtype == "float64":
                mine["with biases"].append(updates / (cpu + biases_seconds()) / 1e6)
        for name, epochs in TIMED_EPOCHS.items():
            if name in lost:
                continue
            try:
                others[name].append(peers.run(name, FOLDER / "ratings", rank=rank, epochs=epochs)["updates_per_cpu_s"] / 1e6)
                errors.setdefault(name, peers.run(name, FOLDER / "ratings", rank=rank)["rmse"])
            except peers.PeerError as error:
                progress(f"mf: without {name}: {error}")
                lost.add(name)
    what, unit = f"MovieLens 100K, rank {rank}", "M updates/cpu-s"
    found = [against(f"{what}, float64", mine["float64"], unit, name, others[name], BOUNDS[name], note=f"its RMSE {errors[name]:.3f}")
             for name in TIMED_EPOCHS if name not in lost]
    found += [Row(f"{what}, float32", median(mine["float32"]), unit),
              Row(f"{what}, float64, the time of the biases counted", median(mine["with biases"]), unit),
              Row(f"{what}: RMSE on the test ratings", max(errors["float64"], errors["float32"]), "stars", bound=GOAL)]
    return found


def rows(start, finish, rounds):
    """start and finish: those of benchmarks.mf."""
    if not fetched():
        progress("mf: no MovieLens 100K here")
        return []
    return [row for rank in (10, 100) for row in rank_rows(start, finish, rank, rounds)]
