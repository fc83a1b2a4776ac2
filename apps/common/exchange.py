"""Numbers of every worker that every worker sees: sums of losses, counts, a wish to stop."""
import numpy as np

__all__ = ["Exchange"]


class Exchange:
    """Named numbers of every worker, seen by every worker; in parameters behind those of the model.

    kv, me, workers: a worker, its number in the job, and how many the job has; its first free key; visible numbers per key; their
    type; the names. A float64 travels as two numbers of the job's type, so that float32 does not cut it. Two sets of keys take
    turns: nobody writes to one before all have read what was in it.
    """

    def __init__(self, kv, me, workers, first_key, length, dtype, names):
        self.kv, self.me, self.workers, self.first, self.length, self.dtype = kv, me, workers, first_key, length, np.dtype(dtype)
        self.names, self.each, self.turn = tuple(names), _keys_each(length, names), 0

    @staticmethod
    def num_keys(workers, length, names):
        """Return how many keys the exchange of so many workers takes."""
        return 2 * workers * _keys_each(length, names)

    def __call__(self, **numbers):
        """Give this worker's numbers (0 for a name that is missing); return {name: array, an entry per worker}. Blocking; collective."""
        count = len(self.names)
        values = np.zeros(self.each * self.length, dtype=self.dtype)
        given = np.array([float(numbers.get(name, 0.0)) for name in self.names])
        values[:count] = given
        with np.errstate(invalid="ignore"):     # infinity less infinity
            values[count:2 * count] = given - values[:count]
        start = self.first + self.turn * self.workers * self.each
        self.turn = 1 - self.turn
        self.kv.set(start + self.me * self.each + np.arange(self.each), values)
        self.kv.barrier()
        everybody = self.kv.pull(start + np.arange(self.workers * self.each)).reshape(self.workers, -1).astype(np.float64)
        return dict(zip(self.names, (everybody[:, :count] + everybody[:, count:2 * count]).T))


def _keys_each(length, names):
    """Keys per worker and set."""
    return -(-2 * len(names) // length)
