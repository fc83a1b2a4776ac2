"""Channels over ZeroMQ, and the server loop."""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from lapse._protocol cimport Protocol, Sink, out_t
from lapse._sync cimport pthread_mutex_t
from lapse._types cimport Rank
from lapse._wire cimport MAGIC, MARK, VERSION, header_t


cdef struct channel_t:          # to one other node, or to this node itself
    pthread_mutex_t mutex       # also the fence that libzmq asks of threads that share a socket
    void* socket                # borrowed from pyzmq: PUSH
    uint64_t sent               # sequence number of the last message sent; under mutex
    uint64_t handed             # atomic; the same, for ThreadSanitizer: libzmq orders sender and receiver, but it cannot see into libzmq
    uint64_t received           # of the last one received; server thread only
    int64_t messages, bytes     # sent, without MARK; under mutex
    char user[16]               # what the transport must have authenticated: the rank in decimal
    int32_t greeted             # atomic: 1 once HELLO has arrived, 2 after GOODBYE
    int descriptor              # of the connection that its HELLO came by, -1: inproc; valid once greeted
    char _apart[64]             # channels do not share a cache line


cdef class Van(Sink):
    cdef:
        Protocol protocol
        channel_t* channels     # owned; num_nodes entries
        void* pull              # borrowed from pyzmq: PULL, consumed by the server thread alone
        object sockets          # keeps the pyzmq sockets alive
        readonly Rank me
        readonly Rank num_nodes
        readonly uint64_t job
        bint authenticated      # every frame of another node carries the User-Id of its sender
        int32_t state           # atomic; 0 running, else the ERR_ code that every call returns
        int32_t serving         # atomic; 1 while the server loop may touch callers' buffers
        uint32_t changed        # atomic; bumped when state, serving or a greeting changes
        int64_t received_messages, received_bytes, dropped
        # the first violation: code (Violation or ERR_), who sent it
        readonly int broken
        readonly Rank broken_by
    cdef int check_header(self, char* data, size_t size, const char* user) noexcept nogil
    cdef void serve(self) noexcept nogil
    cdef int control(self, Rank dest, int kind) noexcept nogil
    cdef void enter_state(self, int32_t code) noexcept nogil
    cdef void abort(self, int32_t code) noexcept nogil
    cdef list say(self, int kind, double timeout)
    cdef list await_level(self, int32_t level, double timeout)


cdef inline void stamp(Van van, channel_t* channel, out_t* out) noexcept nogil:
    """Write into a message that it is the next one of this channel, and count it; the caller has the channel's mutex."""
    cdef header_t* h = <header_t*>out.data
    channel.sent += 1
    if h.type != MARK:
        channel.messages += 1
        channel.bytes += <int64_t>out.size
    h.magic = MAGIC
    h.version = VERSION
    h.job = van.job
    h.src = <uint32_t>van.me
    h.seq = channel.sent
