"""The applications, for those who have no source tree: `python -m lapse mf …`, `lapse-mf …`, and what fetches data for them.

A wheel has the folder apps/ of the source tree, with small data, in lapse/_bundled/. It is no package of the environment: a program's
process puts lapse/_bundled first on its own path and then runs the file, as build/apps/NAME does in the source tree.
"""
from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["PROGRAMS", "run_program_file"]


class Program(NamedTuple):
    """A file below the folder that has apps/, and what it is for."""

    file: str
    about: str


PROGRAMS = {
    "mf": Program("apps/matrix_factorization.py", "factorize a sparse matrix"),
    "kge": Program("apps/knowledge_graph_embeddings.py", "train knowledge-graph embeddings, ComplEx or RESCAL"),
    "word2vec": Program("apps/word2vec.py", "train word vectors"),
    "simple": Program("apps/simple.py", "push, localize and pull a few parameters"),
    "demo": Program("apps/mf/demo.py", "fetch MovieLens 100K, factorize it on two local nodes, draw the course"),
    "partition": Program("apps/kge/partition.py", "share out the triples of a knowledge graph to workers"),
    "fetch-movielens": Program("apps/data/fetch_movielens.py", "fetch MovieLens 100K"),
    "fetch-kge": Program("apps/data/fetch_kge.py", "fetch a knowledge graph"),
    "fetch-text": Program("apps/data/fetch_text.py", "fetch an English text"),
}


def home() -> Path:
    """The folder that has apps/: lapse/_bundled of an installed package, else the root of the source tree."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_bundled", package.parent):
        if (folder / PROGRAMS["mf"].file).is_file():
            return folder
    sys.exit(f"lapse: the applications are not in {package / '_bundled'}: install lapse anew, from a wheel or from its source tree")


def run_program_file(name: str, argv: Sequence[str]) -> int:
    """Run a program of PROGRAMS in this process, with these arguments, as if its file had been given to Python; return 0.

    SystemExit with any other exit code is the program's. For the main thread of a process that does nothing else.
    """
    root = home()
    path = str(root / PROGRAMS[name].file)
    sys.path[:0] = [str(root)]
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name="__main__")
    return 0


def show_data(argv: Sequence[str]) -> int:
    """`python -m lapse data`: print the folder with the small data sets of the applications; return the exit code."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m lapse data", allow_abbrev=False,
                                     description="Print the folder with the small data sets that come with the applications.")
    parser.parse_args(argv)
    print(home() / "apps/data")
    return 0


def mf() -> int:
    """`lapse-mf`."""
    return run_program_file("mf", sys.argv[1:])


def kge() -> int:
    """`lapse-kge`."""
    return run_program_file("kge", sys.argv[1:])


def word2vec() -> int:
    """`lapse-word2vec`."""
    return run_program_file("word2vec", sys.argv[1:])
