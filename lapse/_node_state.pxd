"""The state of one node that its workers and its server thread share, and what Python may ask about it."""
from libc.stdint cimport int32_t, int64_t, uint32_t
from lapse._answers cimport answers_t
from lapse._counters cimport protocol_counters_t
from lapse._directory cimport directory_t
from lapse._operations cimport worker_t
from lapse._sink cimport Sink
from lapse._store cimport store_t
from lapse._trace cimport trace_t
from lapse._types cimport Epoch, Key, Rank


cdef class NodeState:
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
        # the local sampling scheme's, see _here.pxd
        Key watch_begin         # keys [watch_begin, watch_end) whose arrivals are noted; set before anything arrives
        Key watch_end
        int64_t* arrived        # owned, its entries atomic: arrival i is at i & arrived_mask, until another one takes the place
        int64_t arrived_mask
        int64_t arrivals        # atomic; how many there have been
        # what a violation was about
        readonly Key bad_key
        readonly Epoch bad_epoch
        # scratch of the server thread, owned
        worker_t* server
        answers_t answers
        int32_t moving          # atomic; 1: a key has been localized, so some may be COMING
        int64_t now             # when the message in hand arrived (TRANSFER)
        Key late_keys[64]       # FAULT_LATE_DIRECTORY
        Rank late_owners[64]
        Epoch late_epochs[64]
        int late_due[64]
        int late_used

    # A worker of this node; `credit_ops` is rounded up to a power of two. NULL: out of memory. One thread at a time.
    cdef worker_t* add_worker(self, uint32_t index, int64_t credit_ops) noexcept nogil
    # Note arrivals of these keys from now on, the last `room` (a power of two) of them. 0, or ERR_MEMORY.
    cdef int watch(self, Key begin, Key end, int64_t room) noexcept nogil
    # The key is in range, or IndexError.
    cdef int check_key(self, Key key) except -1
