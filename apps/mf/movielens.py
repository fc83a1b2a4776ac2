"""MovieLens 100K: how it is trained on, and how that was chosen: `python -m apps.mf.movielens`.

The regularization, the first step, the scale of the start and the number of epochs of SETTINGS are those with the least error on a
tenth of the *training* ratings, which is held out with a seed and takes no part in the biases either. The test ratings are not looked at.
Run as a program, this module does that choice anew and prints the table.
"""
import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from apps.data.fetch_movielens import split, write_parts

__all__ = ["FOLDER", "SETTINGS"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = (ROOT if (ROOT / "Makefile").exists() else Path.cwd()) / "build/data/movielens-100k"      # not into an installed package
VALIDATION_SEED = 200
GRID = {"--lambda": (6, 9, 12, 15, 20), "--eps": (0.0025, 0.005, 0.01), "--init_scale": (0.01, 0.03, 0.1, 0.3)}
MOST_EPOCHS = 60

# by rank
SETTINGS = {
    10: {"--lambda": 9, "--eps": 0.005, "--init_scale": 0.01, "--epochs": 26},
    100: {"--lambda": 9, "--eps": 0.0025, "--init_scale": 0.01, "--epochs": 34},
}


def options(rank):
    """The command line of the program for a rank, but for the dataset."""
    return [str(word) for pair in {"--rank": rank, **SETTINGS[rank]}.items() for word in pair]


def hold_out(ratings, folder):
    """Split a file of ratings into a folder's train.mmc and test.mmc, without the biases."""
    size = np.loadtxt(ratings, skiprows=1, max_rows=1, dtype=int)
    table = np.loadtxt(ratings, skiprows=2)
    users, items = table[:, 0].astype(np.int64) - 1, table[:, 1].astype(np.int64) - 1
    write_parts(folder, tuple(size[:2]), users, items, table[:, 2], *split(len(table), VALIDATION_SEED))


def errors(folder, rank, chosen):
    """The RMSE on the folder's test.mmc after each epoch, from the first on."""
    report = folder / "report"
    command = [sys.executable, "-m", "apps.matrix_factorization", "--dataset", folder, "--rank", rank, "--epochs", MOST_EPOCHS, "--report",
               report, *itertools.chain.from_iterable(chosen.items())]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return [row["test_rmse"] for row in map(json.loads, report.read_text().splitlines()) if row["epoch"] > 0]


def main():
    parser = argparse.ArgumentParser(prog="python -m apps.mf.movielens", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=sorted(SETTINGS), metavar="N", help="ranks to choose for")
    ranks = parser.parse_args().ranks
    if not (FOLDER / "ratings/train.mmc").is_file():
        sys.exit(f"{FOLDER} is not there: python apps/data/fetch_movielens.py {FOLDER}")
    with tempfile.TemporaryDirectory(prefix="lapse-") as folder:
        folder = Path(folder)
        hold_out(FOLDER / "ratings/train.mmc", folder)
        for rank in ranks:
            found = []
            for values in itertools.product(*GRID.values()):
                chosen = dict(zip(GRID, values))
                validation = errors(folder, rank, chosen)
                best = int(np.argmin(validation))
                found.append((validation[best], best + 1, chosen))
                print(f"rank {rank}: {' '.join(f'{name} {value}' for name, value in chosen.items())}: validation RMSE "
                      f"{validation[best]:.4f} after {best + 1} epochs", flush=True)
            error, epochs, chosen = min(found, key=lambda item: item[0])
            print(f"rank {rank}: best: {chosen | {'--epochs': epochs}}, validation RMSE {error:.4f}", flush=True)


if __name__ == "__main__":
    main()
