"""Word vectors of a real text beside gensim: `python -m benchmarks --only w2v_text [--quick]`, half an hour; quick: two minutes.

18 million words (apps/data/fetch_text.py; there are no rows where it has not been fetched), one iteration of gensim's skip-gram and of
ours in turn with the same settings, and gensim's own evaluators for the vectors of both. words/cpu-s counts the CPU time of all threads
while they train.
"""
from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import peers
from benchmarks.report import Row, against, progress
from benchmarks.w2v import LOCAL, ROOT, finish, start

TEXT = ROOT / "build/data/text"
LIKE_GENSIM = ["--min_count", 5, "--subsample", "1e-3", "--init_scale", 1, "--num_keys", 200_000]
OURS = {"1x1": (1, []), "2x1": (2, LOCAL)}      # name: nodes, options
MEASURES = (("analogies", "analogies, share right"), ("wordsim353", "WordSim353, Spearman"), ("simlex999", "SimLex999, Spearman"))


def train(name, text, seed, alpha):
    """Train and measure; gensim's or our figures."""
    progress(f"w2v_text: {name} on {text.name}, learning rate {alpha}, seed {seed}")
    if name == "gensim":
        found = peers.run("gensim", text, dim=100, seed=seed, alpha=alpha, evaluate=TEXT)
        return {**found, "speed": found["words_per_cpu_s"]}
    nodes, options = OURS[name]
    with tempfile.TemporaryDirectory() as folder:
        vectors = Path(folder) / "vectors.bin"
        result, _ = finish(start(nodes, 1, text, *LIKE_GENSIM, "--starting_alpha", alpha, "--seed", seed, "--model_seed", seed,
                                 "--write_results", 1, "--output_file", vectors, *options))
        return {**peers.run("evaluate_vectors", vectors, TEXT), "speed": result["words_per_cpu_second"],
                "local": 100 * result["local_share"]}


def sizes(quick):
    return {"text": "part.txt" if quick else "text.txt", "seeds": 1 if quick else 3, "alphas": (0.025,) if quick else (0.025, 0.03)}


def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    size = size or sizes(quick)
    text = TEXT / size["text"]
    if not text.exists():
        progress("w2v_text: there is no text (python apps/data/fetch_text.py)")
        return []
    names = ("gensim", *OURS)
    found = {(name, alpha): [] for alpha in size["alphas"] for name in names}
    for seed in range(1, size["seeds"] + 1):
        for name, alpha in found:
            found[name, alpha].append(train(name, text, seed, alpha))
    rows = []
    for alpha in size["alphas"]:
        of = {name: found[name, alpha] for name in names}
        for name in OURS:
            what = f"word2vec, {text.stem}, {name}, learning rate {alpha}"
            rows.append(against(f"{what}, own negatives for each pair", [figures["speed"] / 1000 for figures in of[name]], "k words/cpu-s",
                                "gensim", [figures["speed"] / 1000 for figures in of["gensim"]], ">= 1.2" if name == "1x1" else ""))
            for measure, meaning in MEASURES:
                ours, theirs = mean(of[name], measure), mean(of["gensim"], measure)
                rows.append(Row(f"- {meaning}, mean of {size['seeds']} seeds", ours, "", theirs, "gensim", ours / theirs, ">= 1",
                                note=f"{spread(of[name], measure)}; gensim {spread(of['gensim'], measure)}"))
            if OURS[name][0] > 1:
                rows.append(Row("- local share", min(figures["local"] for figures in of[name]), "%"))
    return rows


def mean(figures, measure):
    return sum(each[measure] for each in figures) / len(figures)


def spread(figures, measure):
    values = [each[measure] for each in figures]
    return f"{min(values):.3f} to {max(values):.3f}"
