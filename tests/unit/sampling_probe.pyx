"""Sampling at C level, for the tests: `from tests.unit import sampling_probe`."""
import numpy as np

cimport numpy as cnp
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from lapse cimport Key, Worker
from lapse._here cimport here_t
from lapse._sync cimport pthread_mutex_lock, pthread_mutex_unlock

cnp.import_array()


def draw(Worker kv not None, int64_t n, Py_ssize_t piece):
    """n draws of one handle, `piece` at a time, keys only. Returns an array, or the code of the call that failed."""
    cdef cnp.ndarray out = np.empty(n, np.int64)
    cdef Key* keys = <Key*>cnp.PyArray_DATA(out)
    cdef int64_t handle, at = 0
    cdef int code = 0
    with nogil:
        handle = kv.prepare_sample(n)
        while handle >= 0 and at < n and code == 0:
            code = kv.draw_sample(handle, keys + at, min(piece, n - at))
            at += piece
    return <int>handle if handle < 0 else code if code < 0 else out


def codes(Worker kv not None, int64_t handle, Py_ssize_t n):
    """What draw_sample, pull_sample and finish_sample return for a handle."""
    cdef Key* keys = <Key*>malloc((n + 1) * sizeof(Key))
    cdef void* vals = malloc((n + 1) * 4096)
    cdef int drawn, finished
    cdef int64_t pulled
    with nogil:
        drawn = kv.draw_sample(handle, keys, n)
        pulled = kv.pull_sample(handle, keys, n, vals)
        finished = kv.finish_sample(handle)
        kv.waitall()
    free(keys)
    free(vals)
    return drawn, pulled, finished


def prepare(Worker kv not None, int64_t n):
    """What prepare_sample returns."""
    return kv.prepare_sample(n)


def make_lists(Worker kv not None, int64_t n):
    """Make the list of local keys anew n times, each time letting the one before go, without the GIL."""
    cdef here_t* l = NULL
    cdef int64_t i
    with nogil:
        for i in range(n):
            l = kv.sampler.sampling.list_of_now(l)
        kv.sampler.sampling.let_go(l)


def references(Worker kv not None):
    """How many there are to the list of local keys that was made last."""
    return kv.sampler.sampling.latest.refs


def lock_pool(Worker kv not None):
    """Hold the pool as a thread does that takes from it."""
    pthread_mutex_lock(&kv.sampler.sampling.pool.lock)


def unlock_pool(Worker kv not None):
    pthread_mutex_unlock(&kv.sampler.sampling.pool.lock)
