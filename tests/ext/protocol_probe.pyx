"""One node's protocol, for tests that write its messages themselves; what it sends is kept."""
from libc.stdint cimport int64_t, uint32_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from lapse._operations cimport op_finished, worker_t
from lapse._protocol cimport Protocol, Sink, out_t
from lapse._sync cimport load_i64
from lapse._types cimport ERR_MEMORY, Key, Rank, Timestamp


cdef class Recorder(Sink):
    cdef public list sent       # (dest, message)

    def __cinit__(self):
        self.sent = []

    cdef int alloc(self, out_t* out, size_t size) noexcept nogil:
        out.data = <char*>malloc(size)
        out.size = size
        return ERR_MEMORY if out.data == NULL else 0

    cdef int send(self, Rank dest, out_t* out) noexcept nogil:
        with gil:
            self.sent.append((dest, out.data[:out.size]))
        free(out.data)
        return 0


cdef class Probe:
    cdef Protocol protocol
    cdef worker_t* worker       # borrowed
    cdef public Recorder sink
    cdef dict held              # {timestamp: array}

    def __init__(self, num_keys, rank, num_nodes, **settings):
        self.protocol = Protocol(num_keys, rank, num_nodes, **settings)
        self.sink = Recorder()
        self.held = {}
        self.protocol.connect(self.sink)
        self.worker = self.protocol.add_worker(0, 8)

    def issue(self, int kind, keys, vals):
        """An operation on keys (int64) none of which is here."""
        cdef const Key* k = <const Key*><uintptr_t>keys.ctypes.data
        cdef uint32_t todo[16]
        cdef Timestamp ts
        cdef int i, n = len(keys)
        assert n <= 16
        for i in range(n):
            todo[i] = i
        assert self.protocol.issue(self.worker, kind, k, n, <void*><uintptr_t>vals.ctypes.data, todo, n, 0, &ts) == 0
        self.held[ts] = vals
        return ts

    def handle(self, bytes message, Rank src):
        """What the protocol says of the message: 0 or a violation."""
        cdef const char* data = message
        cdef char* copy = <char*>malloc(len(message) + 1)
        cdef int rc
        memcpy(copy, data, len(message))
        rc = self.protocol.handle(copy, len(message), src)
        free(copy)
        return rc

    def finished(self, Timestamp ts):
        return op_finished(self.worker, ts)

    def open_operations(self):
        return load_i64(&self.worker.open_ops)
