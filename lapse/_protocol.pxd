"""The sans-I/O state machine of one node, and what it needs from whoever runs it."""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from lapse._directory cimport directory_t
from lapse._store cimport store_t
from lapse._transfers cimport entry_t, transfer_t
from lapse._types cimport Epoch, Key, Rank, Timestamp
from lapse._wire cimport header_t


# --- the output sink ------------------------------------------------------------------------------------------------------

cdef struct out_t:              # a message being written
    char* data                  # `size` bytes, borrowed from storage
    size_t size
    char storage[64]            # the sink's own (a zmq_msg_t, 8-aligned because out_t is)


cdef class Sink:
    """Where the protocol's messages go: channels of ZeroMQ in production, queues in memory in the simulation.

    A channel is the ordered connection to one other node (or to this node itself). `send` is called under `lock(dest)` and
    fills in magic, version, job, src and seq of the header. No function blocks, but for `lock`.
    """
    cdef void lock(self, Rank dest) noexcept nogil
    cdef void unlock(self, Rank dest) noexcept nogil
    cdef int alloc(self, out_t* out, size_t size) noexcept nogil           # 0, or ERR_MEMORY
    cdef int send(self, Rank dest, out_t* out) noexcept nogil              # consumes `out`; 0, or ERR_FAILED
    cdef void wake(self, worker_t* w) noexcept nogil                       # an operation of w has finished
    cdef int64_t now(self) noexcept nogil                                  # nanoseconds, for statistics only


# --- workers and their operations --------------------------------------------------------------------------------------------

cdef struct op_t:               # an operation with parts that were not done at once
    Timestamp ts                # atomic; which operation this slot of the ring serves
    int64_t remaining           # atomic; positions not done yet, + 1 while it is being issued; 0: finished
    char* vals                  # borrowed from the caller: where a pull puts its values
    uint64_t* offsets           # owned; byte offset of each position in vals, when lengths differ per key
    Py_ssize_t offsets_room
    Py_ssize_t n
    size_t credit               # bytes charged to the worker
    int kind


cdef struct pin_t:              # the route of a worker's unanswered operations on one key (location caches only)
    Key key                     # -1: free
    Rank route
    bint cached                 # the route was a guess; else it was the home
    int64_t count               # unanswered positions


cdef struct counters_t:         # positions (keys), by where they were found; written by one thread, read by any
    int64_t pulled_local, pulled_queued, pulled_remote
    int64_t pushed_local, pushed_queued, pushed_remote
    int64_t set_local, set_queued, set_remote
    int64_t localized_local, localized_queued, localized_remote


cdef struct worker_t:
    uint32_t index              # of the worker in its node
    op_t* ops                   # owned; ring of ops_mask + 1
    int64_t ops_mask
    Timestamp next_ts
    uint32_t event              # atomic; bumped whenever an operation finishes
    uint32_t sleeping           # atomic; 1 while the worker sleeps on `event`
    int64_t open_ops            # atomic; unfinished operations
    int64_t open_bytes          # atomic; what they are charged
    int32_t busy                # atomic; a Python call is under way (a Worker belongs to one thread)
    counters_t counters
    # the cache rule
    int32_t pins_lock           # atomic spin lock: the worker adds, the server thread removes
    int64_t pinned              # atomic; entries with a cached route; the fast path tests this one word
    pin_t* pins                 # owned; open addressing, pins_mask + 1 places; NULL until needed
    int64_t pins_mask
    int64_t pins_used
    # scratch of the issuing thread, owned
    uint32_t* misses
    uint32_t* chain
    uint64_t* offsets
    Py_ssize_t scratch_room
    Rank* order                 # owned; num_nodes entries each
    int64_t* heads
    int64_t* tails
    # in-place access
    int held                    # latches taken by acquire
    int held_n                  # keys of that acquire
    Key held_keys[16]
    uint64_t held_words[16]


# --- the protocol -------------------------------------------------------------------------------------------------------------

cdef enum Fault:                # seeded protocol bugs, for the tests that show that the tests find them
    FAULT_SPLIT_ROUTE = 1       # route and enqueue are two steps: nothing is re-checked under the channel's lock
    FAULT_NO_CACHE_RULE = 2     # a worker with an unanswered operation by a cached route may change its route
    FAULT_LATE_DIRECTORY = 4    # home moves its directory entry a few messages after LOCALIZE, not on receipt
    FAULT_NO_QUEUE = 8          # an operation that meets a key in transfer is forwarded instead of queued
    FAULT_DROP_QUEUE = 16       # noting a next owner forgets the queued operations
    FAULT_NO_NEXT = 32          # a HAND_OVER that meets a key in transfer is ignored


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


cdef struct protocol_counters_t:    # written by the server thread (relaxed), except where noted
    int64_t answered            # positions served for other nodes
    int64_t forwarded           # positions sent on because the key was not here
    int64_t long_ways           # operations that were forwarded more than 8 times
    int64_t relocated_in, relocated_out
    int64_t relocation_min, relocation_sum, relocation_max      # nanoseconds from localize to arrival
    int64_t relocation_count
    int64_t relocation_histogram[512]    # by relocation_bucket(): 8 per power of two


cdef struct route_t             # one walk of route(): private to _protocol.pyx


cdef class Protocol:
    cdef:
        store_t* store          # owned
        directory_t* directory  # owned
        readonly Rank me
        readonly Rank num_nodes
        readonly int max_workers
        readonly int shared_memory      # 0: every operation goes through the node's own channel
        public int faults               # Fault bits; 0 in production
        public bint record_locations    # keep, per key, how often it was accessed here (locality statistics)
        Sink sink
        worker_t** workers      # owned; max_workers entries, NULL where there is none yet
        protocol_counters_t counters
        # what a violation was about
        readonly Key bad_key
        readonly Epoch bad_epoch
        # scratch of the server thread, owned
        worker_t* server
        char* answers           # answer_t array, see _protocol.pyx
        Py_ssize_t answers_used, answers_room
        Key late_keys[64]       # FAULT_LATE_DIRECTORY
        Rank late_owners[64]
        Epoch late_epochs[64]
        int late_due[64]
        int late_used

    # A worker of this node; `credit_ops` is rounded up to a power of two. NULL: out of memory. One thread at a time.
    cdef worker_t* add_worker(self, uint32_t index, int64_t credit_ops) noexcept nogil

    # Issue an operation; the caller has checked the keys, tried the local fast path, and taken the credit. Positions
    # todo[0..m) of the call are not done yet. 0, or ERR_MEMORY, ERR_FAILED. One thread per worker; never blocks, but for channel locks.
    cdef int issue(self, worker_t* w, int kind, const Key* keys, Py_ssize_t n, void* vals, uint32_t* todo, Py_ssize_t m,
                   size_t credit, Timestamp* ts) noexcept nogil

    # A message has arrived (magic, version, job, src and seq have been checked): FINE or a Violation. Server thread only.
    # `data` may be written to.
    cdef int handle(self, char* data, size_t size, Rank src) noexcept nogil

    # The key has an unanswered operation of this worker that went by a cached route.
    cdef bint is_pinned(self, worker_t* w, Key key) noexcept nogil
