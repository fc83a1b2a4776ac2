"""A node in a state as real ones have it, and frames that nobody should send. Design: see _bed.pyx."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from lapse._protocol cimport Protocol, Sink
from lapse._operations cimport worker_t
from lapse._store cimport store_t
from lapse._types cimport Key, Rank
from lapse._wire cimport header_t

cdef enum:
    KEYS = 12
    NODES = 3
    WORKERS = 2
    PLACES = 8                  # operations that a worker may have under way
    MAX_BEDS = 64
    MAX_FRAMES = 8              # of one input

cdef struct layout_t:           # what a mutation needs to know to get a frame past the first checks
    int me
    uint32_t visible[KEYS]      # bytes
    uint32_t stored[KEYS]
    uint32_t epochs[KEYS]       # with which it would have to come, or to leave
    int opened                  # operations under way: whose, which, of what kind, of how many positions
    uint32_t open_worker[WORKERS * PLACES]
    uint64_t open_ts[WORKERS * PLACES]
    uint8_t open_kind[WORKERS * PLACES]
    uint32_t open_n[WORKERS * PLACES]

cdef struct event_t:            # of the node's history: a worker's call, or a frame that came
    int kind                    # OpKind; 0: a frame
    int who                     # the worker, or who sent it
    Py_ssize_t n                # keys, or bytes
    char* data                  # owned: keys and values, or the frame

# What a node is, for comparison. Everything is 8 bytes wide, so that nothing in it is padding.
cdef struct key_picture_t:
    uint64_t word, row, transfer, queue, directory, guess

cdef struct op_picture_t:
    uint64_t ts, remaining, under_way, buffer, rest

cdef struct worker_picture_t:
    uint64_t next_ts, open_ops, open_bytes, event, pins, counters
    op_picture_t op[PLACES]

cdef struct picture_t:
    key_picture_t key[KEYS]
    worker_picture_t worker[WORKERS]
    uint64_t counters, served, answers, late


cdef class Relay(Sink):         # of one node
    cdef:
        list post               # None: what is sent is looked at and thrown away
        store_t* store          # borrowed
        Rank me
        Rank held               # the channel that is locked, or -1
        int messages            # sent since begin()
        int unsent              # made, but not sent
        const char* wrong       # NULL, or what is wrong with a message or a lock
        uint64_t seq[NODES]
        uint8_t left[KEYS]      # TRANSFERs of the key since begin()
    cdef void begin(self) noexcept nogil
    cdef const char* look(self, Rank dest, const char* data, size_t size) noexcept nogil


cdef class Bed:
    cdef:
        Protocol node
        Relay relay
        worker_t* w[WORKERS]                    # borrowed
        char* buffers[WORKERS][PLACES]          # owned: the calls' arrays, exactly as long as they must be
        size_t sizes[WORKERS][PLACES]
        event_t* events                         # owned
        int used, room
        bint frozen
        picture_t now                           # of the node as it should be, when frozen
        bint dirty                              # a frame has been accepted since the last replay
        readonly dict settings
        readonly int64_t accepted, refused      # frames
        const char* wrong                       # what the last input broke: NULL, a sentence,
        readonly bytes frame                    # and by which frame
        readonly int verdict                    # what the node said of it
    cdef int note(self, int kind, int who, const void* first, size_t n, const void* second, size_t m) except -1
    cdef const char* play(self, event_t* e) noexcept nogil
    cdef const char* issue(self, int worker, int kind, const Key* keys, Py_ssize_t n, const char* values) noexcept nogil
    cdef void reset(self) noexcept nogil
    cdef void replay(self) noexcept nogil
    cdef void picture(self, picture_t* p) noexcept nogil
    cdef const char* feed_all(self, const uint8_t* data, size_t size) noexcept
    cdef const char* feed_one(self, const uint8_t* data, size_t size, Rank src) noexcept
    cdef const char* compare(self, const header_t* h, const Key* keys, const picture_t* a, const picture_t* b) noexcept nogil
    cdef const char* look_at_key(self, Key key, int kind, const key_picture_t* a, const key_picture_t* b) noexcept nogil
    cdef const char* difference(self, const picture_t* a, const picture_t* b) noexcept nogil
    cdef void describe_to(self, layout_t* l) noexcept nogil
