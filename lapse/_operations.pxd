"""A worker's operations under way, and its scratch memory.

Design: each worker has a ring of operations; timestamp t lives at t & mask, and is issued only when the one before it in that place has
finished. So bookkeeping never grows, a timestamp is found in O(1), and the ring's size is the worker's credit in operations. `remaining`
reaching 0 is the one sign that an operation has finished; whoever takes it there must not touch the op_t afterwards, since the
worker may use its place again at once.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from lapse._pins cimport pins_t
from lapse._sync cimport load_i64
from lapse._types cimport ACQUIRE_MAX, Key, Rank, Timestamp

cdef struct op_t:
    Timestamp ts                # atomic; the operation that this place of the ring serves; -1: none yet
    int64_t remaining           # atomic; positions not done yet, + 1 while it is being issued
    char* vals                  # borrowed from the caller: where a pull puts its values
    uint64_t* offsets           # owned; n + 1 byte offsets of the positions in vals, when lengths differ per key
    Py_ssize_t offsets_room
    uint8_t* under_way          # owned; atomic, by position: 1 while messages carry it, so that it can be answered once (not for localize)
    Py_ssize_t under_way_room
    Py_ssize_t n
    size_t credit               # bytes charged to the worker
    int kind                    # OpKind

cdef struct counters_t:         # positions (keys), by where they were found; written by one thread
    int64_t pulled_local, pulled_queued, pulled_remote
    int64_t pushed_local, pushed_queued, pushed_remote
    int64_t set_local, set_queued, set_remote
    int64_t localized_local, localized_queued, localized_remote
    # sampling, see _sampling.pyx
    int64_t sampled             # draws handed out
    int64_t sample_fallbacks    # of them, those that the scheme could not serve: nothing (more) was local, or the pool had only repetitions
    int64_t sample_postponed    # draws that were not local and went to the end of their handle
    int64_t pool_refills        # groups that arrived; the pool's own worker
    int64_t pool_waits          # how often a worker waited for the pool

cdef struct worker_t:
    uint32_t index              # of the worker in its node
    int32_t busy                # atomic; a Python call is under way (a Worker belongs to one thread)
    op_t* ops                   # owned; ring of mask + 1
    int64_t mask
    Timestamp next_ts
    uint32_t event              # atomic; bumped whenever an operation finishes
    uint32_t sleeping           # atomic; 1 while the worker sleeps on `event`
    int spin_misses             # waits in a row that looked on in vain; the worker's thread only
    int spin_skips              # waits to come that do not look on
    int64_t open_ops            # atomic; unfinished operations
    int64_t open_bytes          # atomic; what they are charged
    counters_t counters
    pins_t pins                 # the cache rule
    # scratch of the thread that issues, owned; `room` positions
    Py_ssize_t room
    uint32_t* misses
    uint32_t* chain
    uint64_t* offsets           # room + 1
    Key* seen                   # a hash table of keys, see seen_clear; seen_room places
    Py_ssize_t seen_room
    Rank* order                 # num_nodes entries each
    int64_t* heads
    int64_t* tails
    # in-place access
    void* holder                # the Worker that has this slot; only compared; under the GIL
    int held                    # keys of the acquire that is open
    Key held_keys[ACQUIRE_MAX]  # the local ones, sorted, each once
    uint64_t held_words[ACQUIRE_MAX]
    int held_rows
    int held_order[ACQUIRE_MAX]


cdef inline bint op_finished(worker_t* w, Timestamp ts) noexcept nogil:
    """Has an operation that this worker issued finished?"""
    cdef op_t* op = w.ops + (ts & w.mask)
    return load_i64(&op.ts) != ts or load_i64(&op.remaining) == 0


cdef inline int chain_to(worker_t* w, Rank dest, int64_t i, int num_dests) noexcept nogil:
    """Append position i to those for `dest`; returns the number of destinations, in w.order by their first position."""
    if w.heads[dest] < 0:
        w.heads[dest] = i
        w.order[num_dests] = dest
        num_dests += 1
    else:
        w.chain[w.tails[dest]] = <uint32_t>i
    w.tails[dest] = i
    return num_dests


cdef worker_t* worker_new(uint32_t index, int64_t credit_ops, Rank num_nodes) noexcept nogil   # NULL: out of memory
cdef void worker_free(worker_t*) noexcept nogil
cdef int ensure_room(worker_t*, Py_ssize_t n) noexcept nogil                     # scratch for n positions: 0 or ERR_MEMORY
cdef int ensure_offsets(op_t*, Py_ssize_t n) noexcept nogil                      # 0 or ERR_MEMORY
cdef int ensure_under_way(op_t*, Py_ssize_t n) noexcept nogil                    # 0 or ERR_MEMORY; before the operation is open
# These positions, which exist, are not under way any more. False, and nothing has changed: one was not, or is named twice. Server thread only.
cdef bint end_way(op_t*, const uint32_t* positions, Py_ssize_t n) noexcept nogil
# Which keys have been seen, of at most n: start with none; 0 or ERR_MEMORY. Then, of each: has it been seen before?
cdef int seen_clear(worker_t*, Py_ssize_t n) noexcept nogil
cdef bint seen_before(worker_t*, Key key) noexcept nogil
# The first position whose key was there before; -1: all differ; ERR_MEMORY. Uses the table of keys.
cdef Py_ssize_t first_repeated(worker_t*, const Key* keys, Py_ssize_t n) noexcept nogil
