"""Link prediction: where the true entity ranks among all in the place of a triple's subject, and of its object.

Filtered: entities that make another triple of training, validation or test data do not count (Bordes et al., Translating Embeddings
for Modeling Multi-relational Data, NIPS 2013); raw: they do. Of entities with the same score, the true one is put in the middle.
"""
import numpy as np
from apps.kge._ranking import count_ranks, pack, panels_for

__all__ = ["METRICS", "Evaluation", "Known", "queries_of", "summary"]

BATCH = 256                     # triples at a time
SETTINGS = ("", "raw_")
METRICS = tuple(setting + name for setting in SETTINGS for name in ("mrr", "mr", "hits1", "hits3", "hits10"))


def queries_of(rescal, subjects, relations, objects):
    """Return the vectors whose products with an entity are the scores of the triples with it as object, and as subject.

    subjects, objects: [triples, dim]; relations: the same, real halves first, or for RESCAL one matrix for all of them.
    """
    if rescal:
        return np.einsum("bi,ij->bj", subjects, relations), np.einsum("ij,bj->bi", relations, objects)
    half = subjects.shape[1] // 2
    sr, si, rr, ri, o_r, oi = (part for matrix in (subjects, relations, objects) for part in (matrix[:, :half], matrix[:, half:]))
    return np.hstack((sr * rr - si * ri, sr * ri + si * rr)), np.hstack((rr * o_r + ri * oi, rr * oi - ri * o_r))


class Known:
    """For pairs (entity, relation) the entities that make a known triple with them; the place is that of the others: 0 or 2."""

    def __init__(self, triples, place, num_relations):
        self.other, self.relations = 2 - place, num_relations
        rows = np.unique(np.stack((self._code(triples), triples[:, place]), axis=1), axis=0)
        self.codes, self.entities = np.ascontiguousarray(rows[:, 0]), rows[:, 1].astype(np.int32)

    def _code(self, triples):
        return triples[:, self.other].astype(np.int64) * self.relations + triples[:, 1]

    def ranges(self, triples):
        """For each triple, where its entities begin and end in `entities`; they are in ascending order."""
        codes = self._code(triples)
        return np.searchsorted(self.codes, codes), np.searchsorted(self.codes, codes, side="right")


class Evaluation:
    """What the workers of a node need to evaluate, and the entities' vectors, which they share.

    splits: {name: triples}; known: all triples that there are. Each worker calls `refresh`, then all meet at a barrier, then each
    calls `measure`; nobody trains in between.
    """

    def __init__(self, layout, dtype, splits, known):
        self.layout = layout
        # neighbours have the same relation: workers and batches need few of them
        self.splits = {name: np.ascontiguousarray(triples[np.argsort(triples[:, 1], kind="stable")]) for name, triples in splits.items()}
        self.known = {place: Known(known, place, layout.relations) for place in (0, 2)}
        self.panels = panels_for(layout.entities, layout.dim, dtype)
        self.lanes = self.panels.shape[2]

    def refresh(self, kv, part, parts):
        """Pull this part of the entities into the matrix of the node. Blocking."""
        blocks = [block for block in self.layout.blocks() if block[0] == 0]
        for kind, begin, end in blocks[len(blocks) * part // parts:len(blocks) * (part + 1) // parts]:
            pack(self.panels, np.ascontiguousarray(self.layout.pull(kv, kind, begin, end)[0]), begin)

    def _vectors(self, entities):
        return self.panels[entities // self.lanes, :, entities % self.lanes]

    def _batches(self, triples):
        """Slices of triples, each with the parameters of its relations."""
        ends = np.arange(BATCH, len(triples) + BATCH, BATCH)
        if self.layout.rescal:
            ends = np.union1d(ends, np.flatnonzero(np.diff(triples[:, 1])) + 1)
        begin = 0
        for end in np.minimum(ends, len(triples)).tolist():
            if end > begin:
                yield triples[begin:end]
            begin = end

    def _ranks(self, kv, triples):
        """Yield ranks, filtered and raw, of some triples and sides."""
        layout = self.layout
        for batch in self._batches(triples):
            relations, which = np.unique(batch[:, 1], return_inverse=True)
            values = np.concatenate([layout.pull(kv, 1, relation, relation + 1)[0] for relation in relations.tolist()])
            values = values.reshape(layout.dim, layout.dim) if layout.rescal else values[which]
            q, p = queries_of(layout.rescal, self._vectors(batch[:, 0]), values, self._vectors(batch[:, 2]))
            for place, queries in (2, q), (0, p):
                known = self.known[place]
                counts = count_ranks(self.panels, layout.entities, np.ascontiguousarray(queries), np.ascontiguousarray(batch[:, place]),
                                     *known.ranges(batch), known.entities)
                yield [1 + counts[:, 2] + counts[:, 3] / 2, 1 + counts[:, 0] + counts[:, 1] / 2]

    def measure(self, kv, me, workers):
        """Return {split_metric: sum over this worker's share}, and {split_ranks: their number}. Blocking."""
        told = {}
        for split, triples in self.splits.items():
            share = triples[len(triples) * me // workers:len(triples) * (me + 1) // workers]
            told[f"{split}_ranks"] = 2.0 * len(share)
            for both in self._ranks(kv, share):
                for setting, ranks in zip(SETTINGS, both):
                    for name, value in (("mrr", (1 / ranks).sum()), ("mr", ranks.sum()), ("hits1", (ranks <= 1).sum()),
                                        ("hits3", (ranks <= 3).sum()), ("hits10", (ranks <= 10).sum())):
                        key = f"{split}_{setting}{name}"
                        told[key] = told.get(key, 0.0) + float(value)
        return told


def summary(told, splits):
    """Return {split: {metric: its mean}} out of what all workers have told."""
    return {split: {name: float(told[f"{split}_{name}"].sum() / told[f"{split}_ranks"].sum()) for name in METRICS} for split in splits}
