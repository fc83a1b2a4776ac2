"""Matrix factorization of a matrix that is larger than what a node should have in memory: `python -m benchmarks.mf --cells 100000000`.

Writes the matrix as text (22 bytes a cell) into a temporary folder, trains on it for one epoch on 2 nodes of one worker, and looks at the
nodes' memory meanwhile. Counted is anonymous memory (RssAnon): what cannot be dropped. The cells beyond IN_MEMORY of apps/mf/layout.py lie
in an unnamed file that is mapped; its pages, and those of the text and the cache, are the system's to keep or to drop.
"""
from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.report import Row, progress

ROWS, COLS, RANK = 1_000_000, 100_000, 4
BLOCK = 1 << 19                 # cells at a time
INTERVAL = 0.05                 # seconds between looks at the memory


def digits(numbers, width):
    """Decimal digits of whole numbers as a matrix of characters, padded with blanks."""
    found = np.full((len(numbers), width), ord(" "), np.uint8)
    left = numbers.copy()
    for place in range(width - 1, -1, -1):
        shown = (left > 0) | (place == width - 1)
        found[shown, place] = ord("0") + left[shown] % 10
        left //= 10
    return found


def write_matrix(path, cells, seed=1):
    """Stream a matrix of so many random cells into a file: row and column of a skewed distribution, value of four decimals."""
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(f"%%MatrixMarket matrix coordinate real general\n{ROWS} {COLS} {cells}\n".encode())
        for begin in range(0, cells, BLOCK):
            count = min(BLOCK, cells - begin)
            lines = np.full((count, 22), ord(" "), np.uint8)
            lines[:, :7] = digits((ROWS * random.random(count) ** 1.5).astype(np.int64) + 1, 7)
            lines[:, 8:14] = digits((COLS * random.random(count) ** 2).astype(np.int64) + 1, 6)
            lines[:, 15:17] = np.frombuffer(b"0.", np.uint8)
            lines[:, 17:21] = digits(random.integers(1000, 10000, count), 4)
            lines[:, 21] = ord("\n")
            file.write(lines.tobytes())


class Memory(threading.Thread):
    """Looks at the processes below a launcher; `most` is {name: most bytes of one process}."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.most, self.ended = pid, {"RssAnon": 0, "VmRSS": 0}, threading.Event()

    def run(self):
        while not self.ended.wait(INTERVAL):
            for pid in self.below(self.pid):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue            # it has ended
                for name in self.most:
                    if found := re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE):
                        self.most[name] = max(self.most[name], int(found[1]) << 10)

    def below(self, pid):
        found, left = [], [pid]
        while left:
            found.append(left.pop())
            with contextlib.suppress(OSError):      # it has ended
                for task in Path(f"/proc/{found[-1]}/task").iterdir():
                    left += map(int, (task / "children").read_text().split())
        return found


def rows(start, finish, cells, nodes=2):
    """start and finish: those of benchmarks.mf. Returns rows of the table."""
    with tempfile.TemporaryDirectory(prefix="lapse-mf-") as folder:
        folder = Path(folder)
        progress(f"mf: writing {cells} cells into {folder}")
        write_matrix(folder / "train.mmc", cells)
        write_matrix(folder / "test.mmc", min(cells, 10_000), 2)
        text = (folder / "train.mmc").stat().st_size
        found = {}
        for name in "text", "cache":
            progress(f"mf: {cells} cells, from the {name}")
            began = time.monotonic()
            job = start(nodes, 1, 1, "-r", RANK, "--eps", 0.01, "--dtype", "float32", data=folder)
            memory = Memory(job[0].pid)
            memory.start()
            epochs, _ = finish(job, 3600)
            memory.ended.set()
            memory.join()
            found[name] = time.monotonic() - began, memory.most, epochs
    what = f"{cells:.0e} cells ({text / 2**30:.1f} GiB of text), {nodes} nodes, rank {RANK}, float32".replace("e+0", "e")
    made = []
    for name, (seconds, most, epochs) in found.items():
        made += [Row(f"{what}: anonymous memory of a node at most, from the {name}", most["RssAnon"] / 2**20, "MiB",
                     note=f"with mapped files {most['VmRSS'] / 2**20:.0f}"),
                 Row(f"the whole run, from the {name}", seconds, "s", note=f"training {epochs[-1]['seconds']:.1f} s, "
                     f"test RMSE {epochs[0]['test_rmse']:.3f} -> {epochs[-1]['test_rmse']:.3f}")]
    return made


if __name__ == "__main__":
    sys.exit("see python -m benchmarks.mf --help")
