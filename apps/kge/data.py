"""Triples in files: lines of subject, relation, object as whole numbers from 0; in a partitioned file the worker comes fourth."""
from pathlib import Path

import numpy as np
from apps.kge._triples import parse_triples

from apps.common.files import InputError

__all__ = ["partitioned_name", "read_triples"]

BLOCK = 1 << 21                 # bytes of text in memory
LONGEST_LINE = 1 << 12


def partitioned_name(nodes, threads):
    """Return the name of the training triples that are shared out among so many workers."""
    return f"train.partitioned.{nodes}x{threads}.del"


def _blocks(file):
    """Yield whole lines of an open file, as arrays of bytes that end with a newline."""
    kept = b""
    while True:
        block = file.read(BLOCK)
        cut = block.rfind(b"\n") + 1 if block else 0
        if not block:
            if kept:
                yield kept + b"\n"
            return
        if len(kept) + cut > BLOCK + LONGEST_LINE or (not cut and len(kept) + len(block) > LONGEST_LINE):
            yield kept + block + b"\n"          # no line is as long as that: the parser says so
            return
        if cut:
            yield kept + block[:cut]
            kept = block[cut:]
        else:
            kept += block


def read_triples(path, num_entities, num_relations, workers=None):
    """Return the triples of a file as int32 [triples, 3]; with `workers`, how many there are, a pair of that and each one's worker.

    InputError, which names file and line, for what is no triple, for numbers that the options do not allow for, and for a file
    without any.
    """
    path = Path(path)
    entity = (num_entities, f"entity {{}}, but --num_entities is {num_entities}")
    limits = [entity, (num_relations, f"relation {{}}, but --num_relations is {num_relations}"), entity]
    if workers is not None:
        limits.append((workers, f"worker {{}}, but there are {workers}"))
    found, lines = [], 0
    if path.is_fifo():                  # nobody may ever write to it
        raise InputError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            for text in _blocks(file):
                rows = np.empty((text.count(b"\n"), len(limits)), dtype=np.int32)
                count, read, wrong = parse_triples(text, len(text), rows, limits)
                if wrong:
                    raise InputError(f"{path}:{lines + read + 1}: the line {wrong}")
                lines += read
                found.append(rows[:count])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    triples = np.concatenate(found) if found else np.empty((0, len(limits)), dtype=np.int32)
    if len(triples) == 0:
        raise InputError(f"{path} has no triples")
    return triples if workers is None else (np.ascontiguousarray(triples[:, :3]), triples[:, 3])
