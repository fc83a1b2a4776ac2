"""Issuing and routing: where the positions of a call or of a message go."""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from lapse._node_state cimport NodeState
from lapse._operations cimport op_t, worker_t
from lapse._store cimport store_t
from lapse._types cimport Epoch, Key, Rank, Timestamp

cdef enum Fault:                # seeded protocol bugs, for the tests that show that the tests find them
    FAULT_SPLIT_ROUTE = 1       # route and enqueue are two steps: nothing is re-checked under the channel's lock
    FAULT_NO_CACHE_RULE = 2     # a worker with an unanswered operation by a cached route may change its route
    FAULT_LATE_DIRECTORY = 4    # home moves its directory entry a few messages after LOCALIZE, not on receipt
    FAULT_NO_QUEUE = 8          # an operation that meets a key in transfer is forwarded instead of queued
    FAULT_DROP_QUEUE = 16       # noting a next owner forgets the queued operations
    FAULT_NO_NEXT = 32          # a HAND_OVER that meets a key in transfer is ignored
    FINE_STEPS = 64             # no bug: calls Sink.step wherever another thread may come in between
    FAULT_LOST_UPDATE = 128     # a TRANSFER has the value of a moment before its first key leaves
    FAULT_CACHE_FORWARD = 256   # the server thread forwards to the owner that the location cache names
    FAULT_OVERWRITE_NEXT = 512  # FAULT_LATE_DIRECTORY, and a second next owner takes the place of the first
    FAULT_NO_COPY = 1024        # a worker's queued push or set is read out of its array when the key comes
    FAULT_EARLY_ROW = 2048      # a key that comes can be used before its queue is applied
    FAULT_OLD_EPOCH = 4096      # a key that is passed on keeps its epoch
    FAULT_REVERSE_QUEUE = 8192  # queued operations are applied last first
    FAULT_STALE_HOME = 16384    # home does not look again at its directory under the channel's lock
    FAULT_QUEUE_LOST = 32768    # a key is passed on as it came, without what waited for it


cdef enum Violation:            # what handle() found wrong; see VIOLATIONS in _protocol.pyx
    FINE = 0
    BAD_SIZE = -100
    BAD_TYPE = -101
    BAD_KEY = -102
    BAD_ORIGIN = -103
    BAD_HOME = -104             # LOCALIZE at a node that is not the key's home
    OWNER_ASKS = -105           # LOCALIZE of a node that owns the key already
    NOT_HERE = -106             # HAND_OVER at a node that neither has the key nor waits for it
    SECOND_NEXT = -107          # HAND_OVER of a key in transfer that has a next owner already
    NOT_COMING = -108           # TRANSFER of a key that was not asked for
    BAD_EPOCH = -109            # an epoch that is not the one to come
    TOO_MANY_HOPS = -110
    BAD_ANSWER = -111           # an answer to no open operation, or to a position it does not have
    NO_MEMORY = -112
    SEND_FAILED = -113
    BAD_FIELD = -114            # a field of the header that this kind of message does not have
    TWICE = -115                # a key that is twice in one relocation message


cdef struct batch_t:            # positions of one call, or of one message, on their way
    int kind                    # OpKind
    Rank origin
    uint32_t worker
    Timestamp ts
    int hops
    bint own                    # issued by the calling worker thread; else the server thread handles a message
    bint to_server              # shared_memory off: everything goes through the node's own channel
    bint counted                # belongs in this node's statistics
    bint caches                 # the cache rule applies
    worker_t* w                 # whose scratch is used: the worker's, or the server thread's
    op_t* op                    # own: where a pull puts its values
    const Key* keys
    const uint32_t* positions   # in the caller's arrays; NULL: entry i is position i
    char* vals                  # pull by the own worker: destination; push, set: source; else NULL
    const uint64_t* offsets     # of the entries in vals; NULL: all values are equally long
    int64_t done                # positions done on the spot
    int64_t now                 # when a localize of the call was first sent; 0: not yet


cdef void value_offsets(const store_t* s, const Key* keys, Py_ssize_t n, uint64_t* offsets) noexcept nogil


cdef class Router(NodeState):
    # Issue an operation; the caller has checked the keys, tried the local fast path, and taken the credit. Positions
    # todo[0..m) of the call are not done yet. 0, or ERR_MEMORY, ERR_FAILED. One thread per worker; never blocks, but for channel locks.
    cdef int issue(self, worker_t* w, int kind, const Key* keys, Py_ssize_t n, void* vals, uint32_t* todo, Py_ssize_t m,
                   size_t credit, Timestamp* ts) noexcept nogil

    # The key has an unanswered operation of this worker that went by a cached route.
    cdef bint is_pinned(self, worker_t* w, Key key) noexcept nogil

    # for Protocol
    cdef int blame(self, int violation, Key key, Epoch epoch) noexcept nogil
    cdef void complete(self, worker_t* w, Timestamp ts, int64_t count) noexcept nogil
    cdef void between(self) noexcept nogil
    cdef int route(self, batch_t* b, uint32_t* todo, Py_ssize_t m) noexcept nogil
    cdef int emit(self, batch_t* b, Rank dest, int kind, int64_t head, bint homed) noexcept nogil
    cdef void move_owner(self, Key key, Rank owner, Epoch epoch) noexcept nogil
    cdef void settle_late(self) noexcept nogil
    # private to _routing.pyx
    cdef int settle(self, batch_t* b, Py_ssize_t i) noexcept nogil
    cdef int recheck(self, batch_t* b, Py_ssize_t i, Rank dest) noexcept nogil
    cdef int pinned_go(self, batch_t* b, Key key, Rank dest) noexcept nogil
    cdef Rank destination(self, batch_t* b, Key key) noexcept nogil
    cdef int emit_chain(self, batch_t* b, Rank dest, int64_t head) noexcept nogil
