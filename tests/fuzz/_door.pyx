# Design: what every frame has to pass before the protocol sees it: Van.check_header, of a real Van whose sockets nobody reads. It is checked
# that what passes is a frame of this job, of whom the transport vouches for, and the next one of its channel; that what does not pass has
# changed nothing; and that a member's bad frame is never taken for a stranger's.
from libc.stdint cimport uint8_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, strcmp

from lapse._types cimport Rank
from lapse._van cimport Van
from lapse._wire cimport HEADER_BYTES, HELLO, MAGIC, STOP, VERSION, header_t
from tests.fuzz._bed cimport MAX_FRAMES, NODES

import zmq

from lapse._protocol import Protocol

cdef enum:
    ME = 0
    STRANGERS = -1              # Van's DROP


cdef const char* user_of(int choice) noexcept nogil:
    """What the transport says of a sender."""
    if choice == 0:
        return NULL
    if choice == 1:
        return "0"
    if choice < 4:
        return "2"
    if choice == 4:
        return "3"
    if choice == 5:
        return "01"
    if choice == 6:
        return ""
    return "1"


cdef class Door:
    """Node 0 of three. Node 1 has said HELLO, node 2 has not."""

    def __cinit__(self, bint authenticated):
        context = zmq.Context()
        context.setsockopt(zmq.LINGER, 0)
        self.context = context
        self.authenticated = authenticated
        self.van = Van(Protocol(12, ME, NODES), context.socket(zmq.PULL), [context.socket(zmq.PUSH) for _ in range(NODES)], 0x5eed,
                       authenticated)

    cdef const char* feed_all(self, const uint8_t* data, size_t size) noexcept nogil:
        cdef size_t n
        cdef int i, frames = 0
        cdef const char* wrong = NULL
        for i in range(NODES):
            self.van.channels[i].received = 0
            self.van.channels[i].greeted = 1 if i < 2 else 0
        while size >= 3 and frames < MAX_FRAMES and wrong == NULL:
            n = min(<size_t>data[1] | <size_t>data[2] << 8, size - 3)
            wrong = self.feed_one(data + 3, n, user_of(data[0] & 15))
            data += 3 + n
            size -= 3 + n
            frames += 1
        return wrong

    cdef const char* feed_one(self, const uint8_t* data, size_t size, const char* user) noexcept nogil:
        cdef char* frame = <char*>malloc(size)
        cdef header_t* h = <header_t*>frame
        cdef uint64_t received[NODES]
        cdef int greeted[NODES]
        cdef char rank[16]
        cdef const char* wrong = NULL
        cdef int i, src
        cdef bint bare
        if size:
            memcpy(frame, data, size)
        for i in range(NODES):
            received[i] = self.van.channels[i].received
            greeted[i] = self.van.channels[i].greeted
        src = self.van.check_header(frame, size, user)
        self.passed += src >= 0
        self.stopped += src < 0
        if size and memcmp(frame, data, size) != 0:
            wrong = "a frame was changed by looking at its header"
        elif src >= NODES:
            wrong = "a frame of a node that does not exist passed"
        elif src >= 0:
            snprintf(rank, sizeof(rank), "%d", src)
            if size < HEADER_BYTES or h.magic != MAGIC or h.version != VERSION or h.job != 0x5eed or h.src != <uint32_t>src:
                wrong = "a frame of another job, or in the name of another node, passed"
            elif self.authenticated and (src != ME if user == NULL else (src == ME or strcmp(user, rank) != 0)):
                wrong = "a frame passed that the transport does not vouch for"
            elif h.seq != received[src] + 1 or self.van.channels[src].received != h.seq:
                wrong = "a frame passed that is not the next one of its channel"
            elif h.type != STOP and (h.type == HELLO) == greeted[src]:
                wrong = "a frame before HELLO, or a second HELLO, passed"
            else:
                bare = h.count == 0 and h.value_bytes == 0 and h.reserved == 0 and h.hops == 0 and size == HEADER_BYTES
                if h.type >= HELLO and not bare:
                    wrong = "a control frame with more than a header passed"
        elif src == STRANGERS and self.authenticated and user != NULL:
            wrong = "a member's bad frame was taken for a stranger's"
        elif src != STRANGERS and self.authenticated and user == NULL and (size < HEADER_BYTES or h.src != ME):
            wrong = "a stranger's frame was taken for a member's"
        for i in range(NODES):
            if self.van.channels[i].received != received[i] + (1 if i == src else 0) or self.van.channels[i].greeted != greeted[i]:
                wrong = "a channel was changed by a frame that did not pass, or that is not its own"
        free(frame)
        if wrong != NULL:
            self.wrong = wrong
        return wrong

    def feed(self, bytes data):
        cdef const char* p = data
        if self.feed_all(<const uint8_t*>p, len(data)) != NULL:
            raise AssertionError(self.report())

    def report(self):
        return f"{self.wrong.decode() if self.wrong != NULL else 'nothing is wrong'}; authenticated: {self.authenticated}"
