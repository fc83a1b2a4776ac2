"""The way out of the protocol: what it needs from whoever runs it."""
from libc.stdint cimport int64_t
from lapse._operations cimport worker_t
from lapse._types cimport Rank

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
    cdef void discard(self, out_t* out) noexcept nogil                     # it is not sent after all
    cdef void wake(self, worker_t* w) noexcept nogil                       # an operation of w has finished
    cdef int64_t now(self) noexcept nogil                                  # nanoseconds, for statistics only
    cdef void step(self) noexcept nogil                                    # a yield point of the simulation, see FINE_STEPS
