"""Rank the triples of test.del by a ComplEx model with PyKEEN's evaluator: filtered by train, valid and test, both sides, realistic rank.

entities.npy and relations.npy have a row for each id; a row is the real half, then the imaginary half. The score of (s, r, o) is the real
part of sum(e_s * r_r * conj(e_o)).
"""
import sys

import measure
import numpy as np
import torch
from pykeen.evaluation import RankBasedEvaluator
from pykeen.models import ComplEx
from pykeen.triples import CoreTriplesFactory

BATCH = 256
MEASURES = {"mrr": "inverse_harmonic_mean_rank", "mr": "arithmetic_mean_rank", "hits_at_1": "hits_at_1", "hits_at_3": "hits_at_3",
            "hits_at_10": "hits_at_10"}


def read(folder):
    """The triples of train.del, valid.del and test.del as factories, with as many entities and relations as the ids need."""
    tables = [np.loadtxt(folder / name, dtype=np.int64, delimiter="\t", ndmin=2) for name in ("train.del", "valid.del", "test.del")]
    everything = np.concatenate(tables)
    counts = {"num_entities": int(everything[:, [0, 2]].max()) + 1, "num_relations": int(everything[:, 1].max()) + 1}
    for name, kind in ("entity_ids.del", "num_entities"), ("relation_ids.del", "num_relations"):
        if (folder / name).exists():
            with (folder / name).open(encoding="utf-8") as file:
                counts[kind] = max(counts[kind], sum(1 for line in file if line.strip()))
    return [CoreTriplesFactory.create(mapped_triples=torch.from_numpy(table), **counts) for table in tables]


def rank(model, train, valid, test):
    """MRR, MR and Hits of the model on the test triples."""
    evaluator = RankBasedEvaluator(filtered=True)
    result = evaluator.evaluate(model, test.mapped_triples, batch_size=BATCH, use_tqdm=False,
                                additional_filter_triples=[train.mapped_triples, valid.mapped_triples])
    return {name: float(result.get_metric(f"both.realistic.{metric}")) for name, metric in MEASURES.items()}


def load(factory, entities, relations):
    """A ComplEx model of these vectors."""
    for name, array, count in ("entities", entities, factory.num_entities), ("relations", relations, factory.num_relations):
        if array.ndim != 2 or array.shape[1] % 2 or array.shape[0] < count or array.shape[1] != entities.shape[1]:
            sys.exit(f"the {name} have shape {array.shape}, not {count} rows and an even number of columns, {entities.shape[-1]}")
    model = ComplEx(triples_factory=factory, embedding_dim=entities.shape[1] // 2)
    for representation, array in (model.entity_representations[0], entities), (model.relation_representations[0], relations):
        half = array.shape[1] // 2
        target = representation._embeddings.weight           # real and imaginary parts in turn
        pairs = np.stack([array[:, :half], array[:, half:]], axis=-1).reshape(len(array), -1)[:len(target)]
        with torch.no_grad():
            target.copy_(torch.from_numpy(np.ascontiguousarray(pairs, np.float32)))
    return model.eval()


def main():
    parser = measure.parser(__doc__, ("folder", "train.del, valid.del and test.del"), ("entities", ".npy, number of entities x dim"),
                            ("relations", ".npy, number of relations x dim"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, valid, test = read(options.folder)
    model = load(train, np.load(options.entities, allow_pickle=False), np.load(options.relations, allow_pickle=False))
    with measure.Clock() as clock:
        found = rank(model, train, valid, test)
    measure.answer("pykeen", clock, triples=test.num_triples, **found)


if __name__ == "__main__":
    main()
