"""Make the synthetic ratings in apps/data/ratings: 600 users, 400 items, 20,000 ratings to train on and 2,000 to test with.

What is left of a rating when mean and biases are taken off: a matrix of rank 4 and noise of half its size. Popular items have more ratings.

    python apps/data/make_ratings.py apps/data/ratings
"""
import argparse
from pathlib import Path

import numpy as np

USERS, ITEMS, RANK, TRAIN, TEST, NOISE, SEED = 600, 400, 4, 20_000, 2_000, 0.5, 2020


def write(path, cells, values):
    with path.open("w") as file:
        file.write(f"%%MatrixMarket matrix coordinate real general\n{USERS} {ITEMS} {len(cells)}\n")
        file.writelines(f"{cell // ITEMS + 1} {cell % ITEMS + 1} {value:.2f}\n" for cell, value in zip(cells, values))


def main():
    parser = argparse.ArgumentParser(description="Make the synthetic ratings of apps/data/ratings.")
    parser.add_argument("folder", type=Path, help="where to write")
    folder = parser.parse_args().folder
    random = np.random.default_rng(SEED)
    users, items = random.normal(size=(USERS, RANK)), random.normal(size=(ITEMS, RANK)) / RANK**0.5
    popularity = np.tile(1 / np.arange(10, ITEMS + 10) ** 0.7, USERS)
    cells = random.choice(USERS * ITEMS, TRAIN + TEST, replace=False, p=popularity / popularity.sum())
    values = (users @ items.T).ravel()[cells] + random.normal(scale=NOISE, size=len(cells))
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.mmc", np.sort(cells[:TRAIN]), values[np.argsort(cells[:TRAIN])])
    order = TRAIN + np.argsort(cells[TRAIN:])
    write(folder / "test.mmc", cells[order], values[order])


if __name__ == "__main__":
    main()
