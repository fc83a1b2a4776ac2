# Design: a Van whose channels lose, double, reorder and delay messages, by a random number per message. Only `send` differs, which the
# protocol calls through Sink in any case; a Van of production has nothing of it. A message that is held back has its sequence number
# already. A thread of this Van's own sends what is due; what it does to a channel it does under the channel's mutex, as everybody.
#
# Messages to the node itself, HELLO and STOP pass untouched: without them a node does not start or end, which is another matter. So
# does MARK, whose instant is the clock's: what a seed does is to depend on the other messages only.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from lapse._sync cimport load_i32, nanoseconds, park
from lapse._types cimport ERR_FAILED, Rank
from lapse._van cimport Van, stamp
from lapse._protocol cimport out_t
from lapse._wire cimport HELLO, MARK, STOP, header_t
from lapse._zmq cimport (ZMQ_DONTWAIT, zmq_msg_close, zmq_msg_data, zmq_msg_init_size, zmq_msg_send, zmq_msg_t)

import threading

cdef enum:
    LOSS = 0
    DOUBLE = 1
    REORDER = 2
    DELAY = 3
    KINDS = 4
    PARTS = 1000000             # probabilities are in millionths

NAMES = ("loss", "double", "reorder", "delay")


cdef struct held_t:             # a message that waits; its bytes follow
    held_t* next
    int64_t due                 # nanoseconds
    size_t size
    bint overtaken              # the next message goes before it


cdef struct queue_t:            # of a channel, under its mutex
    held_t* first
    held_t* last
    uint64_t random


cdef class InjectingVan(Van):
    """A Van with faulty channels. `injected` counts what has been done.
    """
    cdef:
        queue_t* queues         # owned; num_nodes entries
        uint32_t below[KINDS]   # a draw under below[k] does k, or one before it
        int64_t longest         # nanoseconds
        int64_t counts[KINDS]   # under no common lock, for reports

    def __cinit__(self, *_):
        self.queues = <queue_t*>calloc(self.num_nodes, sizeof(queue_t))
        if self.queues == NULL:
            raise MemoryError()

    def inject(self, dict chances, uint64_t seed, double longest):
        """Begin, before anything has been sent. chances: {one of NAMES: probability per message}; seed: of what is drawn, for each channel
        anew; longest: seconds of a delay.
        """
        cdef int i
        cdef double so_far = 0
        for i, name in enumerate(NAMES):
            so_far += chances.get(name, 0.0)
            self.below[i] = <uint32_t>(so_far * PARTS)
        if set(chances) - set(NAMES) or not 0 <= so_far <= 1:
            raise ValueError(f"chances are probabilities of {', '.join(NAMES)}")
        self.longest = <int64_t>(longest * 1e9)
        for i in range(self.num_nodes):
            self.queues[i].random = ((seed * 65537 + self.me) * 65537 + i + 1) * <uint64_t>0x9E3779B97F4A7C15 | 1
        threading.Thread(target=self.send_what_is_due, name="lapse-injecting", daemon=True).start()

    def __dealloc__(self):
        cdef int i
        if self.queues != NULL:
            for i in range(self.num_nodes):
                self.drop(i)
        free(self.queues)

    def injected(self):
        """What has been done to how many messages, by name."""
        return {name: self.counts[i] for i, name in enumerate(NAMES)}

    def close(self):
        cdef Rank dest
        for dest in range(self.num_nodes):      # GOODBYE may be among them
            self.flush(dest, -1)
        Van.close(self)

    cdef int send(self, Rank dest, out_t* out) noexcept nogil:
        cdef header_t* h = <header_t*>out.data
        cdef queue_t* q = self.queues + dest
        cdef int kind, rc
        cdef bint overtakes
        if dest == self.me or h.type == HELLO or h.type == STOP or self.channels[dest].socket == NULL:
            return Van.send(self, dest, out)
        kind = KINDS if h.type == MARK else self.draw(q)
        stamp(self, self.channels + dest, out)
        if kind < KINDS:
            self.counts[kind] += 1
        if kind == LOSS:
            rc = 0
        elif q.first != NULL:
            overtakes = q.first.overtaken
            if overtakes:
                rc = self.put(dest, out.data, out.size)
                if rc == 0:
                    rc = self.flush_locked(dest, -1)
            else:
                rc = self.hold(q, out, q.last.due, False)
        elif kind == REORDER:
            rc = self.hold(q, out, nanoseconds() + self.longest, True)
        elif kind == DELAY:
            rc = self.hold(q, out, nanoseconds() + <int64_t>(self.next(q) % <uint64_t>(self.longest + 1)), False)
        else:
            rc = self.put(dest, out.data, out.size)
            if rc == 0 and kind == DOUBLE:
                rc = self.put(dest, out.data, out.size)
        zmq_msg_close(<zmq_msg_t*>out.storage)
        return rc

    cdef uint64_t next(self, queue_t* q) noexcept nogil:
        """xorshift64*."""
        q.random ^= q.random >> 12
        q.random ^= q.random << 25
        q.random ^= q.random >> 27
        return q.random * <uint64_t>0x2545F4914F6CDD1D >> 20

    cdef int draw(self, queue_t* q) noexcept nogil:
        cdef uint32_t number = <uint32_t>(self.next(q) % PARTS)
        cdef int kind = 0
        while kind < KINDS and number >= self.below[kind]:
            kind += 1
        return kind

    cdef int put(self, Rank dest, const char* data, size_t size) noexcept nogil:
        """Hand a copy to libzmq."""
        cdef zmq_msg_t msg
        if self.channels[dest].socket == NULL or zmq_msg_init_size(&msg, size) != 0:
            return ERR_FAILED
        memcpy(zmq_msg_data(&msg), data, size)
        if zmq_msg_send(&msg, self.channels[dest].socket, ZMQ_DONTWAIT) < 0:
            zmq_msg_close(&msg)
            return ERR_FAILED
        return 0

    cdef int hold(self, queue_t* q, out_t* out, int64_t due, bint overtaken) noexcept nogil:
        cdef held_t* held = <held_t*>malloc(sizeof(held_t) + out.size)
        if held == NULL:
            return ERR_FAILED
        held.next, held.due, held.size, held.overtaken = NULL, due, out.size, overtaken
        memcpy(held + 1, out.data, out.size)
        if q.first == NULL:
            q.first = held
        else:
            q.last.next = held
        q.last = held
        return 0

    cdef int flush_locked(self, Rank dest, int64_t until) noexcept nogil:
        """Send what is due at `until` (-1: all), in order."""
        cdef queue_t* q = self.queues + dest
        cdef held_t* held
        cdef int rc = 0
        while q.first != NULL and (until < 0 or q.first.due <= until):
            held = q.first
            q.first = held.next
            if rc == 0:
                rc = self.put(dest, <const char*>(held + 1), held.size)
            free(held)
        return rc

    cdef void flush(self, Rank dest, int64_t until) noexcept nogil:
        self.lock(dest)
        self.flush_locked(dest, until)
        self.unlock(dest)

    cdef void drop(self, Rank dest) noexcept nogil:
        cdef held_t* held
        while self.queues[dest].first != NULL:
            held = self.queues[dest].first
            self.queues[dest].first = held.next
            free(held)

    def send_what_is_due(self):
        cdef Rank dest
        cdef uint32_t nothing = 0
        with nogil:
            while load_i32(&self.state) == 0:
                for dest in range(self.num_nodes):
                    self.flush(dest, nanoseconds())
                park(&nothing, 0, 500000)
            for dest in range(self.num_nodes):
                self.flush(dest, -1)
