"""The functions of libzmq that Lapse calls, out of the library that pyzmq has loaded.

Every name below is a variable that points to the function; it is set when lapse._zmq is imported, which a cimport does. The
signatures, results and errors are those of libzmq's manual. A socket is what `zmq.Socket.underlying` gives.
"""
from libc.stdint cimport uint64_t

ctypedef struct zmq_msg_t:             # 64 opaque bytes, 8-aligned: libzmq's stable ABI
    uint64_t opaque[8]

ctypedef struct zmq_pollitem_t:
    void* socket
    int fd
    short events
    short revents

ctypedef void (*zmq_free_fn)(void* data, void* hint) noexcept nogil    # called by libzmq in any thread

cdef enum:
    ZMQ_DONTWAIT = 1
    ZMQ_SNDMORE = 2
    ZMQ_POLLIN = 1
    ZMQ_POLLOUT = 2
    ZMQ_POLLERR = 4
    ZMQ_RCVMORE = 13                   # socket options
    ZMQ_FD = 14
    ZMQ_EVENTS = 15
    ZMQ_HAUSNUMERO = 156384712         # libzmq's own errno values start here
    ZMQ_EFSM = 156384763
    ZMQ_ETERM = 156384765              # the context was terminated

cdef int (*zmq_msg_init)(zmq_msg_t* msg) noexcept nogil
cdef int (*zmq_msg_init_size)(zmq_msg_t* msg, size_t size) noexcept nogil
cdef int (*zmq_msg_init_data)(zmq_msg_t* msg, void* data, size_t size, zmq_free_fn free, void* hint) noexcept nogil
cdef void* (*zmq_msg_data)(zmq_msg_t* msg) noexcept nogil
cdef size_t (*zmq_msg_size)(const zmq_msg_t* msg) noexcept nogil
cdef int (*zmq_msg_more)(const zmq_msg_t* msg) noexcept nogil
cdef int (*zmq_msg_send)(zmq_msg_t* msg, void* socket, int flags) noexcept nogil     # bytes sent; the message is libzmq's then
cdef int (*zmq_msg_recv)(zmq_msg_t* msg, void* socket, int flags) noexcept nogil     # bytes received
cdef int (*zmq_msg_close)(zmq_msg_t* msg) noexcept nogil
cdef int (*zmq_msg_move)(zmq_msg_t* dest, zmq_msg_t* source) noexcept nogil
cdef const char* (*zmq_msg_gets)(const zmq_msg_t* msg, const char* property) noexcept nogil   # borrowed from msg, or NULL
cdef int (*zmq_errno)() noexcept nogil
cdef const char* (*zmq_strerror)(int code) noexcept nogil
cdef int (*zmq_poll)(zmq_pollitem_t* items, int count, long milliseconds) noexcept nogil
cdef int (*zmq_setsockopt)(void* socket, int option, const void* value, size_t size) noexcept nogil
cdef int (*zmq_getsockopt)(void* socket, int option, void* value, size_t* size) noexcept nogil
