"""Word vectors: `python -m benchmarks --only w2v [--quick]`, a quarter of an hour.

The synthetic text is the one on which the C++ program was measured: 2 million words, 20,000 different ones by Zipf's law, vectors of 100
numbers, window 5, 5 negatives for each pair of words. words/s counts all words of the text, by the time of the slowest worker. The real
text (apps/data/fetch_text.py; rows are left out where it has not been fetched) is for gensim: its skip-gram and ours in turn, with
the same settings, and gensim's own evaluators for the vectors of both. words/cpu-s counts the CPU time of all threads while they train.
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

from benchmarks import peers
from benchmarks.report import Row, against, against_cpp, median, progress

ROOT = Path(__file__).resolve().parents[1]
SYNTHETIC = ROOT / "build/bench_data/w2v"
REAL = ROOT / "build/data/text"
WORDS, LENGTH = 20_000, 2_000_000
TRAINING = ["--negative", 5, "--embed_dim", 100, "--window", 5, "--num_iterations", 1, "-d", 1]
PRELOC = ["--sampling.scheme", "preloc", "--prep_context_ahead", 30, "--sync_push", 0]
LOCAL = ["--sampling.scheme", "local", "--prep_context_ahead", 50, "--sync_push", 0]
# What goes with gensim: its threshold of subsampling, and its start. One iteration over so little text is better off with a larger learning
# rate than the 0.025 that both have by default; what comes of the same one is measured too.
LIKE_GENSIM = ["--min_count", 5, "--subsample", "1e-3", "--init_scale", 1, "--num_keys", 200_000]
FASTER = ["--starting_alpha", 0.03]
SAME = "1x1, learning rate 0.025"
MEASURES = (("analogies", "analogies, share right"), ("wordsim353", "WordSim353, Spearman"), ("simlex999", "SimLex999, Spearman"))


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


# --- the real text ----------------------------------------------------------------------------------------------------------------------

OURS = {                                # name: nodes, options
    "1x1": (1, FASTER),
    "2x1, local": (2, [*LOCAL, *FASTER]),
    SAME: (1, []),
}


def real_rows(seeds, name):
    text, quick = REAL / name, name == "part.txt"
    if not text.exists():
        progress("w2v: no real text (python apps/data/fetch_text.py)")
        return []
    speeds, qualities, shares = {}, {}, []

    def note(name, figures, speed):
        speeds.setdefault(name, []).append(speed)
        for measure, _ in MEASURES:
            qualities.setdefault((name, measure), []).append(figures[measure])

    for seed in range(1, seeds + 1):
        progress(f"w2v: gensim on {text.name}, seed {seed} of {seeds}")
        figures = peers.run("gensim", text, dim=100, seed=seed, evaluate=REAL)
        note("gensim", figures, figures["words_per_cpu_s"])
        for name, (nodes, options) in OURS.items():
            progress(f"w2v: {name} on {text.name}, seed {seed} of {seeds}")
            with tempfile.TemporaryDirectory() as folder:
                vectors = Path(folder) / "vectors.bin"
                result, _ = finish(start(nodes, 1, text, *LIKE_GENSIM, "--seed", seed, "--model_seed", seed, "--write_results", 1,
                                         "--output_file", vectors, *options))
                note(name, peers.run("evaluate_vectors", vectors, REAL), result["words_per_cpu_second"])
            if nodes > 1:
                shares.append(100 * result["local_share"])
    size = "4 M words" if quick else "18 M words"
    rows = []
    for name in OURS:
        rows.append(against(f"word2vec, {size}, {name}, own negatives for each pair", speeds[name], "words/cpu-s", "gensim",
                            speeds["gensim"], ">= 1.2" if nodes_of(name) == 1 else ""))
    for name in OURS:
        for measure, what in MEASURES:
            ours, theirs = (sum(qualities[who, measure]) / seeds for who in (name, "gensim"))
            rows.append(Row(f"word2vec, {size}, {name}: {what}, mean of {seeds} seeds", ours, "", theirs, "gensim", ours / theirs,
                            "" if quick or name == SAME else ">= 1", note=f"{spread(qualities[name, measure])}; gensim "
                            f"{spread(qualities['gensim', measure])}"))
    rows.append(Row(f"word2vec, {size}, 2x1, local: local share", min(shares), "%"))
    return rows


def nodes_of(name):
    return OURS[name][0]


def spread(values):
    return f"{min(values):.3f} to {max(values):.3f}"


def sizes(quick):
    """seeds: of the real text; 0 leaves it out."""
    return {"words": LENGTH, "rounds": 2 if quick else 5, "seeds": 1 if quick else 3, "real": "part.txt" if quick else "text.txt"}


def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    size = size or sizes(quick)
    return synthetic_rows(size["rounds"], size["words"]) + (real_rows(size["seeds"], size["real"]) if size["seeds"] else [])
