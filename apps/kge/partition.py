"""Share out training triples by relation, so that the workers of a node use relations that no other node uses.

    python -m lapse partition FOLDER NODES THREADS

reads FOLDER/train.del and writes FOLDER/train.partitioned.<NODES>x<THREADS>.del: the same triples, in the same order, each with the
number of its worker behind it. (The parallelization method is the data clustering of Renz-Wieland et al., Dynamic Parameter Allocation
in Parameter Servers, PVLDB 13(11), 2020, section 4.3.)
"""
import argparse
import sys
from pathlib import Path

import numpy as np

from apps.common.files import InputError, whole_file
from apps.common.program import run_application
from apps.kge.data import partitioned_name, read_triples
from lapse.options import positive_int

__all__ = ["partition"]

SLACK = 0.02                    # of a worker's fair share: what it may have more, so that a relation stays in one piece
LARGEST = 2**31 - 1
BLOCK = 1 << 16                 # lines that are written at a time


def _share_out(relations, places):
    """Give each triple one of so many places. relations: of the triples. Relations larger than what is left of a place are cut.

    Largest relation first, into the emptiest place (Graham's LPT rule).
    """
    result = np.empty(len(relations), dtype=np.int64)
    order = np.argsort(relations, kind="stable")
    starts = np.flatnonzero(np.diff(relations[order], prepend=-1))
    pieces = sorted(((end - begin, begin) for begin, end in zip(starts.tolist(), [*starts.tolist()[1:], len(order)])), reverse=True)
    room = np.array([len(relations) // places + (place < len(relations) % places) for place in range(places)], dtype=np.int64)
    slack = int(SLACK * len(relations) / places)
    for size, begin in pieces:
        while size:
            place = int(room.argmax())
            count = size if size <= room[place] + slack else max(int(room[place]), 1)
            result[order[begin:begin + count]] = place
            room[place] -= count
            size, begin = size - count, begin + count
    return result


def partition(triples, nodes, threads):
    """Return the worker of each triple: first relations to nodes, then those of a node to its threads; each with an even share."""
    workers = np.empty(len(triples), dtype=np.int64)
    node_of = _share_out(triples[:, 1], nodes)
    for node in range(nodes):
        own = np.flatnonzero(node_of == node)
        workers[own] = node * threads + _share_out(triples[own, 1], threads)
    return workers


def _prepare(options):
    folder = Path(options.folder)
    triples = read_triples(folder / "train.del", LARGEST, LARGEST)
    if len(triples) < options.nodes * options.threads:
        raise InputError(f"{folder / 'train.del'} has {len(triples)} triples, fewer than {options.nodes} x {options.threads} workers")
    return folder / partitioned_name(options.nodes, options.threads), triples, options.nodes, options.threads


def _run(path, triples, nodes, threads):
    workers = partition(triples, nodes, threads)
    with whole_file(path) as file:
        for begin in range(0, len(triples), BLOCK):
            rows = np.column_stack((triples[begin:begin + BLOCK], workers[begin:begin + BLOCK]))
            file.write(("\n".join(["\t".join(map(str, row)) for row in rows.tolist()]) + "\n").encode())
    pairs = np.unique(triples[:, 1].astype(np.int64) * nodes + workers // threads) // nodes
    sizes, on = np.bincount(workers), np.unique(pairs, return_counts=True)[1]
    sys.stdout.write(f"{path}: {sizes.min()} to {sizes.max()} triples per worker; {(on > 1).sum()} of {len(on)} relations on more than "
                     f"one node\n")
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m lapse partition", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder with train.del")
    parser.add_argument("nodes", type=positive_int)
    parser.add_argument("threads", type=positive_int, help="worker threads per node")
    options = parser.parse_args(argv)
    return run_application("partition", lambda: _prepare(options), _run)


if __name__ == "__main__":
    sys.exit(main())
