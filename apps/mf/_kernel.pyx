# Design: one Trainer per worker thread. It runs through the worker's cells without the GIL and works in place on the two rows of
# each, where both are local; where one is not, it pulls them and pushes what is to be added. A worker has the cells of a range
# of matrix rows of its own, so only the columns are shared.
from libc.limits cimport INT_MAX
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from apps.common._random cimport below, draw, mix
from apps.mf._arithmetic cimport arithmetic, prefetch, step_t
from lapse cimport (DONE, Key, Timestamp, Worker, acquire_two, count_pairs, look, prefetch_row, prefetch_slot, release_two, sight_t,
                    two_rows_t)

import numpy as np

cdef enum:
    AHEAD = 4                   # cells between the cursor and the prefetch of the two rows,
    FAR_AHEAD = 10              # and of their slots
    ARRAYS_AHEAD = 8            # the same where the rows lie in matrices
    BATCH = 256                 # rows that are pulled or set in one call
    LOOK = 1024                 # cells between two looks at the clock
    CACHED = 1 << 19            # bytes of rows that find themselves in a core's cache: prefetching costs more than it brings

cdef int64_t FOREVER = 0x7FFFFFFFFFFFFFFF

CELL = np.dtype([("row", "<i4"), ("col", "<i4"), ("value", "<f8")])


cdef inline int64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec


cdef inline Key place_of(const Key* places, Key key) noexcept nogil:
    return places[key] if places != NULL else key


cdef inline double uniform(uint64_t seed, int64_t at) noexcept nogil:
    """Number `at` of the random numbers in (0, 1) of a seed: the same whoever asks, in whatever order."""
    cdef uint64_t z = mix(mix(seed + <uint64_t>0x9E3779B97F4A7C15) + <uint64_t>at * <uint64_t>0x9E3779B97F4A7C15)
    return (<double>(z >> 12) + 0.5) / <double>(<uint64_t>1 << 52)


cdef cell_t* cells_of(cells) except? NULL:
    """The address of an array of cells."""
    if cells.dtype != CELL or not cells.flags.c_contiguous or not cells.flags.writeable:
        raise TypeError(f"cells must be a contiguous writeable array of {CELL}")
    return <cell_t*><size_t>cells.ctypes.data


cdef class Trainer:
    """What one worker does with its cells. One thread; the cells' rows are all in [row_begin, row_end)."""

    def __cinit__(self, Worker worker not None, *, int rank, bint double_precision, int32_t row_begin, int32_t row_end,
                  int32_t num_cols, Key column_key, row_counts, col_counts, double regularization, uint64_t seed, places=None,
                  bint sync_push=False, bint localize_rows=False, int instructions=2):
        """row_counts: cells per row of this worker; col_counts: cells per column, of the whole matrix. places: where the parameter
        of each key is. localize_rows: groups localize their rows, too. instructions: 0 for those that any processor has."""
        cdef const Key[::1] view
        cdef Py_ssize_t rows = row_end - row_begin, i, total
        cdef int64_t[::1] counts
        self.worker, self.rank, self.arith = worker, rank, arithmetic(double_precision, rank, instructions)
        self.bytes = rank * (8 if double_precision else 4)
        self.row_begin, self.row_end, self.num_cols, self.column_key = row_begin, row_end, num_cols, column_key
        self.random, self.sync_push, self.localize_rows = seed, sync_push, localize_rows
        self.deadline = self.budget = FOREVER
        if places is not None:
            view = self.held = places
            if len(view) < column_key + num_cols or rows > column_key:
                raise ValueError("places must have an entry for every key")
            self.places = &view[0]
        if len(row_counts) != rows or len(col_counts) != num_cols:
            raise ValueError("one count for every row and column")
        total = rows + num_cols
        self.row_shrink = <float*>malloc(total * sizeof(float) + 1)
        self.col_shrink = self.row_shrink + rows
        self.stamps = <int32_t*>calloc(total + 1, sizeof(int32_t))
        self.buffer = <char*>malloc(BATCH * self.bytes + 1)
        self.keys = <Key*>malloc(BATCH * sizeof(Key))
        if self.row_shrink == NULL or self.stamps == NULL or self.buffer == NULL or self.keys == NULL:
            raise MemoryError("a worker's tables")
        counts = np.ascontiguousarray(np.concatenate((row_counts, col_counts)), dtype=np.int64)
        for i in range(total):
            self.row_shrink[i] = <float>(regularization / max(counts[i], 1))

    def __dealloc__(self):
        free(self.row_shrink)
        free(self.stamps)
        free(self.buffer)
        free(self.keys)

    # --- training -----------------------------------------------------------------------------------------------------------------

    def begin_epoch(self, double eps, int64_t points=0, seconds=None):
        """Set the step size, and when an epoch ends before its time: after so many points (0: all), at so many seconds from now."""
        self.eps2 = 2 * eps
        self.budget = points if points else FOREVER
        self.trained = 0
        self.deadline = FOREVER if seconds is None else now() + <int64_t>(seconds * 1e9)

    cdef Py_ssize_t update(self, const cell_t* cells, Py_ssize_t n) noexcept nogil:
        """Train on n cells in this order; 0 or what went wrong. Fewer when the epoch has to end."""
        cdef const cell_t* cell = cells
        cdef const cell_t* end
        cdef const cell_t* stop
        cdef sight_t sight
        cdef two_rows_t two
        cdef step_t step = self.arith.step
        cdef const float* row_shrink = self.row_shrink - self.row_begin
        cdef const float* col_shrink = self.col_shrink
        cdef const Key* places = self.places
        cdef Key column_key = self.column_key
        cdef size_t rank = self.rank, width = self.bytes
        cdef double eps2 = self.eps2, shrink_w, shrink_h, x
        cdef bint large = (self.row_end - self.row_begin + self.num_cols) * self.bytes > CACHED
        cdef bint prefetching
        cdef Py_ssize_t rc = 0, here
        end = cells + min(n, self.budget)
        while cell < end and rc == 0:
            if self.deadline != FOREVER and now() >= self.deadline:
                self.out_of_time = True
                break
            stop = cell + min(end - cell, LOOK)
            here = stop - cell
            prefetching = look(self.worker, &sight) and large
            while cell < stop:
                if prefetching and cell + FAR_AHEAD < end:
                    prefetch_slot(&sight, place_of(places, cell[FAR_AHEAD].row))
                    prefetch_slot(&sight, place_of(places, column_key + cell[FAR_AHEAD].col))
                    prefetch_row(&sight, place_of(places, cell[AHEAD].row), width)
                    prefetch_row(&sight, place_of(places, column_key + cell[AHEAD].col), width)
                shrink_w = <float>eps2 * row_shrink[cell.row]
                shrink_h = <float>eps2 * col_shrink[cell.col]
                x = cell.value
                if acquire_two(&sight, place_of(places, cell.row), place_of(places, column_key + cell.col), &two):
                    step(two.row[0], two.row[1], rank, x, eps2, shrink_w, shrink_h)
                    release_two(&two)
                else:
                    here -= 1
                    rc = self.update_far(cell, shrink_w, shrink_h)
                    if rc != 0:
                        here -= stop - cell - 1
                        break
                    prefetching = look(self.worker, &sight) and large
                cell += 1
            count_pairs(&sight, here)
        self.trained += cell - cells
        self.budget -= cell - cells
        return rc

    cdef int update_far(self, const cell_t* cell, double shrink_w, double shrink_h) noexcept nogil:
        """The update where rows are not to be had in place: pull both, push what is to be added. (No look for the one that may be here:
        what is acquired and not used would count as a local access.)"""
        cdef char* rows = self.buffer
        cdef char* add = self.buffer + 2 * self.bytes
        cdef Key keys[2]
        cdef Timestamp ts
        cdef int rc
        keys[0] = place_of(self.places, cell.row)
        keys[1] = place_of(self.places, self.column_key + cell.col)
        rc = self.worker.wait(self.worker.pull(keys, 2, rows))
        if rc < 0:
            return rc
        self.arith.delta(rows, rows + self.bytes, add, add + self.bytes, self.rank, cell.value, self.eps2, shrink_w, shrink_h)
        ts = self.worker.push(keys, 2, add)
        if ts < DONE:
            return <int>ts
        return self.worker.wait(ts) if self.sync_push else 0

    cdef void shuffle(self, cell_t* cells, Py_ssize_t n) noexcept nogil:
        cdef cell_t kept
        cdef Py_ssize_t i, j
        for i in range(n - 1, 0, -1):
            j = <Py_ssize_t>below(&self.random, i + 1)
            kept = cells[i]
            cells[i] = cells[j]
            cells[j] = kept

    def train(self, cells, bint shuffle=True):
        """Train on these cells once, in random order or as they lie; 0, or the code of what went wrong."""
        cdef cell_t* at = cells_of(cells)
        cdef Py_ssize_t n = len(cells)
        cdef Py_ssize_t rc
        with nogil:
            if shuffle:
                self.shuffle(at, n)
            rc = self.update(at, n)
        return rc

    cdef Py_ssize_t keys_of(self, const cell_t* cells, Py_ssize_t n, Key* keys) noexcept nogil:
        """Write the keys of the columns of n cells that are not in this group yet, and those of their rows when these are not
        local anyway; return how many."""
        cdef Py_ssize_t count = 0, i
        cdef int32_t* row_stamps = self.stamps - self.row_begin
        cdef int32_t* col_stamps = self.stamps + (self.row_end - self.row_begin)
        for i in range(n):
            if col_stamps[cells[i].col] != self.stamp:
                col_stamps[cells[i].col] = self.stamp
                keys[count] = place_of(self.places, self.column_key + cells[i].col)
                count += 1
            if self.localize_rows and row_stamps[cells[i].row] != self.stamp:
                row_stamps[cells[i].row] = self.stamp
                keys[count] = place_of(self.places, cells[i].row)
                count += 1
        return count

    cdef Timestamp localize_group(self, const cell_t* cells, const int64_t* runs, Py_ssize_t n, Key* keys) noexcept nogil:
        """Localize what is needed for n runs of cells; keys: room for two per cell."""
        cdef Py_ssize_t count = 0, i
        if self.stamp == INT_MAX:
            for i in range(self.row_end - self.row_begin + self.num_cols):
                self.stamps[i] = 0
            self.stamp = 0
        self.stamp += 1
        for i in range(n):
            count += self.keys_of(cells + runs[2 * i], runs[2 * i + 1] - runs[2 * i], keys + count)
        return self.worker.localize(keys, count)

    def train_groups(self, cells, const int64_t[:, ::1] runs, const int64_t[::1] groups, Py_ssize_t steps):
        """Train on runs of cells (the first cell of each, and the one behind its last) in the order given.

        Group g are the runs groups[g] up to groups[g + 1]. What it needs is localized `steps` groups before it is its turn (0: not at
        all). Return as `train` does.
        """
        cdef cell_t* at = cells_of(cells)
        cdef Py_ssize_t n = len(groups) - 1, g, i, ahead = 0, rc = 0
        cdef Timestamp[::1] under_way = np.empty(steps + 1, dtype=np.int64)
        cdef Key[::1] keys
        cdef Timestamp ts
        if len(runs) == 0:
            return 0
        sizes = np.add.reduceat(np.diff(np.asarray(runs))[:, 0], np.asarray(groups)[:n])
        keys = np.empty(2 * sizes.max() if steps else 1, dtype=np.int64)
        with nogil:
            for g in range(n):
                while rc == 0 and steps > 0 and ahead < n and ahead <= g + steps:
                    ts = self.localize_group(at, &runs[groups[ahead], 0], groups[ahead + 1] - groups[ahead], &keys[0])
                    if ts < DONE:
                        rc = ts
                    under_way[ahead % (steps + 1)] = ts
                    ahead += 1
                if rc == 0 and steps > 0:
                    rc = self.worker.wait(under_way[g % (steps + 1)])
                i = groups[g]
                while rc == 0 and i < groups[g + 1]:
                    rc = self.update(at + runs[i, 0], runs[i, 1] - runs[i, 0])
                    i += 1
                if rc != 0 or self.out_of_time or self.budget == 0:
                    break
        return rc

    def shuffle_runs(self, cells, const int64_t[:, ::1] runs):
        """Put the cells of each run (its first cell, the one behind its last) into random order."""
        cdef cell_t* at = cells_of(cells)
        cdef Py_ssize_t n = len(runs), i
        with nogil:
            for i in range(n):
                self.shuffle(at + runs[i, 0], runs[i, 1] - runs[i, 0])

    # --- rows in bulk ----------------------------------------------------------------------------------------------------------------

    def localize(self, Key begin, Key end):
        """Localize a range of keys and wait; return as `train` does."""
        cdef Key key
        cdef Py_ssize_t n, rc = 0
        cdef Timestamp ts
        with nogil:
            while begin < end and rc == 0:
                n = 0
                while begin < end and n < BATCH:
                    self.keys[n] = self.places[begin] if self.places != NULL else begin
                    begin += 1
                    n += 1
                ts = self.worker.localize(self.keys, n)
                if ts < DONE:
                    rc = ts
            if rc == 0:
                rc = self.worker.waitall()
        return rc

    def set_random(self, Key begin, Key end, uint64_t seed, int64_t at, double largest=1.0):
        """Give the parameters of a range of keys their random start in (0, largest): rows `at` and following of the matrix of random
        numbers of this seed. Return as `train` does."""
        cdef Py_ssize_t n, i, rc = 0
        cdef bint double_precision = self.bytes == 8 * <size_t>self.rank
        cdef Timestamp ts
        with nogil:
            while begin < end and rc == 0:
                n = min(end - begin, BATCH)
                for i in range(n):
                    self.keys[i] = self.places[begin + i] if self.places != NULL else begin + i
                for i in range(n * self.rank):
                    if double_precision:
                        (<double*>self.buffer)[i] = largest * uniform(seed, at * self.rank + i)
                    else:
                        (<float*>self.buffer)[i] = <float>(largest * uniform(seed, at * self.rank + i))
                ts = self.worker.set(self.keys, n, self.buffer)
                if ts < DONE:
                    rc = ts
                begin += n
                at += n
            if rc == 0:
                rc = self.worker.waitall()
        return rc

    # --- loss ---------------------------------------------------------------------------------------------------------------------------

    def squares(self, cells, columns=None, int32_t first=0):
        """Return the sum of the squared residuals, or a code (below 0) of what went wrong. columns: the parameters of the columns
        from `first` on, as a matrix; without it they are pulled as they are needed."""
        cdef const cell_t* at = cells_of(cells)
        cdef Py_ssize_t n = len(cells), i = 0, k, m
        cdef const char* cols = NULL
        cdef const char* h
        cdef size_t width = self.bytes
        cdef double sum_ = 0, residual
        cdef int pieces = BATCH // 2
        cdef int rc = 0
        if columns is not None:
            cols = <const char*><size_t>columns.ctypes.data
        with nogil:
            while i < n and rc == 0:
                m = min(n - i, pieces)
                for k in range(m):
                    self.keys[k] = place_of(self.places, at[i + k].row)
                    self.keys[m + k] = place_of(self.places, self.column_key + at[i + k].col)
                rc = self.worker.wait(self.worker.pull(self.keys, m if cols != NULL else 2 * m, self.buffer))
                if rc == 0:
                    for k in range(m):
                        h = cols + (at[i + k].col - first) * width if cols != NULL else self.buffer + (m + k) * width
                        residual = at[i + k].value - self.arith.dot(self.buffer + k * width, h, self.rank)
                        sum_ += residual * residual
                i += m
        return sum_ if rc == 0 else rc

    def norms(self, Key begin, Key end):
        """Return the sum of the squares of the parameters of a range of keys, or a code (below 0) of what went wrong."""
        cdef Py_ssize_t n, i
        cdef double sum_ = 0
        cdef int rc = 0
        with nogil:
            while begin < end and rc == 0:
                n = min(end - begin, BATCH)
                for i in range(n):
                    self.keys[i] = self.places[begin + i] if self.places != NULL else begin + i
                rc = self.worker.wait(self.worker.pull(self.keys, n, self.buffer))
                if rc == 0:
                    for i in range(n):
                        sum_ += self.arith.dot(self.buffer + i * self.bytes, self.buffer + i * self.bytes, self.rank)
                begin += n
        return sum_ if rc == 0 else rc


# --- without a parameter server ----------------------------------------------------------------------------------------------------------

def train_arrays(cells, w, h, double eps, row_counts, col_counts, double regularization, uint64_t seed, bint shuffle=True,
                 int instructions=2):
    """One epoch of what `Trainer.train` does, on matrices `w` (rows x rank) and `h` (columns x rank): what the parameter server's
    share of the time is measured against, and what its results are compared with."""
    cdef cell_t* at = cells_of(cells)
    cdef bint double_precision = w.dtype == np.float64
    cdef const arithmetic_t* arith = arithmetic(double_precision, w.shape[1], instructions)
    cdef char* w0 = <char*><size_t>w.ctypes.data
    cdef char* h0 = <char*><size_t>h.ctypes.data
    cdef Py_ssize_t n = len(cells), i, j
    cdef int rank = w.shape[1]
    cdef size_t width = rank * (8 if double_precision else 4)
    cdef double eps2 = 2 * eps
    cdef float[::1] rows = (regularization / np.maximum(row_counts, 1)).astype(np.float32)
    cdef float[::1] cols = (regularization / np.maximum(col_counts, 1)).astype(np.float32)
    cdef cell_t kept
    cdef bint prefetching = w.nbytes + h.nbytes > CACHED
    if not (w.flags.c_contiguous and h.flags.c_contiguous and w.dtype == h.dtype):
        raise TypeError("w and h must be contiguous and of one type")
    with nogil:
        if shuffle:
            for i in range(n - 1, 0, -1):
                j = <Py_ssize_t>below(&seed, i + 1)
                kept = at[i]
                at[i] = at[j]
                at[j] = kept
        for i in range(n):
            if prefetching and i + ARRAYS_AHEAD < n:
                prefetch(w0 + at[i + ARRAYS_AHEAD].row * width, width)
                prefetch(h0 + at[i + ARRAYS_AHEAD].col * width, width)
            arith.step(w0 + at[i].row * width, h0 + at[i].col * width, rank, at[i].value, eps2,
                       <float>eps2 * rows[at[i].row], <float>eps2 * cols[at[i].col])
