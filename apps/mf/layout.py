"""Who has what: rows, columns, cells and keys of a matrix, shared out among the workers of a job."""
import tempfile
from dataclasses import dataclass

import numpy as np
from apps.mf._cells import count_shares, scatter
from apps.mf._kernel import CELL

__all__ = ["Layout", "Share", "load"]

IN_MEMORY = 1 << 29             # bytes of cells; more of them lie in an unnamed file, mapped


@dataclass(frozen=True)
class Layout:
    """The keys: those of the rows, then those of the columns, each as many as the workers share out evenly."""

    rows: int
    cols: int
    workers: int

    @property
    def rows_each(self):
        return -(-self.rows // self.workers)

    @property
    def cols_each(self):
        return -(-self.cols // self.workers)

    @property
    def column_key(self):
        """The key of column 0."""
        return self.rows_each * self.workers

    @property
    def keys(self):
        """The number of keys of the model."""
        return self.column_key + self.cols_each * self.workers

    def rows_of(self, worker):
        """The first row of a worker, and the one behind its last."""
        return min(worker * self.rows_each, self.rows), min((worker + 1) * self.rows_each, self.rows)

    def cols_of(self, block):
        """The first column of a block of columns, and the one behind its last."""
        return min(block * self.cols_each, self.cols), min((block + 1) * self.cols_each, self.cols)


@dataclass(frozen=True)
class Share:
    """One worker's cells, in the order of their pieces; piece p has cells[begins[p]:begins[p + 1]]."""

    cells: np.ndarray
    begins: np.ndarray

    def pieces(self, begin, end):
        """The cells of pieces begin up to end."""
        return self.cells[self.begins[begin]:self.begins[end]]


def _room(count):
    if count * CELL.itemsize <= IN_MEMORY:
        return np.empty(count, dtype=CELL)
    with tempfile.TemporaryFile() as file:
        file.truncate(count * CELL.itemsize)
        return np.memmap(file, dtype=CELL, mode="r+", shape=count).view(np.ndarray)


def load(cells, layout, first, threads, pieces):
    """Return the Shares of the workers first … first + threads - 1, each in so many pieces: equal numbers of neighbouring columns."""
    piece = -(-layout.cols // pieces)
    begin, end = layout.rows_of(first)[0], layout.rows_of(first + threads - 1)[1]
    counts = np.zeros((threads, pieces), dtype=np.int64)
    for block in cells.blocks():
        count_shares(block, layout.cols, begin, end, layout.rows_each, piece, counts)
    ends = np.cumsum(counts, dtype=np.int64).reshape(counts.shape)
    places = ends - counts
    room = _room(int(counts.sum()))
    bounds = np.concatenate((places[:, :1], ends), axis=1)
    for block in cells.blocks():
        scatter(block, begin, end, layout.rows_each, piece, places, room)
    return [Share(room[row[0]:row[-1]], row - row[0]) for row in bounds]
