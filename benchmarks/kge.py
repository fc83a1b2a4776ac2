"""Knowledge-graph embeddings: `python -m benchmarks.kge [--quick]`.

The synthetic graph is the one on which the C++ program was measured: 14,000 entities, 200 relations, 300,000 triples. The real ones
(apps/data/fetch_kge.py; rows are left out where they have not been fetched) are UMLS and WordNet, for quality, beside PyKEEN and
torchbiggraph in environments of their own. triples/s is by the time of the slowest worker from barrier to barrier; triples/cpu-s by the
CPU time of the worker threads, of a peer by that of all its threads, each of the training alone.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.report import Row, against, against_cpp, machine, markdown, median, plain, progress

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "build/bench_data/kge"
FIRST = ROOT / "build/bench_data/kge_first"         # the first triples of that
UMLS, WORDNET = ROOT / "build/data/umls", ROOT / "build/data/wordnet"
ENTITIES, RELATIONS, TRIPLES, FEW = 14_000, 200, 300_000, 20_000
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


def make_graph():
    """Write the synthetic graph if it is not there; the same triples as in the C++ program's runs."""
    if (FIRST / "train.del").exists():
        return
    progress("kge: writing the graph")
    random = np.random.default_rng(2)
    of_entity, of_relation = 1 / np.arange(1, ENTITIES + 1)**0.6, 1 / np.arange(1, RELATIONS + 1)**0.8
    of_entity, of_relation = of_entity / of_entity.sum(), of_relation / of_relation.sum()
    order = random.permutation(ENTITIES)
    subjects, objects = (order[random.choice(ENTITIES, TRIPLES + 2000, p=of_entity)] for _ in range(2))
    triples = np.stack((subjects, random.choice(RELATIONS, TRIPLES + 2000, p=of_relation), objects), axis=1)
    write_triples(DATA, "train.del", triples[:TRIPLES])
    write_triples(FIRST, "train.del", triples[:FEW])


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


def synthetic_rows(rounds):
    ways = {"1x1, float64": (1, ["--dtype", "float64"]), "1x1, float32": (1, []),
            "1x1, float32, groups of 3 (--group 3)": (1, ["--group", 3]),
            "2x1, preloc, 10 ahead, asynchronous push, float64": (2, [*AHEAD, "--dtype", "float64"]),
            "2x1, preloc, 10 ahead, asynchronous push, float32": (2, AHEAD)}
    speeds, losses, shares, remote, memory = ({name: [] for name in ways} for _ in range(5))
    for number in range(rounds):
        progress(f"kge: synthetic graph, round {number + 1} of {rounds}")
        for name, (nodes, options) in ways.items():
            found, peak, _ = run_program(nodes, DATA, *SYNTHETIC, "--num_epochs", 1, "--seed", number + 1, *options)
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


def wordnet_rows(rounds, epochs, slow):
    if not (WORDNET / "train.del").exists():
        return []
    ours, mrrs, cpus = [], [], []
    theirs = {"torchbiggraph": [], "pykeen": []}
    answers = {}
    for number in range(rounds):
        for peer, speeds in theirs.items():
            if number == 0 or (peer == "torchbiggraph") or not slow:
                progress(f"kge: WordNet, {peer}, round {number + 1} of {rounds}")
                answers[peer] = peers.run(peer, WORDNET, dim=100, epochs=epochs if peer == "torchbiggraph" or slow else 1,
                                          seed=number + 1, **({"weight": 0} if peer == "pykeen" else {}))
                speeds.append(answers[peer]["triples_per_cpu_s"])
        progress(f"kge: WordNet, ours, round {number + 1} of {rounds}")
        found, _, cpu = run_program(1, WORDNET, *size_of(WORDNET), *ON_WORDNET, "--num_epochs", epochs, "--eval_freq", epochs, "--seed",
                                    number + 1)
        ours.append(median([epoch["triples_per_cpu_second"] for epoch in found]) / 1000)
        mrrs.append(found[-1]["metrics"]["test"]["mrr"])
        cpus.append(cpu)
    rows = []
    for peer, speeds in theirs.items():
        rows.append(against(f"ComplEx, WordNet, {epochs} epochs", ours, "k triples/cpu-s", peer,
                            [x / 1000 for x in (speeds * rounds)[:rounds]], "> 1"))
        if peer == "torchbiggraph" or slow:
            rows.append(Row(f"- test MRR over {peer}'s {answers[peer]['mrr']:.3f}", min(mrrs), "", answers[peer]["mrr"], peer,
                            min(mrrs) / answers[peer]["mrr"], ">= 1"))
    return rows


# --- RESCAL -------------------------------------------------------------------------------------------------------------------------

def rescal_rows(rounds):
    ours, torch = [], []
    options = [*SYNTHETIC, "--algorithm", "RESCAL", "--num_epochs", 2]
    parts = {n: [] for n in (1, 2, 10, 100)}
    for number in range(rounds):
        progress(f"kge: RESCAL, round {number + 1} of {rounds}")
        torch.append(peers.run("torch_rescal", FIRST, epochs=2)["triples_per_cpu_s"] / 1000)
        for n, speeds in parts.items():
            found, _, _ = run_program(1, FIRST, *options, "--relation_parts", n)
            speeds.append(median([epoch["triples_per_cpu_second"] for epoch in found]) / 1000)
        ours.append(parts[1][-1])
    rows = [against("RESCAL, first 20,000 triples, a relation in one value", ours, "k triples/cpu-s", "torch", torch, "> 1.5")]
    return rows + [Row(f"- a relation in {n} values", median(parts[n]), "k triples/cpu-s") for n in parts if n > 1]


def run(quick: bool = False, slow: bool = False) -> list[Row]:
    make_graph()
    rounds = 3 if quick else 5
    return [*synthetic_rows(rounds), *umls_rows(rounds), *wordnet_rows(1 if quick else 3, 10, slow), *rescal_rows(2 if quick else 3)]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kge", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, noisier")
    parser.add_argument("--slow", action="store_true", help="PyKEEN on WordNet for as many epochs as ours, and its MRR: ten minutes more")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args()
    load, began = os.getloadavg()[0], time.monotonic()
    rows = run(options.quick, options.slow)
    print("; ".join(machine().values()) + f"; load average {load:.1f} before, {os.getloadavg()[0]:.1f} after, "
          f"{time.monotonic() - began:.0f} s")
    print(markdown(rows) if options.markdown else plain(rows))
    return 0 if not any(math.isnan(row.measured) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
