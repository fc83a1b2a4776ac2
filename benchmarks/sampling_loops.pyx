"""Samples at C level, for benchmarks/sampling.py: no Python between the calls."""
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc

from lapse cimport Key, Worker


def run_draws(Worker kv not None, Py_ssize_t n, int64_t rounds):
    """So many samples of n draws. Returns 0, or the sum of the error codes."""
    cdef Key* keys = <Key*>malloc(n * sizeof(Key))
    cdef int64_t i, handle, wrong = 0
    with nogil:
        for i in range(rounds):
            handle = kv.prepare_sample(n)
            wrong += kv.draw_sample(handle, keys, n)
    free(keys)
    return wrong


def run_pulls(Worker kv not None, Py_ssize_t n, int64_t rounds, Py_ssize_t value_bytes):
    """The same, with their values. Returns 0, or the sum of the error codes."""
    cdef Key* keys = <Key*>malloc(n * sizeof(Key))
    cdef void* vals = malloc(n * value_bytes)
    cdef int64_t i, handle, wrong = 0
    with nogil:
        for i in range(rounds):
            handle = kv.prepare_sample(n)
            wrong += kv.wait(kv.pull_sample(handle, keys, n, vals))
    free(keys)
    free(vals)
    return wrong
