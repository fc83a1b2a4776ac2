"""Statistics of a node: what became of positions, and how long relocations took."""
from libc.stdint cimport int64_t
from lapse._operations cimport counters_t
from lapse._types cimport OP_PULL

cdef enum:
    # where a position was found
    LOCAL = 0
    IN_TRANSFER = 1
    REMOTE = 2

cdef struct protocol_counters_t:    # written by the server thread (relaxed), except where noted
    int64_t answered            # positions served for other nodes
    int64_t forwarded           # positions sent on because the key was not here
    int64_t long_ways           # operations that were forwarded more than 8 times
    int64_t relocated_in, relocated_out
    int64_t relocation_min, relocation_sum, relocation_max      # nanoseconds from localize to arrival
    int64_t relocation_count
    int64_t relocation_histogram[512]    # by bucket_of(): 8 per power of two


cdef inline void tally(counters_t* c, int kind, int where, int64_t n) noexcept nogil:
    """Count n positions of an operation of this kind (OpKind)."""
    (<int64_t*>c)[(kind - OP_PULL) * 3 + where] += n


cdef void note_relocation(protocol_counters_t*, int64_t took) noexcept nogil     # nanoseconds
cdef dict worker_dict(const counters_t*)                # {"pulled_local": ..., ...}
cdef dict relocations_dict(const protocol_counters_t*)  # {"answered": ..., "relocation_p99_ns": ..., ...}
