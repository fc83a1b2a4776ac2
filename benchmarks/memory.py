"""What a key costs: the slope of a process's resident memory between two numbers of keys.

Each size runs in a process of its own, `python -m benchmarks.memory WHAT KEYS`, which writes its resident bytes to its output.
"""
from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.report import Row, progress

LENGTHS = (8, 10, 12)       # the per-key lengths; their mean is the uniform one
UNIFORM = 10
WHAT = ("untouched", "read", "held", "lengths")


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def occupy(what: str, num_keys: int) -> int:
    """The resident bytes of a node with so many keys: untouched, all read once, all pushed to, or all pushed to and lengths per key."""
    import lapse
    lapse.setup(num_keys, 1)
    length = UNIFORM if what != "lengths" else np.resize(np.array(LENGTHS, np.uint32), num_keys)
    with lapse.Server(length) as server:
        del length
        worker = lapse.Worker(0, server)
        for start in range(0, num_keys if what != "untouched" else 0, 10_000):
            keys = np.arange(start, min(start + 10_000, num_keys))
            if what == "read":
                worker.pull(keys)
            else:
                lengths = np.take(LENGTHS, keys % len(LENGTHS)) if what == "lengths" else np.full(len(keys), UNIFORM)
                worker.push(keys, np.ones(lengths.sum(), np.float32))
        gc.collect()
        size = resident()
        worker.finalize()
    return size


def in_new_process(what: str, num_keys: int) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", what, str(num_keys)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return int(done.stdout)


def slopes(few: int, many: int) -> dict[str, float]:
    """Bytes per key, values included."""
    result = {}
    for what in WHAT:
        progress(f"memory: {what}")
        small, large = in_new_process(what, few), in_new_process(what, many)
        result[what] = (large - small) / (many - few)
    return result


def sizes(quick: bool) -> dict:
    return {"few": 500_000, "many": 2_000_000} if quick else {"few": 2_000_000, "many": 8_000_000}


def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    size = size or sizes(quick)
    per_key = slopes(**size)
    values = 4 * UNIFORM
    cpp = "40 MiB for 4 MB"
    return [
        Row("memory of an untouched key", per_key["untouched"], "B", bound="<= 10"),
        Row("memory of a key that was only read", per_key["read"], "B", bound="<= 10"),
        Row("memory of a held row beyond its values", per_key["held"] - values, "B", values, "of values", bound="<= 24", cpp=cpp),
        Row("same, with per-key lengths", per_key["lengths"] - values, "B", values, "of values", bound="<= 32", cpp=cpp),
    ]


def main(arguments: list[str]) -> None:
    what, num_keys = arguments
    print(occupy(what, int(num_keys)))


if __name__ == "__main__":
    main(sys.argv[1:])
