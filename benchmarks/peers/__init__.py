"""Peers: other people's programs for the same work, each in a virtual environment of its own, on one thread.

    from benchmarks import peers
    peers.run("gensim", "build/data/text/text.txt", dim=100, seed=1, output="vectors.txt") -> {"peer": "gensim", "version": …, …}

Or `python -m benchmarks.peers gensim build/data/text/text.txt --dim 100`, which prints that as one line of JSON; `--help` behind a
peer's name lists its options. The environments are made when they are first used, under build/peers/, by pip.

Each answer has peer, version, wall and cpu (seconds of the training alone, or of the evaluation), and
gensim (a text): words, words_per_cpu_s, effective_words (after subsampling); with evaluate=FOLDER also what evaluate_vectors has.
evaluate_vectors (a file of vectors, the folder of the questions): analogies, wordsim353, simlex999; how much of each was left out.
pykeen (a folder of .del files): triples_per_cpu_s; mrr, mr, hits_at_1, hits_at_3, hits_at_10 (test.del, filtered, both sides,
    realistic rank).
evaluate_embeddings (a folder of .del files, entities.npy, relations.npy): the same measures of a ComplEx model; a row of an array is the
    real half, then the imaginary half.
torchbiggraph (a folder of .del files): triples_per_cpu_s, and, unless rank=0, the same measures.
torch_rescal (a folder with train.del): triples_per_cpu_s, loss.
cornac, surprise, libmf (a folder with train.mmc and test.mmc, of the ratings themselves: cornac and surprise learn biases, LIBMF factorizes
    them as they are): updates_per_cpu_s, rmse.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent
ENVIRONMENTS = ROOT / "build" / "peers"
INSTALL_TIMEOUT = 1800              # seconds
TORCH = "torch==2.13.0"

PACKAGES = {                        # environment: what pip installs there
    "gensim": ["gensim==4.4.0"],
    "pykeen": [TORCH, "pykeen==1.11.1"],
    "torchbiggraph": [TORCH, "torchbiggraph==1.0.0", "setuptools<81"],
    "cornac": ["cornac==3.0.1"],
    "surprise": ["scikit-surprise==1.1.5"],
    "libmf": ["libmf==0.9.2"],
}
PEERS = {                           # peer: its environment, its script
    "gensim": ("gensim", "skipgram.py"),
    "evaluate_vectors": ("gensim", "vectors.py"),
    "pykeen": ("pykeen", "complex.py"),
    "evaluate_embeddings": ("pykeen", "ranks.py"),
    "torchbiggraph": ("torchbiggraph", "biggraph.py"),
    "torch_rescal": ("pykeen", "rescal.py"),
    "cornac": ("cornac", "cornac_mf.py"),
    "surprise": ("surprise", "surprise_svd.py"),
    "libmf": ("libmf", "libmf_mf.py"),
}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class PeerError(Exception):
    """Why a peer did not run, in one sentence."""


def run(peer, *data, timeout=3600, **options):
    """Run a peer on its data (paths) and return its figures as a dict; PeerError when it cannot be installed or fails.

    Options as on its command line (`dim=100` for `--dim 100`; None: left out). Blocks for up to `timeout` seconds, not counting the first
    installation. wall and cpu are seconds of the peer's own training or evaluation; cpu counts all its threads and processes.
    """
    if peer not in PEERS:
        raise PeerError(f"there is no peer {peer!r}; there are {', '.join(PEERS)}")
    arguments = [str(path) for path in data]
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name}", str(value)]
    result = figures(peer, arguments, timeout)
    if "entities" in result:        # torchbiggraph; its environment has no PyKEEN, whose evaluator all models of a graph are measured with
        vectors = [Path(result.pop(name)) for name in ("entities", "relations")]
        try:
            measured = figures("evaluate_embeddings", [str(data[0]), *map(str, vectors)], timeout)
        finally:
            shutil.rmtree(vectors[0].parent, ignore_errors=True)
        result |= {name: value for name, value in measured.items() if name not in result}
    return result


def figures(peer, arguments, timeout=None):
    """The JSON object that a peer's script prints, given its command line."""
    lines = script(peer, arguments, timeout).strip().splitlines()
    try:
        return {"peer": peer, **json.loads(lines[-1])}
    except (IndexError, ValueError):
        raise PeerError(f"the peer {peer} printed no figures") from None


def script(peer, arguments, timeout=None):
    """Run a peer's script on one thread in its environment; return what it prints."""
    environment, name = PEERS[peer]
    python = install(environment)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OPENBLAS_", "PYTHON"))}
    variables |= {**dict.fromkeys(THREADS, "1"), "PYTHONWARNINGS": "ignore"}
    return finish([python, SCRIPTS / name, *arguments], variables, timeout, f"the peer {peer}")


def finish(command, variables, timeout, what):
    """Run a command to its end, with all it starts; return its standard output. Standard error goes where ours goes."""
    try:
        process = subprocess.Popen([str(word) for word in command], env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   text=True, start_new_session=True)
    except OSError as error:
        raise PeerError(f"{what} could not be started: {error.strerror}") from None
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise PeerError(f"{what} took more than {timeout} s") from None
        raise
    if process.returncode:
        raise PeerError(f"{what} ended with code {process.returncode}")
    return output


def install(environment):
    """The Python of a peer's virtual environment, which is made now if it is not there or is of other packages. Two may ask at once."""
    folder, packages = ENVIRONMENTS / environment, "\n".join(PACKAGES[environment])
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with (ENVIRONMENTS / f"{environment}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == packages:
            return python
        print(f"peers: installing {environment} into {folder}", file=sys.stderr)
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        finish([sys.executable, "-m", "venv", "--clear", folder], variables, INSTALL_TIMEOUT, "python -m venv")
        finish([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES[environment]], variables,
               INSTALL_TIMEOUT, f"pip install {' '.join(PACKAGES[environment])}")
        stamp.write_text(packages)
    return python
