# Design: the inner loop of test_consistency, on the C level of Lapse and without the GIL, and the checks of what a worker reads.
#
# Number c of every value counts the pushes of worker c. A read is checked when it has finished, in the order in which the
# reads were issued; the ring of operations in flight is also this order. Reads of one call are not ordered among themselves.
# Nothing here is shared between threads.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from lapse cimport Key, Worker
from lapse._sync cimport load_i32
from lapse._types cimport DONE, Timestamp

import numpy as np


cdef class Observer:
    """What one worker reads: checked at once, and kept for the comparison with what the others have read.

    `own` has this worker's pushes per key. Up to `keep` reads that differ from the one before them are kept; if there are more,
    only every second, every fourth, … of them.
    """
    cdef:
        readonly int me, workers, hot
        readonly int64_t reads      # checked reads of a key
        readonly int64_t missing    # reads in which the own number was not the number of own pushes
        readonly int64_t back       # reads that were older than one before
        readonly int64_t first_key  # of the first wrong read; -1: none
        readonly object own         # int64 array, one entry per hot key
        int64_t[::1] own_view
        int64_t[:, ::1] last        # the newest read of each key
        uint32_t[:, ::1] rows       # kept reads and their keys
        uint32_t[::1] keys
        object rows_array, keys_array
        int64_t kept, offered, stride

    def __init__(self, int me, int workers, int hot, int64_t keep):
        self.me, self.workers, self.hot = me, workers, hot
        self.first_key = -1
        self.own = np.zeros(hot, dtype=np.int64)
        self.own_view = self.own
        self.last = np.zeros((hot, workers), dtype=np.int64)
        self.rows_array = np.empty((max(keep, 2), workers), dtype=np.uint32)
        self.keys_array = np.empty(max(keep, 2), dtype=np.uint32)
        self.rows, self.keys = self.rows_array, self.keys_array
        self.stride = 1

    def views(self):
        """Return the keys and the values of the kept reads."""
        return self.keys_array[:self.kept], self.rows_array[:self.kept]

    def observe(self, const Key[::1] keys, const int64_t[::1] own, const int64_t[:, ::1] vals):
        """Check the reads of one call; `own` has the own pushes of each key when the call was made."""
        if not (len(keys) == len(own) == len(vals) and vals.shape[1] == self.workers):
            raise ValueError("one row of values and one count for each key")
        if len(keys):
            self.see(&keys[0], &own[0], &vals[0, 0], len(keys))

    cdef void see(self, const Key* keys, const int64_t* own, const int64_t* vals, Py_ssize_t n) noexcept nogil:
        cdef Py_ssize_t i
        cdef int c
        cdef bint wrong, new
        cdef Key key
        cdef const int64_t* row
        for i in range(n):
            key, row = keys[i], vals + i * self.workers
            wrong = False
            if row[self.me] != own[i]:
                self.missing += 1
                wrong = True
            for c in range(self.workers):
                if row[c] < self.last[key, c]:
                    self.back += 1
                    wrong = True
                    break
            if wrong and self.first_key < 0:
                self.first_key = key
        for i in range(n):
            key, row = keys[i], vals + i * self.workers
            new = False
            for c in range(self.workers):
                if row[c] != self.last[key, c]:
                    new = True
                if row[c] > self.last[key, c]:
                    self.last[key, c] = row[c]
            if new:
                self.keep(key, row)
        self.reads += n

    cdef void keep(self, Key key, const int64_t* row) noexcept nogil:
        cdef int64_t i
        cdef int c
        self.offered += 1
        if self.offered % self.stride:
            return
        if self.kept == self.rows.shape[0]:
            self.kept //= 2
            self.stride *= 2
            for i in range(self.kept):
                self.keys[i] = self.keys[2 * i]
                for c in range(self.workers):
                    self.rows[i, c] = self.rows[2 * i, c]
        self.keys[self.kept] = <uint32_t> key
        for c in range(self.workers):
            self.rows[self.kept, c] = <uint32_t> row[c]
        self.kept += 1


cdef struct slot_t:             # an operation in flight
    Timestamp ts                # DONE: finished already
    Py_ssize_t n                # keys to check when it has finished; 0: nothing was read
    Key* keys                   # owned, room for `batch`
    int64_t* own                # owned, the same
    int64_t* vals               # owned, a row for each


cdef struct mix_t:              # percent of the calls; the rest are pulls
    int push, localize, storm, in_place, if_local, sync


cdef inline uint64_t draw(uint64_t* state, uint64_t below) noexcept nogil:
    """xorshift64*: a number in [0, below), below < 2**32."""
    cdef uint64_t x = state[0]
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    state[0] = x
    return ((x * 0x2545F4914F6CDD1DULL) >> 32) % below


cdef inline int settle(Worker kv, Observer observer, slot_t* slot) noexcept nogil:
    """Wait for the operation and check what it has read; 0 or an error code."""
    cdef int code
    if slot.ts != DONE:
        code = kv.wait(slot.ts)
        if code != 0:
            return code
    observer.see(slot.keys, slot.own, slot.vals, slot.n)
    slot.ts, slot.n = DONE, 0
    return 0


cdef int in_place(Worker kv, Observer observer, slot_t* slot, Py_ssize_t n, const int64_t* one) noexcept nogil:
    """Read and update the local ones of n <= 2 keys where they are; 0 or an error code."""
    cdef void* rows[2]
    cdef Key wanted[2]
    cdef Py_ssize_t i
    cdef uint32_t changed = 0
    cdef int code
    for i in range(n):
        wanted[i] = slot.keys[i]
    code = kv.acquire(wanted, <int> n, rows)
    if code < 0:
        return code
    slot.n = 0
    for i in range(n):
        if rows[i] != NULL:
            slot.keys[slot.n] = wanted[i]
            slot.own[slot.n] = observer.own_view[wanted[i]]
            memcpy(slot.vals + slot.n * observer.workers, rows[i], observer.workers * sizeof(int64_t))
            slot.n += 1
    for i in range(n):
        if rows[i] != NULL:
            (<int64_t*> rows[i])[observer.me] += 1
            observer.own_view[wanted[i]] += 1
            changed |= <uint32_t> 1 << i
    return kv.release(changed)


cdef int loop(Worker kv, Observer observer, slot_t* ring, int window, int batch, int64_t reads, uint64_t* random,
              mix_t mix, const int64_t* ones, int32_t* racing) noexcept nogil:
    """Issue operations until so many keys have been read and `racing` (NULL: nobody) is 0; 0 or an error code."""
    cdef int64_t calls = 0, issued = 0
    cdef Py_ssize_t i, n
    cdef int code, dice, localize
    cdef slot_t* slot
    while issued < reads or (racing != NULL and load_i32(racing) > 0):
        slot = ring + calls % window
        code = settle(kv, observer, slot)
        if code != 0:
            return code
        n = 1 + <Py_ssize_t> draw(random, batch)
        for i in range(n):
            slot.keys[i] = <Key> draw(random, observer.hot)
        # A storm: for 256 calls of 2,048 the keys fly.
        localize = mix.storm if (calls >> 8) % 8 == 7 else mix.localize
        dice = <int> draw(random, 100)
        if dice < localize:
            slot.ts = kv.localize(slot.keys, n)
        elif dice < localize + mix.push:
            slot.ts = kv.push(slot.keys, n, ones)
            if slot.ts >= DONE:
                for i in range(n):
                    observer.own_view[slot.keys[i]] += 1
        elif dice < localize + mix.push + mix.in_place:
            code = in_place(kv, observer, slot, n if n < 2 else 2, ones)
            if code < 0:
                return code
        else:
            for i in range(n):
                slot.own[i] = observer.own_view[slot.keys[i]]
            if dice < localize + mix.push + mix.in_place + mix.if_local:
                code = kv.pull_if_local(slot.keys, n, slot.vals)
                if code < 0:
                    return code
                slot.n = n if code == 1 else 0
            else:
                slot.ts = kv.pull(slot.keys, n, slot.vals)
                slot.n = n
            issued += slot.n
        if slot.ts < DONE:
            code = <int> slot.ts
            slot.ts, slot.n = DONE, 0
            return code
        if draw(random, 100) < <uint64_t> mix.sync:
            for i in range(window):     # oldest first
                code = settle(kv, observer, ring + (calls + 1 + i) % window)
                if code != 0:
                    return code
        calls += 1
    for i in range(window):
        code = settle(kv, observer, ring + (calls + i) % window)
        if code != 0:
            return code
    return 0


def run(Worker kv not None, Observer observer not None, int64_t reads, int window, int batch, uint64_t seed, *,
        int push=25, int localize=4, int storm=50, int in_place=5, int if_local=5, int sync=2, int32_t[::1] racing=None):
    """Run a worker until it has read so many keys, and racing[0], if there is one, is 0; 0 or an error code.

    At most `window` operations of up to `batch` keys are in flight. The rest are percent of the calls; `storm` is that of
    localizes for an eighth of the time, `sync` how often everything in flight is waited for.
    """
    if window < 1 or batch < 1 or storm + push + in_place + if_local > 100:
        raise ValueError("window and batch are at least 1, the mix at most 100 %")
    cdef mix_t mix = mix_t(push, localize, storm, in_place, if_local, sync)
    cdef uint64_t random = (seed * 0x9E3779B97F4A7C15ULL) ^ 0x853C49E6748FEA9BULL
    cdef int code, i
    cdef int32_t* others = NULL if racing is None else &racing[0]
    cdef slot_t* ring = <slot_t*> calloc(window, sizeof(slot_t))
    cdef Key* keys = <Key*> calloc(<size_t> window * batch, sizeof(Key))
    cdef int64_t* own = <int64_t*> calloc(<size_t> window * batch, sizeof(int64_t))
    cdef int64_t* vals = <int64_t*> calloc(<size_t> window * batch * observer.workers, sizeof(int64_t))
    cdef int64_t* ones = <int64_t*> calloc(<size_t> batch * observer.workers, sizeof(int64_t))
    try:
        if not (ring and keys and own and vals and ones):
            raise MemoryError
        if random == 0:
            random = 1
        for i in range(batch):
            ones[i * observer.workers + observer.me] = 1
        for i in range(window):
            ring[i].ts = DONE
            ring[i].keys = keys + <Py_ssize_t> i * batch
            ring[i].own = own + <Py_ssize_t> i * batch
            ring[i].vals = vals + <Py_ssize_t> i * batch * observer.workers
        with nogil:
            code = loop(kv, observer, ring, window, batch, reads, &random, mix, ones, others)
        if code != 0:
            vals = NULL             # leaked: pulls that have not finished may still write to it
        return code
    finally:
        free(ring)
        free(keys)
        free(own)
        free(vals)
        free(ones)
