"""Train torchbiggraph's ComplEx on a folder's train.del and write its vectors as entities.npy and relations.npy, in the layout of ranks.py.

One operator a relation, on the object's side; softmax loss; negatives are shared by a chunk of edges: the ends of the others, and uniform
ones. cpu and wall leave out the start of the process that trains.
"""
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import h5py
import measure
import numpy as np
import torch
from torchbiggraph.config import parse_config
from torchbiggraph.converters.import_from_tsv import convert_input_data
from torchbiggraph.train import train
from torchbiggraph.util import setup_logging


def ids(folder):
    """How many entities and relations there are."""
    tables = [np.loadtxt(folder / name, dtype=np.int64, delimiter="\t", ndmin=2) for name in ("train.del", "valid.del", "test.del")]
    everything = np.concatenate(tables)
    return int(everything[:, [0, 2]].max()) + 1, int(everything[:, 1].max()) + 1, len(tables[0])


def settings(folder, relations, options):
    return {
        "entity_path": str(folder / "entities"), "edge_paths": [str(folder / "edges")], "checkpoint_path": str(folder / "model"),
        "entities": {"all": {"num_partitions": 1}},
        "relations": [{"name": str(number), "lhs": "all", "rhs": "all", "operator": "complex_diagonal"} for number in range(relations)],
        "dimension": options.dim, "global_emb": False, "comparator": "dot", "loss_fn": "softmax", "lr": options.lr,
        "num_epochs": options.epochs, "batch_size": options.batch, "num_batch_negs": options.batch_negative,
        "num_uniform_negs": options.negative, "workers": 1, "eval_fraction": 0, "verbose": 0,
    }


def note_start(path):
    """Run in the process that trains when it begins: leave how much time its start took."""
    setup_logging()
    Path(path).write_text(json.dumps([time.process_time(), time.time()]))


def vectors(folder, entities, relations, dim):
    """The trained vectors as arrays. The score here is of s and r * o, so that the conjugate of r is the r of ranks.py."""
    version = (folder / "model" / "checkpoint_version.txt").read_text().strip()
    of_entity, of_relation = np.zeros((entities, dim), np.float32), np.zeros((relations, dim), np.float32)
    names = json.loads((folder / "entities" / "entity_names_all_0.json").read_text())
    with h5py.File(folder / "model" / f"embeddings_all_0.v{version}.h5") as file:
        of_entity[[int(name) for name in names]] = file["embeddings"][:]
    with h5py.File(folder / "model" / f"model.v{version}.h5") as file:
        for number in range(relations):
            operator = file[f"model/relations/{number}/operator/rhs"]
            of_relation[number] = np.concatenate([operator["real"][:], -operator["imag"][:]])
    return of_entity, of_relation


def main():
    parser = measure.parser(__doc__, ("folder", "train.del, valid.del and test.del"))
    parser.add_argument("--dim", type=int, default=100, help="real numbers of an entity")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--negative", type=int, default=50, help="uniform negatives")
    parser.add_argument("--batch_negative", type=int, default=50, help="negatives out of the batch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rank", type=int, default=1, help="0: train only")
    options = parser.parse_args()
    entities, relations, edges = ids(options.folder)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lapse-") as temporary:
        folder = Path(temporary)
        config = parse_config(settings(folder, relations, options))
        convert_input_data(config.entities, config.relations, config.entity_path, config.edge_paths, [options.folder / "train.del"],
                           lhs_col=0, rel_col=1, rhs_col=2)
        with measure.Clock() as clock:
            began = time.time()
            train(config, subprocess_init=partial(note_start, str(folder / "start")))
        cpu, started = json.loads((folder / "start").read_text())
        clock.cpu, clock.wall = clock.cpu - cpu, clock.wall - (started - began)
        found = vectors(folder, entities, relations, options.dim)
    triples, kept = options.epochs * edges, {}
    if options.rank:
        output = Path(tempfile.mkdtemp(prefix="lapse-"))
        for name, array in zip(("entities", "relations"), found):
            np.save(output / f"{name}.npy", array)
            kept[name] = str(output / f"{name}.npy")
    measure.answer("torchbiggraph", clock, triples=triples, triples_per_cpu_s=triples / clock.cpu, **kept)


if __name__ == "__main__":
    main()
