"""The store's loops and their rivals on raw pointers, for benchmarks/local.py: many calls per timing, no Python between them."""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from lapse._store cimport (
    LATCH, OWNED, latch, pull_rows, push_rows, row_of, set_rows, store_free, store_new, store_t, unlatch)
from lapse._sync cimport nanoseconds, peek_u64, prefetch_read
from lapse._types cimport Key


cdef enum:
    SLOT_AHEAD = 24
    ROW_AHEAD = 12
    NEAR_BYTES = 2048


cdef class Table:
    """A store of one node that has all keys, float32."""
    cdef store_t* store         # owned
    cdef uint32_t* misses       # owned
    cdef readonly Key num_keys
    cdef readonly size_t length

    def __cinit__(self, Key num_keys, size_t length, bint touch=True):
        cdef Key key
        cdef uint64_t word
        self.num_keys = num_keys
        self.length = length
        self.store = store_new(num_keys, 0, num_keys, 0, length, length, NULL, NULL)
        self.misses = <uint32_t*>malloc((1 << 20) * sizeof(uint32_t))
        if self.store == NULL or self.misses == NULL:
            raise MemoryError
        if touch:
            for key in range(num_keys):
                word = latch(self.store, key)
                row_of(self.store, key, &word)
                unlatch(self.store, key, word)

    def __dealloc__(self):
        store_free(self.store)
        free(self.misses)

    def pull(self, const Key[::1] keys, float[::1] vals):
        with nogil:
            pull_rows(self.store, &keys[0], keys.shape[0], &vals[0], self.misses)

    def push(self, const Key[::1] keys, const float[::1] vals):
        with nogil:
            push_rows(self.store, &keys[0], keys.shape[0], &vals[0], self.misses)

    def run(self, str what, const Key[:, ::1] keys, float[::1] vals):
        """One call per row of `keys`; returns nanoseconds for all of them."""
        cdef Py_ssize_t n = keys.shape[1], i
        cdef int kind = ("pull", "push", "set", "pull without latches").index(what)
        cdef int64_t start
        with nogil:
            start = nanoseconds()
            for i in range(keys.shape[0]):
                if kind == 0:
                    pull_rows(self.store, &keys[i, 0], n, &vals[0], self.misses)
                elif kind == 1:
                    push_rows(self.store, &keys[i, 0], n, &vals[0], self.misses)
                elif kind == 2:
                    set_rows(self.store, &keys[i, 0], n, &vals[0], self.misses)
                else:
                    pull_unlatched(self.store, &keys[i, 0], n, <char*>&vals[0], self.misses)
        return nanoseconds() - start

    def run_single(self, str what, const Key[::1] keys, float[::1] vals):
        """One call per key."""
        cdef Py_ssize_t i
        cdef int64_t start
        cdef bint pull = what == "pull"
        with nogil:
            start = nanoseconds()
            for i in range(keys.shape[0]):
                if pull:
                    pull_rows(self.store, &keys[i], 1, &vals[0], self.misses)
                else:
                    push_rows(self.store, &keys[i], 1, &vals[0], self.misses)
        return nanoseconds() - start


cdef Py_ssize_t pull_unlatched(store_t* s, const Key* keys, Py_ssize_t n, char* vals, uint32_t* misses) noexcept nogil:
    """What the product's loop does, but for the latches."""
    cdef Py_ssize_t i, missed = 0
    cdef size_t bytes = s.uniform_visible, at
    cdef size_t near = min(bytes, <size_t>NEAR_BYTES)
    cdef uint64_t word
    cdef const char* row
    for i in range(n):
        if i + SLOT_AHEAD < n:
            prefetch_read(s.slots + keys[i + SLOT_AHEAD])
        if i + ROW_AHEAD < n:
            row = <const char*><size_t>(peek_u64(s.slots + keys[i + ROW_AHEAD]) & ~<uint64_t>7)
            at = 0
            while at < near:
                prefetch_read(row + at)
                at += 64
        word = peek_u64(s.slots + keys[i])
        if word & OWNED and not word & LATCH:
            memcpy(vals, <const char*><size_t>(word & ~<uint64_t>7), bytes)
        else:
            misses[missed] = <uint32_t>i
            missed += 1
        vals += bytes
    return missed
