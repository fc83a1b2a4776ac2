"""What waits for a key that is on its way to this node.

Design: while a key is COMING its slot word points to its transfer_t, so no table is needed to find it and the key's latch
guards it. Transfers and queue entries exist only for keys in transfer.
"""
from libc.stdint cimport uint32_t, int64_t
from lapse._types cimport Epoch, Key, Rank, Timestamp

cdef struct entry_t:            # one operation on one key, waiting for the key
    entry_t* next
    int kind                    # OpKind; OP_LOCALIZE waits for the arrival itself
    Rank origin                 # who gets the answer
    uint32_t worker
    Timestamp ts
    uint32_t position           # in the caller's arrays
    bint embedded               # it is the `own` of a transfer, not a piece of memory for itself
    bint routed                 # it came by a message: its origin holds a pin for it (see the cache rule)
    int64_t wanted              # nanoseconds (Sink.now) at which a localize began
    size_t value_bytes
    # the entry's own copy of the values (push, set) follows: entry_values()

cdef struct transfer_t:
    Epoch last_epoch            # with which the key was last here; the arriving one must be newer
    Rank next_owner             # who gets it after us, or -1 (at most one can be noted)
    Epoch next_epoch
    entry_t* first              # owned: queued operations in arrival order
    entry_t* last
    entry_t own                 # the localize that started it, so that most transfers take one piece of memory


cdef inline char* entry_values(entry_t* e) noexcept nogil:
    return <char*>(e + 1)


cdef transfer_t* transfer_new(Epoch last_epoch) noexcept nogil             # NULL: out of memory
cdef void transfer_free(transfer_t*) noexcept nogil                        # frees the entries that are left in it too
cdef entry_t* entry_new(size_t value_bytes) noexcept nogil                 # NULL: out of memory
cdef void entry_free(entry_t*) noexcept nogil
cdef void transfer_append(transfer_t*, entry_t*) noexcept nogil
cdef void transfer_prepend(transfer_t*, entry_t*) noexcept nogil           # FAULT_REVERSE_QUEUE
