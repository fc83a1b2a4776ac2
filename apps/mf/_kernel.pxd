"""The cells of a matrix as they lie in memory and in the cache file; and the training loop of one worker."""
from libc.stdint cimport int32_t, int64_t, uint64_t

from apps.mf._arithmetic cimport arithmetic_t
from lapse cimport Key, Timestamp, Worker

ctypedef packed struct cell_t:
    int32_t row                 # from 0
    int32_t col
    double value


cdef class Trainer:
    cdef:
        Worker worker
        const arithmetic_t* arith
        int rank
        size_t bytes            # of a row
        int32_t row_begin, row_end, num_cols
        Key column_key          # of column 0
        const Key* places       # where each key is; NULL: where it is
        float* row_shrink       # owned; lambda / cells of the row, this worker's rows only
        float* col_shrink       # owned; lambda / cells of the column
        char* buffer            # owned; BATCH rows
        Key* keys               # owned; room for the keys of a batch
        int32_t* stamps         # owned; per row and column: the group in which it was seen last
        int32_t stamp
        uint64_t random         # state
        double eps2             # twice the step size
        int64_t deadline        # nanoseconds, CLOCK_MONOTONIC
        int64_t budget          # points that may still be trained on in this epoch
        bint sync_push, localize_rows
        readonly int64_t trained        # points of this epoch
        readonly bint out_of_time
        object held             # what pointers point into
    cdef Py_ssize_t update(self, const cell_t* cells, Py_ssize_t n) noexcept nogil
    cdef int update_far(self, const cell_t* cell, double shrink_w, double shrink_h) noexcept nogil
    cdef Py_ssize_t keys_of(self, const cell_t* cells, Py_ssize_t n, Key* keys) noexcept nogil
    cdef Timestamp localize_group(self, const cell_t* cells, const int64_t* runs, Py_ssize_t n, Key* keys) noexcept nogil
    cdef void shuffle(self, cell_t* cells, Py_ssize_t n) noexcept nogil
