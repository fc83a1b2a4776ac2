"""Knowledge-graph embeddings (ComplEx): `python -m benchmarks --only kge [--quick]`, a quarter of an hour.

The synthetic graph is the one on which the C++ program was measured: 14,000 entities, 200 relations, 300,000 triples. The real ones
are UMLS and WordNet, for quality, beside PyKEEN and torchbiggraph in environments of their own; rows are left out where they have not
been fetched (apps/data/fetch_kge.py umls; wordnet; wordnet --together 0, which is "split at random"). triples/s is by the time of the
slowest worker from barrier to barrier; triples/cpu-s by the CPU time of the worker threads, of a peer by that of all its threads, each of
the training alone.
"""
from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.report import Row, against, against_cpp, median, progress

ROOT = Path(__file__).resolve().parents[1]
GRAPHS = ROOT / "build/bench_data"
UMLS = ROOT / "build/data/umls"
WORDNET = {                                         # split: its folder, epochs
    "pairs held out together": (ROOT / "build/data/wordnet", 10),
    "split at random": (ROOT / "build/data/wordnet_apart", 3),
}
ENTITIES, RELATIONS, TRIPLES = 14_000, 200, 300_000
LOSS = 0.2165                                       # of the C++ program, after one epoch
SYNTHETIC = ["--num_entities", ENTITIES, "--num_relations", RELATIONS, "--embed_dim", 100, "--neg_ratio", 10, "--eval_freq", -1,
             "--read_partitioned_dataset", 0]
AHEAD = ["--sampling.scheme", "preloc", "--localize_parameters_ahead", 10, "--async_push", 1]
ON_UMLS = ["--embed_dim", 100, "--num_epochs", 60, "--eval_freq", 60, "--eta", 0.05, "--init_scale", 0.1, "--eval_truncate_tr", 1]
ON_WORDNET = ["--embed_dim", 100, "--neg_ratio", 10, "--gamma_entity", 0.01, "--gamma_relation", 0, "--init_scale", 0.05,
              "--eval_truncate_tr", 1, "--eval_truncate_va", 1]


def write_triples(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write("".join([f"{s}\t{r}\t{o}\n" for s, r, o in rows.tolist()]))
    os.replace(file.name, folder / name)


def make_graph(triples):
    """The folder of the synthetic graph's first triples, which are written if they are not there; as in the C++ program's runs."""
    folder = GRAPHS / f"kge_{triples}"
    if not (folder / "train.del").exists():
        progress(f"kge: writing {triples} triples")
        random = np.random.default_rng(2)
        of_entity, of_relation = 1 / np.arange(1, ENTITIES + 1)**0.6, 1 / np.arange(1, RELATIONS + 1)**0.8
        of_entity, of_relation = of_entity / of_entity.sum(), of_relation / of_relation.sum()
        order = random.permutation(ENTITIES)
        n = TRIPLES + 2000
        subjects, objects = (order[random.choice(ENTITIES, n, p=of_entity)] for _ in range(2))
        everything = np.stack((subjects, random.choice(RELATIONS, n, p=of_relation), objects), axis=1)
        write_triples(folder, "train.del", everything[:triples])
    return folder


# --- the program ------------------------------------------------------------------------------------------------------------------

def run_program(nodes, data, *options, threads=1):
    """Run the program; its epochs (dicts), the nodes' peak memory in MiB, and the CPU seconds of all of it."""
    report = tempfile.NamedTemporaryFile(suffix=".jsonl", delete=False)  # noqa: SIM115 (removed below)
    report.close()
    program = [sys.executable, "apps/knowledge_graph_embeddings.py", "--dataset", data, "-t", threads, "--report", report.name, *options]
    launcher = [sys.executable, "-m", "lapse", "run", "-s", nodes] if nodes > 1 else []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([str(word) for word in (*launcher, *program)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    epochs = [json.loads(line) for line in Path(report.name).read_text().splitlines()]
    Path(report.name).unlink()
    if done.returncode:
        raise RuntimeError(done.stdout)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return epochs, [float(number) for number in re.findall(r"had at most (\d+) MiB", done.stdout)], cpu


def size_of(data):
    """The options that say how many entities and relations there are."""
    counts = [sum(1 for _ in (data / f"{kind}_ids.del").open(encoding="utf-8")) for kind in ("entity", "relation")]
    return ["--num_entities", counts[0], "--num_relations", counts[1], "--read_partitioned_dataset", 0]


def synthetic_rows(rounds, triples):
    data = make_graph(triples)
    ways = {"1x1, float64": (1, ["--dtype", "float64"]), "1x1, float32": (1, []),
            "1x1, float32, groups of 3 (--group 3)": (1, ["--group", 3]),
            "2x1, preloc, 10 ahead, asynchronous push, float64": (2, [*AHEAD, "--dtype", "float64"]),
            "2x1, preloc, 10 ahead, asynchronous push, float32": (2, AHEAD)}
    speeds, losses, shares, remote, memory = ({name: [] for name in ways} for _ in range(5))
    for number in range(rounds):
        progress(f"kge: synthetic graph, round {number + 1} of {rounds}")
        for name, (nodes, options) in ways.items():
            found, peak, _ = run_program(nodes, data, *SYNTHETIC, "--num_epochs", 1, "--seed", number + 1, *options)
            speeds[name].append(found[0]["triples_per_second"])
            losses[name].append(found[0]["loss"])
            shares[name].append(100 * found[0]["local_share"])
            remote[name].append(100 * found[0]["remote_share"])
            memory[name] += peak
    rows = []
    for name, (nodes, _) in ways.items():
        bound = "" if "group" in name else "> 2" if nodes == 2 or "float64" in name else "> 3"
        rows.append(against_cpp(f"ComplEx, {name}", [x / 1000 for x in speeds[name]], "k triples/s", 15.1 if nodes == 1 else 9.7, bound,
                                "15.1" if nodes == 1 else "9.7"))
        off = 100 * abs(float(np.mean(losses[name])) / LOSS - 1)
        rows.append(Row(f"- its loss, mean of {rounds} seeds {np.mean(losses[name]):.4f}: off the C++ program's {LOSS}", off, "%",
                        bound="<= 2" if nodes == 1 and "group" not in name else ""))
        if nodes == 2:
            rows.append(Row("- found here at once", median(shares[name]), "%", bound=">= 99", cpp="99",
                            note=f"{min(shares[name]):.2f} to {max(shares[name]):.2f}"))
            rows.append(Row("- asked of another node (the rest is on its way here)", median(remote[name]), "%"))
        rows.append(Row("- its peak memory per node", max(memory[name]), "MiB", cpp="116"))
    return rows


# --- quality ------------------------------------------------------------------------------------------------------------------------

def umls_rows(rounds):
    if not (UMLS / "train.del").exists():
        return []
    measured, cpus, differences = [], [], []
    for number in range(rounds):
        progress(f"kge: UMLS, seed {number + 1} of {rounds}")
        with tempfile.TemporaryDirectory() as folder:
            found, _, cpu = run_program(1, UMLS, *size_of(UMLS), *ON_UMLS, "--seed", number + 1, "--write_embeddings", folder,
                                        "--write_every", 60)
            mrr = found[-1]["metrics"]["test"]["mrr"]
            measured.append(mrr)
            cpus.append(cpu)
            if number == 0:
                theirs = peers.run("evaluate_embeddings", UMLS, f"{folder}/epoch-60/entities.npy", f"{folder}/epoch-60/relations.npy")
                ours = found[-1]["metrics"]["test"]
                differences = [abs(ours[name] - theirs[other]) for name, other in
                               (("mrr", "mrr"), ("hits1", "hits_at_1"), ("hits3", "hits_at_3"), ("hits10", "hits_at_10"))]
    progress("kge: UMLS, PyKEEN")
    pykeen = peers.run("pykeen", UMLS, dim=100, epochs=40)
    return [Row(f"ComplEx, UMLS, 60 epochs: test MRR, mean of {rounds} seeds", float(np.mean(measured)), "", bound=">= 0.91",
                note=f"{min(measured):.3f} to {max(measured):.3f}; PyKEEN {pykeen['mrr']:.3f} after 40 epochs"),
            Row("- CPU time of the whole program", max(cpus), "cpu-s", bound="< 10", note=f"PyKEEN's training {pykeen['cpu']:.0f}"),
            Row("- MRR and Hits: furthest from PyKEEN's evaluator on the same vectors", max(differences), "", bound="<= 0.005")]


def wordnet_rows(split, rounds, quick):
    """Ours beside the peers on a split of WordNet. torchbiggraph runs in each round and is ranked in the first; PyKEEN, which takes
    minutes, runs in the first, and for one epoch if quick."""
    data, epochs = WORDNET[split]
    if not (data / "train.del").exists():
        return []
    ours, mrrs = [], []
    theirs = {"torchbiggraph": [], "pykeen": []}
    answers = {}
    for number in range(rounds):
        for peer, speeds in theirs.items():
            if number == 0 or peer == "torchbiggraph":
                progress(f"kge: WordNet, {split}, {peer}, round {number + 1} of {rounds}")
                enough = 1 if quick and peer == "pykeen" else epochs
                ranked = number == 0 and enough == epochs
                found = peers.run(peer, data, dim=100, epochs=enough, seed=number + 1, rank=int(ranked),
                                  **({"weight": 0} if peer == "pykeen" else {}))
                speeds.append(found["triples_per_cpu_s"] / 1000)
                if ranked:
                    answers[peer] = found["mrr"]
        progress(f"kge: WordNet, {split}, ours, round {number + 1} of {rounds}")
        found, _, _ = run_program(1, data, *size_of(data), *ON_WORDNET, "--num_epochs", epochs, "--eval_freq", epochs, "--seed", number + 1)
        ours.append(median([epoch["triples_per_cpu_second"] for epoch in found]) / 1000)
        mrrs.append(found[-1]["metrics"]["test"]["mrr"])
    rows = []
    for peer, speeds in theirs.items():
        rows.append(against(f"ComplEx, WordNet, {split}", ours, "k triples/cpu-s", peer, (speeds * rounds)[:rounds], "> 1"))
        if peer in answers:
            mean = float(np.mean(mrrs))
            rows.append(Row(f"- test MRR after {epochs} epochs", mean, "", answers[peer], peer, mean / answers[peer], ">= 1",
                            note=f"{min(mrrs):.3f} to {max(mrrs):.3f}"))
    return rows


def sizes(quick):
    """peer_rounds: 0 leaves out what is compared with peers."""
    return {"triples": TRIPLES, "rounds": 3 if quick else 5, "peer_rounds": 1 if quick else 3}


def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    size = size or sizes(quick)
    rounds, peer_rounds = size["rounds"], size["peer_rounds"]
    rows = synthetic_rows(rounds, size["triples"])
    if peer_rounds:
        rows += umls_rows(rounds)
        for split in WORDNET:
            rows += wordnet_rows(split, peer_rounds, quick)
    return rows
