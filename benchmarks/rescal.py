"""RESCAL beside torch: `python -m benchmarks --only rescal [--quick]`, a minute.

The first triples of the synthetic graph of kge.py. torch gets written-out gradients and large batches, in which a relation is one matrix
product for all its triples (peers/rescal.py); ours makes a step for every triple. triples/cpu-s: the CPU time of the training alone.
"""
from __future__ import annotations

from benchmarks import peers
from benchmarks.kge import SYNTHETIC, make_graph, run_program
from benchmarks.report import Row, against, median, progress

OPTIONS = [*SYNTHETIC, "--algorithm", "RESCAL", "--num_epochs", 2]


def sizes(quick):
    return {"triples": 20_000, "parts": (1, 2, 10, 100), "rounds": 2 if quick else 5, "peer": True}


def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    size = size or sizes(quick)
    data = make_graph(size["triples"])
    torch = []
    parts = {n: [] for n in size["parts"]}          # values of a relation: k triples/cpu-s
    for number in range(size["rounds"]):
        progress(f"rescal: round {number + 1} of {size['rounds']}")
        if size["peer"]:
            torch.append(peers.run("torch_rescal", data, epochs=2)["triples_per_cpu_s"] / 1000)
        for n, speeds in parts.items():
            found, _, _ = run_program(1, data, *OPTIONS, "--relation_parts", n)
            speeds.append(median([epoch["triples_per_cpu_second"] for epoch in found]) / 1000)
    rows = [Row(f"RESCAL, a relation in {n} values", median(speeds), "k triples/cpu-s") for n, speeds in parts.items()]
    if torch:
        rows[0] = against("RESCAL, a relation in 1 value", parts[1], "k triples/cpu-s", "torch", torch, "> 1.5")
    return rows
