from libc.stdint cimport int64_t

from lapse._operations cimport worker_t
from lapse._types cimport ERR_FAILED, ERR_MEMORY, Rank


cdef class Sink:
    cdef void lock(self, Rank dest) noexcept nogil:
        pass

    cdef void unlock(self, Rank dest) noexcept nogil:
        pass

    cdef int alloc(self, out_t* out, size_t size) noexcept nogil:
        return ERR_MEMORY

    cdef int send(self, Rank dest, out_t* out) noexcept nogil:
        return ERR_FAILED

    cdef void discard(self, out_t* out) noexcept nogil:
        pass

    cdef void wake(self, worker_t* w) noexcept nogil:
        pass

    cdef int64_t now(self) noexcept nogil:
        return 0

    cdef void step(self) noexcept nogil:
        pass
