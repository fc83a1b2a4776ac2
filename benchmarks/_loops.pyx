"""Loops at C level: many calls per timing, no Python between them. Times are nanoseconds.

The raw side of the remote benchmarks is here, too: what libzmq does with frames of the same sizes and nothing else. It fills in no
byte of a frame but the first, copies none out, and looks nothing up.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from lapse._sync cimport add_u32, cas_u64, fence, load_u32, nanoseconds, park, peek_u64, store_u32, store_u64, unpark
from lapse._types cimport Key, Timestamp
from lapse._worker cimport Worker
from lapse._zmq cimport (zmq_msg_close, zmq_msg_data, zmq_msg_init, zmq_msg_init_size, zmq_msg_recv, zmq_msg_send, zmq_msg_t)

cdef enum:
    MOST_IN_FLIGHT = 1024


cdef int raise_code(Timestamp code) except -1:
    raise RuntimeError(f"a call of the C level returned {code}")


# --- local -----------------------------------------------------------------------------------------------------------------------

def one_key_per_call(Worker worker not None, const Key[::1] keys, float[::1] vals):
    """Pull each key by a call of its own; returns the time of all."""
    cdef Py_ssize_t i
    cdef Timestamp ts = -1
    cdef int64_t start
    with nogil:
        start = nanoseconds()
        for i in range(keys.shape[0]):
            ts = worker.pull(&keys[i], 1, &vals[0])
            if ts < -1:
                break
    if ts < -1:
        raise_code(ts)
    return nanoseconds() - start


def one_copy_per_key(const Key[::1] keys, uint64_t[::1] slots, size_t size, float[::1] vals, bint latched):
    """What the machine allows for one_key_per_call: a slot word gives the address of the row, and the row is copied; nothing else.
    With `latched`, under a latch in the slot word, whose locked instruction keeps the processor from looking ahead to the next row."""
    cdef Py_ssize_t i
    cdef uint64_t word
    cdef int64_t start
    with nogil:
        start = nanoseconds()
        for i in range(keys.shape[0]):
            word = peek_u64(&slots[keys[i]])
            if latched:
                cas_u64(&slots[keys[i]], &word, word | 1)
            memcpy(&vals[0], <const void*>word, size)
            if latched:
                store_u64(&slots[keys[i]], word)
    return nanoseconds() - start


def calls_until(Worker worker not None, bint push, const Key[:, ::1] keys, float[::1] vals, int64_t start, int64_t stop):
    """From one instant to another, at least once, pull or push the rows of `keys` in turn, one per call; returns (keys, time)."""
    cdef Py_ssize_t i = 0, calls = 0
    cdef int64_t begun, now
    cdef Timestamp ts = -1
    with nogil:
        sleep_until(start)
        begun = now = nanoseconds()
        while calls == 0 or now < stop:
            ts = worker.push(&keys[i, 0], keys.shape[1], &vals[0]) if push else worker.pull(&keys[i, 0], keys.shape[1], &vals[0])
            if ts != -1:
                break
            calls += 1
            i = i + 1 if i + 1 < keys.shape[0] else 0
            now = nanoseconds()
    if ts != -1:
        raise_code(ts)
    return calls * keys.shape[1], now - begun


cdef void sleep_until(int64_t instant) noexcept nogil:
    cdef unsigned int nothing = 0
    cdef int64_t left = instant - nanoseconds()
    while left > 0:
        park(&nothing, 0, left)
        left = instant - nanoseconds()


# --- remote ------------------------------------------------------------------------------------------------------------------------

def pull_times(Worker worker not None, const Key[::1] keys, float[::1] vals, int64_t[::1] times):
    """Pull one key after the other, waiting for each."""
    cdef Py_ssize_t i
    cdef int64_t start
    cdef int rc = 0
    with nogil:
        for i in range(keys.shape[0]):
            start = nanoseconds()
            rc = worker.wait(worker.pull(&keys[i], 1, &vals[0]))
            times[i] = nanoseconds() - start
            if rc != 0:
                break
    if rc != 0:
        raise_code(rc)


def localize_times(Worker worker not None, const Key[::1] keys, int64_t[::1] times):
    """Localize one key after the other, waiting for each."""
    cdef Py_ssize_t i
    cdef int64_t start
    cdef int rc = 0
    with nogil:
        for i in range(keys.shape[0]):
            start = nanoseconds()
            rc = worker.wait(worker.localize(&keys[i], 1))
            times[i] = nanoseconds() - start
            if rc != 0:
                break
    if rc != 0:
        raise_code(rc)


def localize_pipelined(Worker worker not None, const Key[:, ::1] keys):
    """Localize each row of `keys` by one call, and wait once, for all; returns the time."""
    cdef Py_ssize_t i
    cdef int64_t start
    cdef Timestamp ts = -1
    with nogil:
        start = nanoseconds()
        for i in range(keys.shape[0]):
            ts = worker.localize(&keys[i, 0], keys.shape[1])
            if ts < -1:
                break
        if ts >= -1:
            ts = -1 + worker.waitall()
        start = nanoseconds() - start
    if ts != -1:
        raise_code(ts)
    return start


def calls_in_flight(Worker worker not None, bint push, const Key[:, ::1] keys, float[:, ::1] vals):
    """Pull or push each row of `keys` by one call, with as many calls under way as `vals` has rows; returns the time."""
    cdef Timestamp under_way[MOST_IN_FLIGHT]
    cdef Py_ssize_t i, slot, n = keys.shape[1], window = vals.shape[0]
    cdef int64_t start
    cdef int rc = 0
    if not 0 < window <= MOST_IN_FLIGHT:
        raise ValueError(f"{window} calls in flight")
    for i in range(window):
        under_way[i] = -1
    with nogil:
        start = nanoseconds()
        for i in range(keys.shape[0]):
            slot = i % window
            rc = worker.wait(under_way[slot])
            if rc != 0:
                break
            under_way[slot] = worker.push(&keys[i, 0], n, &vals[slot, 0]) if push else worker.pull(&keys[i, 0], n, &vals[slot, 0])
        for i in range(window):
            if rc == 0:
                rc = worker.wait(under_way[i])
        start = nanoseconds() - start
    if rc != 0:
        raise_code(rc)
    return start


# --- the same frames, raw -------------------------------------------------------------------------------------------------------------

cdef int send_frame(void* socket, size_t size) noexcept nogil:
    cdef zmq_msg_t frame
    if zmq_msg_init_size(&frame, size) != 0:
        return -1
    (<char*>zmq_msg_data(&frame))[0] = 1
    return zmq_msg_send(&frame, socket, 0)


def raw_client(out, into, size_t size, Py_ssize_t calls, int window, int64_t[::1] times=None):
    """Send frames of `size` bytes, at most `window` of them unanswered; returns the time of all, and fills in each one's (window 1)."""
    cdef void* out_socket = <void*><uintptr_t>out.underlying
    cdef void* into_socket = <void*><uintptr_t>into.underlying
    cdef zmq_msg_t frame
    cdef Py_ssize_t sent = 0, answered = 0
    cdef int64_t start, begun
    cdef bint timed = times is not None
    cdef int rc = 0
    with nogil:
        zmq_msg_init(&frame)
        start = nanoseconds()
        while answered < calls and rc >= 0:
            begun = nanoseconds() if timed else 0
            while sent < calls and sent - answered < window and rc >= 0:
                rc = send_frame(out_socket, size)
                sent += 1
            if rc >= 0:
                rc = zmq_msg_recv(&frame, into_socket, 0)
            if timed:
                times[answered] = nanoseconds() - begun
            answered += 1
        start = nanoseconds() - start
        zmq_msg_close(&frame)
    if rc < 0:
        raise RuntimeError("a raw socket failed")
    return start


def raw_server(into, out, size_t size, Py_ssize_t calls):
    """Answer each frame with one of `size` bytes."""
    cdef void* out_socket = <void*><uintptr_t>out.underlying
    cdef void* into_socket = <void*><uintptr_t>into.underlying
    cdef zmq_msg_t frame
    cdef Py_ssize_t i
    cdef int rc = 0
    with nogil:
        zmq_msg_init(&frame)
        for i in range(calls):
            rc = zmq_msg_recv(&frame, into_socket, 0)
            if rc >= 0:
                rc = send_frame(out_socket, size)
            if rc < 0:
                break
        zmq_msg_close(&frame)
    if rc < 0:
        raise RuntimeError("a raw socket failed")


# The same round trip for a client that, as a worker does, leaves receiving to another thread: what that hand-over costs by itself.

cdef class Mailbox:
    """An event word and whether somebody sleeps on it."""
    cdef uint32_t event
    cdef uint32_t sleeping


def raw_sender(out, Mailbox box not None, size_t size, int64_t[::1] times):
    """Send a frame and sleep until raw_receiver has its answer, once per entry of `times`."""
    cdef void* socket = <void*><uintptr_t>out.underlying
    cdef Py_ssize_t i
    cdef uint32_t seen
    cdef int64_t start
    cdef int rc = 0
    with nogil:
        for i in range(times.shape[0]):
            start = nanoseconds()
            seen = load_u32(&box.event)
            rc = send_frame(socket, size)
            if rc < 0:
                break
            while load_u32(&box.event) == seen:
                store_u32(&box.sleeping, 1)
                fence()
                park(&box.event, seen, 100000000)
                store_u32(&box.sleeping, 0)
            times[i] = nanoseconds() - start
    if rc < 0:
        raise RuntimeError("a raw socket failed")


def raw_receiver(into, Mailbox box not None, Py_ssize_t calls):
    """Receive the answers for raw_sender, in another thread."""
    cdef void* socket = <void*><uintptr_t>into.underlying
    cdef zmq_msg_t frame
    cdef Py_ssize_t i
    cdef int rc = 0
    with nogil:
        zmq_msg_init(&frame)
        for i in range(calls):
            rc = zmq_msg_recv(&frame, socket, 0)
            if rc < 0:
                break
            add_u32(&box.event, 1)
            fence()
            if load_u32(&box.sleeping):
                unpark(&box.event)
        zmq_msg_close(&frame)
    if rc < 0:
        raise RuntimeError("a raw socket failed")
