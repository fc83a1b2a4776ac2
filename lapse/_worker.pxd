"""The primitives at C level: `from lapse cimport Worker, Key`.

Every method is nogil. keys is an array of n keys; vals holds the values of these keys one after the other, in the
number type of the server. A Timestamp result is >= 0 (to wait for), DONE (-1, finished already) or an ERR_ code (<= -2, see
_types.pxd: nothing was sent then). One thread at a time uses a Worker.

push and set have copied vals and keys when they return. The arrays of a pull belong to the operation until it has finished.
"""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from lapse._protocol cimport Protocol, worker_t
from lapse._sampling cimport Sampler
from lapse._store cimport OWNED, latch_slot
from lapse._sync cimport load_i32, load_i64, peek_u64, prefetch_read, prefetch_write, store_u64, unlikely
from lapse._types cimport Key, Timestamp
from lapse._van cimport Van


# Release what an acquire of this worker still holds (its Worker is gone).
cdef void drop_latches(Protocol protocol, worker_t* w) noexcept nogil


cdef class Worker:
    cdef:
        worker_t* w             # borrowed from protocol; NULL before attach()
        Protocol protocol
        Van van
        object server           # lapse.Server; the node keeps its weak references
        readonly int index      # of the worker in its node
        readonly object buffers # {timestamp: arrays} of the Python face's operations under way
        public object signal    # what a signal handler raised while this worker waited; the Python face raises it on
        readonly object draw_error  # what the distribution's callable has raised, of the last C-level call that returned ERR_DRAW
        int64_t credit_bytes    # what may be under way at once
        int64_t patience        # nanoseconds for which a primitive waits for credit, then ERR_TIMEOUT; below 0: for ever
        Sampler sampler         # None: sampling has not been enabled
    # Asynchronous primitives. They block only while the worker's credit is used up.
    cdef Timestamp pull(self, const Key* keys, Py_ssize_t n, void* vals) noexcept nogil
    cdef Timestamp push(self, const Key* keys, Py_ssize_t n, const void* vals) noexcept nogil
    cdef Timestamp set(self, const Key* keys, Py_ssize_t n, const void* vals) noexcept nogil
    cdef Timestamp localize(self, const Key* keys, Py_ssize_t n) noexcept nogil
    # 0 when the operation has finished, or an ERR_ code. Blocking; Ctrl-C ends it with ERR_INTERRUPTED.
    cdef int wait(self, Timestamp ts) noexcept nogil
    cdef int wait_for(self, Timestamp ts, int64_t nanoseconds) noexcept nogil      # nanoseconds < 0: for ever; ERR_TIMEOUT
    cdef int waitall(self) noexcept nogil
    cdef int waitall_for(self, int64_t nanoseconds) noexcept nogil
    # 1 finished, 0 not yet, or an ERR_ code.
    cdef int is_finished(self, Timestamp ts) noexcept nogil
    # 1 and vals filled when every key was local, 0 and vals undefined when not, or an ERR_ code. Never sends.
    cdef int pull_if_local(self, const Key* keys, Py_ssize_t n, void* vals) noexcept nogil
    cdef bint is_local(self, Key key) noexcept nogil
    # In place: rows[i] points to the stored values of keys[i], latched, or is NULL where the key is not local; the
    # number of local keys, or an ERR_ code. n <= ACQUIRE_MAX. Until release: arithmetic only, under 10 microseconds; any other
    # call of this Worker returns ERR_HELD. Bit i of `changed` counts a push of keys[i].
    cdef int acquire(self, const Key* keys, int n, void** rows) noexcept nogil
    cdef int release(self, uint32_t changed) noexcept nogil
    # Sampling, see docs/api.md. prepare_sample: a handle >= 0 for n draws, or an ERR_ code; does not block. draw_sample: the next n
    # draws of a handle, their keys only: 0, or an ERR_ code and nothing drawn; the pool scheme blocks while the pool is empty.
    # pull_sample: draw_sample, and a pull of what was drawn. finish_sample: the rest is given up; 0, also when it was used up, or
    # ERR_SAMPLE.
    cdef int64_t prepare_sample(self, int64_t n) noexcept nogil
    cdef int draw_sample(self, int64_t handle, Key* keys, Py_ssize_t n) noexcept nogil
    cdef Timestamp pull_sample(self, int64_t handle, Key* keys, Py_ssize_t n, void* vals) noexcept nogil
    cdef int finish_sample(self, int64_t handle) noexcept nogil
    # Blocks until every worker slot of every node has come (takes the GIL); 0 or an ERR_ code.
    cdef int barrier(self) noexcept nogil
    cdef Py_ssize_t value_length(self, Key key) noexcept nogil         # visible numbers of a key
    cdef Key num_keys(self) noexcept nogil
    # --- private ---
    # The one way in for all primitives; kind is an OpKind.
    cdef Timestamp issue(self, int kind, const Key* keys, Py_ssize_t n, void* vals) noexcept nogil
    cdef size_t credit_of(self, int kind, const Key* keys, const uint32_t* positions, Py_ssize_t m) noexcept nogil
    cdef bint reached(self, int what, int64_t arg) noexcept nogil
    cdef int block(self, int what, int64_t arg, int64_t nanoseconds_left) noexcept nogil
    cdef bint pause_for(self, Timestamp ts) noexcept nogil
    cdef bint interrupted(self) noexcept nogil
    # 1 when vals has been filled with the values of keys that were drawn and are here (keys that have left are drawn anew); else 0, or
    # an ERR_ code.
    cdef int pull_drawn(self, Key* keys, Py_ssize_t n, void* vals) noexcept nogil
    cdef void localize_ahead(self, const Key* keys, Py_ssize_t n) noexcept nogil
    cdef int await_pool(self, int64_t deadline) noexcept nogil
    cdef int sample_error(self, int code) noexcept nogil


# --- in place on two rows, inlined into the caller's loop -------------------------------------------------------------------------------
# acquire() of two keys and release(3) of both, for loops in which the call would cost more than the arithmetic; and hints for the
# processor, which do nothing for a key that is not local: first the key's slot, some positions later its row.
#
#     if look(worker, &sight):                  every thousand pairs, and after each other call of the worker
#         if acquire_two(&sight, a, b, &two):
#             ...                               arithmetic only, under 10 microseconds
#             release_two(&two)
#         count_pairs(&sight, how many)
#
# What a locked instruction is followed by has to wait for it. So all that these need is looked up before the loop and lies in local
# variables of the caller, which the compiler keeps in registers; behind the latches nothing is read but the rows.

cdef struct sight_t:            # what acquire_two has to know of a worker and its store
    worker_t* w
    uint64_t* slots
    Key num_keys                # 0: nothing can be had in place

cdef struct two_rows_t:         # what acquire_two holds
    void* row[2]
    uint64_t* slot[2]
    uint64_t word[2]


cdef inline bint look(Worker self, sight_t* sight) noexcept nogil:
    """Look up what the others need; 0 when nothing can be had in place now (the job has failed, shared_memory is off, operations by a
    guessed route are unanswered): then acquire_two always fails, and the hints must not be used."""
    cdef worker_t* w = self.w
    sight.w, sight.slots, sight.num_keys = w, NULL, 0
    if (w == NULL or not self.protocol.shared_memory or load_i32(&self.van.state) != 0 or w.held != 0
            or load_i64(&w.pins.cached) != 0):
        return False
    sight.slots, sight.num_keys = self.protocol.store.slots, self.protocol.store.num_keys
    return True


cdef inline bint acquire_two(const sight_t* sight, Key a, Key b, two_rows_t* two) noexcept nogil:
    """Latch the rows of two different keys that are both here; 0, and nothing is held, when that is not to be had."""
    if unlikely(<uint64_t>a >= <uint64_t>sight.num_keys or <uint64_t>b >= <uint64_t>sight.num_keys or a == b):
        return False
    two.slot[0] = sight.slots + a
    two.slot[1] = sight.slots + b
    if a < b:
        two.word[0] = latch_slot(two.slot[0])
        two.word[1] = latch_slot(two.slot[1])
    else:
        two.word[1] = latch_slot(two.slot[1])
        two.word[0] = latch_slot(two.slot[0])
    if unlikely(not (two.word[0] & two.word[1] & OWNED) or (two.word[0] | two.word[1]) >> 63):
        release_two(two)
        return False
    two.row[0] = <void*>(two.word[0] & ~<uint64_t>7)
    two.row[1] = <void*>(two.word[1] & ~<uint64_t>7)
    return True


cdef inline void release_two(const two_rows_t* two) noexcept nogil:
    """Give back what acquire_two has latched."""
    store_u64(two.slot[0], two.word[0])
    store_u64(two.slot[1], two.word[1])


cdef inline void count_pairs(const sight_t* sight, int64_t pairs) noexcept nogil:
    """Count both rows of so many acquire_two as pulled and pushed here."""
    if pairs > 0:
        sight.w.counters.pulled_local += 2 * pairs
        sight.w.counters.pushed_local += 2 * pairs


cdef inline void prefetch_slot(const sight_t* sight, Key key) noexcept nogil:
    """Have the key's slot in the cache soon. The key must exist."""
    prefetch_read(sight.slots + key)


cdef inline void prefetch_row(const sight_t* sight, Key key, size_t bytes) noexcept nogil:
    """Have the first bytes of the key's row in the cache soon, if it is here. The key must exist."""
    cdef uint64_t word = peek_u64(sight.slots + key)
    cdef char* row = <char*>(word & ~<uint64_t>7)
    cdef size_t at = 0
    if not word & OWNED or word >> 63:
        return
    while at < bytes:
        prefetch_write(row + at)
        at += 64
    prefetch_write(row + bytes - 1)
