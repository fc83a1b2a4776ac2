"""The relocations of chosen keys, noted as they happen (`--sys.trace.keys`).

Design: off, it costs one test of a pointer per relocation. On, the server thread appends events under a mutex; Python drains them.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t
from lapse._sync cimport pthread_mutex_t
from lapse._types cimport Epoch, Key, Rank

cdef struct event_t:
    int64_t when                # nanoseconds of a clock that never goes back
    Key key
    Rank peer                   # from where it came, or to where it went
    Epoch epoch                 # the one that begins with this relocation
    int32_t arrived             # 1 came, 0 left

cdef struct trace_t:
    uint8_t* chosen             # owned; one bit per key
    event_t* events             # owned
    int64_t used, room
    int64_t lost                # events for which there was no memory
    pthread_mutex_t mutex       # guards events, used, room, lost


cdef trace_t* trace_new(Key num_keys) noexcept nogil                # NULL: out of memory
cdef void trace_free(trace_t*) noexcept nogil
cdef void trace_choose(trace_t*, Key key) noexcept nogil            # before the first event only
cdef void trace_add(trace_t*, int64_t when, Key key, Rank peer, Epoch epoch, bint arrived) noexcept nogil
cdef list trace_drain(trace_t*)                                     # (when, key, "arrived" or "left", peer, epoch), and forget them
