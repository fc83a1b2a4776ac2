"""Sends and receives through lapse._zmq, for test_zmq.py. Sockets come as the integers of `zmq.Socket.underlying`."""
from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from lapse._sync cimport add_i64, load_i64
from lapse._zmq cimport (ZMQ_DONTWAIT, ZMQ_POLLIN, zmq_errno, zmq_free_fn, zmq_getsockopt, zmq_msg_close, zmq_msg_data, zmq_msg_gets,
                         zmq_msg_init, zmq_msg_init_data, zmq_msg_init_size, zmq_msg_more, zmq_msg_move, zmq_msg_recv, zmq_msg_send,
                         zmq_msg_size, zmq_msg_t, zmq_poll, zmq_pollitem_t, zmq_setsockopt, zmq_strerror)

# Atomic. libzmq hands a buffer from our thread to its own; ThreadSanitizer does not see that, so `send` writes this variable
# before, and `release` reads it in the other thread.
cdef int64_t released = 0


cdef void release(void* data, void* hint) noexcept nogil:
    add_i64(<int64_t*>hint, 1)
    free(data)


def message_size():
    return sizeof(zmq_msg_t)


def send(uintptr_t socket, bytes payload, bint zero_copy=False, bint move=False):
    """Send payload as one frame; return the number of bytes that libzmq took."""
    cdef const char* data = payload
    cdef size_t size = len(payload)
    cdef zmq_msg_t msg, other
    cdef void* copy
    cdef int sent
    with nogil:
        if zero_copy:
            copy = malloc(size)
            memcpy(copy, data, size)
            add_i64(&released, 0)
            zmq_msg_init_data(&msg, copy, size, release, &released)
        else:
            zmq_msg_init_size(&msg, size)
            memcpy(zmq_msg_data(&msg), data, size)
        if move:
            zmq_msg_init(&other)
            zmq_msg_move(&other, &msg)
            zmq_msg_close(&msg)
            sent = zmq_msg_send(&other, <void*>socket, 0)
        else:
            sent = zmq_msg_send(&msg, <void*>socket, 0)
    return sent


def receive(uintptr_t socket, long milliseconds):
    """Wait for one frame; return its bytes and what libzmq knows as its Socket-Type, or None after the time given."""
    cdef zmq_pollitem_t item
    cdef zmq_msg_t msg
    cdef const char* peer
    cdef int ready, size = -1
    item.socket = <void*>socket
    item.fd = 0
    item.events = ZMQ_POLLIN
    item.revents = 0
    with nogil:
        ready = zmq_poll(&item, 1, milliseconds)
        zmq_msg_init(&msg)
        if ready == 1:
            size = zmq_msg_recv(&msg, <void*>socket, ZMQ_DONTWAIT)
    try:
        if ready != 1:
            return None
        assert size == <int>zmq_msg_size(&msg) and not zmq_msg_more(&msg)
        peer = zmq_msg_gets(&msg, b"Socket-Type")
        return (<char*>zmq_msg_data(&msg))[:size], None if peer == NULL else peer.decode()
    finally:
        zmq_msg_close(&msg)


def error_of_empty_receive(uintptr_t socket):
    """Receive from an empty socket without waiting; return whether the error was EAGAIN, and its text."""
    cdef zmq_msg_t msg
    zmq_msg_init(&msg)
    assert zmq_msg_recv(&msg, <void*>socket, ZMQ_DONTWAIT) == -1
    code = zmq_errno()
    zmq_msg_close(&msg)
    return code == EAGAIN, zmq_strerror(code).decode()


def swap_option(uintptr_t socket, int option, int value):
    """Set an integer option and return what it was before."""
    cdef int before = 0
    cdef size_t size = sizeof(before)
    if zmq_getsockopt(<void*>socket, option, &before, &size) or zmq_setsockopt(<void*>socket, option, &value, sizeof(value)):
        raise OSError(zmq_errno(), zmq_strerror(zmq_errno()).decode())
    return before


def released_buffers():
    return load_i64(&released)
