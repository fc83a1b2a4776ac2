"""The first check of every frame. Design: see _door.pyx."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from lapse._van cimport Van


cdef class Door:
    cdef:
        Van van
        object context
        bint authenticated
        readonly int64_t passed, stopped
        const char* wrong
    cdef const char* feed_all(self, const uint8_t* data, size_t size) noexcept nogil
    cdef const char* feed_one(self, const uint8_t* data, size_t size, const char* user) noexcept nogil
