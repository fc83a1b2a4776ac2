"""Word vectors of a synthetic text: `python -m benchmarks --only w2v [--quick]`, two minutes.

The text is the one on which the C++ program was measured: 2 million words, 20,000 different ones by Zipf's law, vectors of 100 numbers,
window 5, 5 negatives for each pair of words. words/s counts all words of the text, by the time of the slowest worker.
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.report import Row, against_cpp, median, progress

ROOT = Path(__file__).resolve().parents[1]
SYNTHETIC = ROOT / "build/bench_data/w2v"
WORDS, LENGTH = 20_000, 2_000_000
TRAINING = ["--negative", 5, "--embed_dim", 100, "--window", 5, "--num_iterations", 1, "-d", 1]
PRELOC = ["--sampling.scheme", "preloc", "--prep_context_ahead", 30, "--sync_push", 0]
LOCAL = ["--sampling.scheme", "local", "--prep_context_ahead", 50, "--sync_push", 0]


def make_text(length):
    """The synthetic text of so many words, which is written if it is not there; the same words as in the C++ program's runs."""
    path = SYNTHETIC / f"{length}.txt"
    if not path.exists():
        progress("w2v: writing the text")
        SYNTHETIC.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(3)
        share = 1 / np.arange(1, WORDS + 1)
        words = random.choice(WORDS, length, p=share / share.sum())
        words[random.permutation(length)[:WORDS * 5]] = np.repeat(np.arange(WORDS), 5)
        names = np.array([f"w{k}" for k in range(WORDS)])
        with tempfile.NamedTemporaryFile("w", dir=SYNTHETIC, delete=False) as file:
            for begin in range(0, length, 20):
                file.write(" ".join(names[words[begin:begin + 20]]) + "\n")
        os.replace(file.name, path)
    return path


# --- the program ------------------------------------------------------------------------------------------------------------------

def start(nodes, threads, text, *options):
    """Start the program on so many nodes and threads."""
    report = tempfile.NamedTemporaryFile(suffix=".jsonl", delete=False)  # noqa: SIM115 (finish removes it)
    report.close()
    program = [sys.executable, "apps/word2vec.py", "-f", text, "-t", threads, *TRAINING, "--report", report.name, *options]
    launcher = [sys.executable, "-m", "lapse", "run", "-s", nodes] if nodes > 1 else []
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([str(word) for word in (*launcher, *program)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return process, Path(report.name)


def finish(started):
    """Return the one iteration (a dict) and the nodes' peak memory in MiB."""
    process, report = started
    output, _ = process.communicate(timeout=1800)
    lines = report.read_text().splitlines()
    report.unlink()
    if process.returncode or not lines:
        raise RuntimeError(output)
    return json.loads(lines[-1]), [float(number) for number in re.findall(r"had at most (\d+) MiB", output)]


# --- the synthetic text -----------------------------------------------------------------------------------------------------------------

CONFIGURATIONS = {                      # name: nodes, threads, options
    "1x1": (1, 1, []),
    "1x2": (1, 2, []),
    "2x1, preloc": (2, 1, PRELOC),
    "2x1, local": (2, 1, LOCAL),
}
CPP = {"1x1": 75_800, "1x2": 97_000, "2x1, preloc": 37_000, "2x1, local": 71_000}


def synthetic_rows(rounds, length):
    text = make_text(length)
    found = {name: [] for name in CONFIGURATIONS}
    memory = {name: [] for name in CONFIGURATIONS}
    for number in range(rounds):
        progress(f"w2v: synthetic text, round {number + 1} of {rounds}")
        for name, (nodes, threads, options) in CONFIGURATIONS.items():
            result, peak = finish(start(nodes, threads, text, "--num_keys", 40_010, "--min_count", 1, *options))
            found[name].append(result)
            memory[name] += peak
    rows = []
    for name in CONFIGURATIONS:
        speeds = [result["words_per_second"] for result in found[name]]
        bound = "> 3" if name != "1x2" else ""
        rows.append(against_cpp(f"word2vec, {name}, own negatives for each pair", speeds, "words/s", CPP[name], bound, str(CPP[name])))
        rows[-1].note = f"loss {median([result['loss'] for result in found[name]]):.4f}"
    for name in "2x1, preloc", "2x1, local":
        shares = [100 * result["local_share"] for result in found[name]]
        rows.append(Row(f"word2vec, {name}: local share", min(shares), "%", bound=">= 99", cpp="99.3" if "preloc" in name else "",
                        note=f"{median([result['relocations'] for result in found[name]]):.0f} relocations"))
    peak = max(max(memory["1x1"]), max(memory["2x1, preloc"]), max(memory["2x1, local"]))
    rows.append(Row("word2vec: peak memory of a node", peak, "MiB", bound="< 150", cpp="539"))
    return rows


def sizes(quick):
    return {"words": LENGTH, "rounds": 2 if quick else 5}


def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    size = size or sizes(quick)
    return synthetic_rows(size["rounds"], size["words"])
