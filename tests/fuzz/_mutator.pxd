"""Inputs that are wrong in one place. Design: see _mutator.pyx."""
from libc.stdint cimport uint8_t, uint64_t

ctypedef size_t (*inner_t)(uint8_t* data, size_t size, size_t max_size) noexcept

# Change an input (see _bed.pyx) in place; its new size. `inner`, if it is not NULL, is a mutation that knows nothing of frames.
cdef size_t mutate_input(uint8_t* data, size_t size, size_t max_size, uint64_t seed, inner_t inner) noexcept
