"""Where the model lies: an entity is one parameter, a relation one or several; each holds its numbers and then its AdaGrad sums."""
from dataclasses import dataclass

import numpy as np

__all__ = ["Layout"]

BLOCK = 1 << 16                 # numbers that are pulled, set or drawn at a time, at least one relation


@dataclass(frozen=True)
class Layout:
    """The keys: those of the entities, then those of the relations. parts: keys of a relation (a divisor of dim for RESCAL, else 1).

    places: where the parameter of each key is (None: where it is).
    """

    entities: int
    relations: int
    dim: int
    rescal: bool = False
    parts: int = 1
    places: np.ndarray | None = None

    @property
    def lines(self):
        """Lines of a relation's matrix in one parameter."""
        return self.dim // self.parts if self.rescal else 1

    @property
    def keys(self):
        """The number of keys of the model."""
        return self.entities + self.relations * self.parts

    @property
    def relation_shape(self):
        """The shape of all relations' numbers."""
        return (self.relations, self.dim, self.dim) if self.rescal else (self.relations, self.dim)

    def lengths(self, more):
        """Numbers per key, as lapse.Server takes them; `more` keys of the length of an entity follow."""
        if not self.rescal:
            return 2 * self.dim
        lengths = np.full(self.keys + more, 2 * self.dim, dtype=np.int64)
        lengths[self.keys_of(self.entities, self.keys)] = 2 * self.dim * self.lines
        return lengths

    def keys_of(self, begin, end):
        """Where the parameters of keys begin up to end are."""
        return np.arange(begin, end) if self.places is None else self.places[begin:end]

    def blocks(self):
        """Yield (kind, begin, end) for blocks of entities or relations, in the same way for all jobs; kind is 0 or 1."""
        for kind, count, size in (0, self.entities, self.dim), (1, self.relations, self.dim * self.lines * self.parts):
            step = max(1, BLOCK // size)
            for begin in range(0, count, step):
                yield kind, begin, min(begin + step, count)

    def share(self, me, workers):
        """The blocks that a worker takes care of: neighbours, about as many numbers as everybody."""
        blocks = list(self.blocks())
        return blocks[len(blocks) * me // workers:len(blocks) * (me + 1) // workers]

    def keys_of_block(self, kind, begin, end):
        """The keys of a block of entities or relations."""
        if kind == 0:
            return self.keys_of(begin, end)
        return self.keys_of(self.entities + begin * self.parts, self.entities + end * self.parts)

    def pull(self, kv, kind, begin, end):
        """Return the numbers of a block and the sums beside them: [rows, numbers] twice. Blocking."""
        rows = kv.pull(self.keys_of_block(kind, begin, end)).reshape(end - begin, -1, 2, self.dim * (self.lines if kind else 1))
        return rows[:, :, 0].reshape(end - begin, -1), rows[:, :, 1].reshape(end - begin, -1)

    def set(self, kv, kind, begin, end, values, sums):
        """Write the numbers of a block, and the sums beside them. Blocking."""
        rows = np.empty((end - begin, self.parts if kind else 1, 2, self.dim * (self.lines if kind else 1)), dtype=values.dtype)
        rows[:, :, 0] = values.reshape(rows[:, :, 0].shape)
        rows[:, :, 1] = sums.reshape(rows[:, :, 1].shape)
        kv.set(self.keys_of_block(kind, begin, end), rows.reshape(-1))
