"""The sans-I/O state machine of one node, and what it needs from whoever runs it."""
cimport cython
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from lapse._directory cimport directory_t
from lapse._operations cimport counters_t, op_t, worker_t
from lapse._pins cimport pin_t
from lapse._store cimport store_t
from lapse._trace cimport trace_t
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
    cdef void step(self) noexcept nogil                                    # a yield point of the simulation, see FINE_STEPS


# --- the protocol -------------------------------------------------------------------------------------------------------------

cdef enum Fault:                # seeded protocol bugs, for the tests that show that the tests find them
    FAULT_SPLIT_ROUTE = 1       # route and enqueue are two steps: nothing is re-checked under the channel's lock
    FAULT_NO_CACHE_RULE = 2     # a worker with an unanswered operation by a cached route may change its route
    FAULT_LATE_DIRECTORY = 4    # home moves its directory entry a few messages after LOCALIZE, not on receipt
    FAULT_NO_QUEUE = 8          # an operation that meets a key in transfer is forwarded instead of queued
    FAULT_DROP_QUEUE = 16       # noting a next owner forgets the queued operations
    FAULT_NO_NEXT = 32          # a HAND_OVER that meets a key in transfer is ignored
    FINE_STEPS = 64             # no bug: calls Sink.step wherever another thread may come in between


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


# --- private to _protocol.pyx: C wants to see them whole ---

cdef struct answer_t:           # the answers to one operation that the message in hand gives rise to
    Rank origin
    uint32_t worker
    Timestamp ts
    int kind
    int64_t count
    Key* keys                   # owned, with positions; used only when origin is another node
    uint32_t* positions
    int64_t room
    char* values                # owned
    size_t value_bytes
    size_t value_room

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


@cython.final
cdef class Protocol:
    cdef:
        store_t* store          # owned
        directory_t* directory  # owned
        readonly Rank me
        readonly Rank num_nodes
        readonly int max_workers
        readonly int64_t credit_ops
        readonly int shared_memory      # 0: every operation goes through the node's own channel
        public int faults               # Fault bits; 0 in production
        Sink sink
        worker_t** workers      # owned; max_workers entries, NULL where there is none yet
        protocol_counters_t counters_
        trace_t* trace_         # owned; NULL: no key is traced
        # what a violation was about
        readonly Key bad_key
        readonly Epoch bad_epoch
        # scratch of the server thread, owned
        worker_t* server
        answer_t* answers       # owned
        int answers_used, answers_room
        Key watch_begin         # keys [watch_begin, watch_end) whose arrivals are counted; set before anything arrives
        Key watch_end
        int64_t arrivals        # atomic
        int32_t moving          # atomic; 1: a key has been localized, so some may be COMING
        int64_t now             # when the message in hand arrived (TRANSFER)
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

    # private to _protocol.pyx
    cdef int blame(self, int violation, Key key, Epoch epoch) noexcept nogil
    cdef void complete(self, worker_t* w, Timestamp ts, int64_t count) noexcept nogil
    cdef op_t* find_op(self, uint32_t worker, Timestamp ts) noexcept nogil
    cdef int settle(self, batch_t* b, Py_ssize_t i) noexcept nogil
    cdef int recheck(self, batch_t* b, Py_ssize_t i, Rank dest) noexcept nogil
    cdef void between(self) noexcept nogil
    cdef int pinned_go(self, batch_t* b, Key key, Rank dest) noexcept nogil
    cdef Rank destination(self, batch_t* b, Key key) noexcept nogil
    cdef int route(self, batch_t* b, uint32_t* todo, Py_ssize_t m) noexcept nogil
    cdef int emit_chain(self, batch_t* b, Rank dest, int64_t head) noexcept nogil
    cdef int emit(self, batch_t* b, Rank dest, int kind, int64_t head, bint homed) noexcept nogil
    cdef void move_owner(self, Key key, Rank owner, Epoch epoch) noexcept nogil
    cdef void settle_late(self) noexcept nogil
    cdef bint has_place(self, const op_t* op, uint32_t position, Key key) noexcept nogil
    cdef int handle_operation(self, header_t* h, const Key* keys, const uint32_t* aux, char* vals, Rank src) noexcept nogil
    cdef void settle_local_localize(self, header_t* h, Py_ssize_t here) noexcept nogil
    cdef int serve_here(self, header_t* h, const Key* keys, const uint32_t* aux, char* vals, Py_ssize_t m) noexcept nogil
    cdef int send_to(self, Rank dest, out_t* out) noexcept nogil
    cdef int handle_localize(self, header_t* h, const Key* keys) noexcept nogil
    cdef int note_next(self, Key key, Rank next_owner, Epoch epoch) noexcept nogil
    cdef int handle_hand_over(self, header_t* h, const Key* keys, const uint32_t* epochs, Rank src) noexcept nogil
    cdef int send_transfer(self, Rank to, const Key* keys, const uint32_t* epochs, const uint32_t* chosen,
                           Py_ssize_t count) noexcept nogil
    cdef int handle_transfer(self, header_t* h, const Key* keys, const uint32_t* epochs, const char* vals) noexcept nogil
    cdef int arrive(self, Key key, Epoch epoch, const char* vals) noexcept nogil
    cdef int pass_on(self, header_t* h, const Key* keys, const uint32_t* epochs, Py_ssize_t moving) noexcept nogil
    cdef int apply_queue(self, transfer_t* t, Key key, char* row) noexcept nogil
    cdef int answer_entry(self, entry_t* e, Key key, const char* row) noexcept nogil
    cdef answer_t* answer_of(self, Rank origin, uint32_t worker, Timestamp ts, int kind, size_t size) noexcept nogil
    cdef int flush_answers(self) noexcept nogil
    cdef int handle_answer(self, header_t* h, const Key* keys, const uint32_t* aux, const char* vals, Rank src) noexcept nogil
    cdef int check_key(self, Key key) except -1
