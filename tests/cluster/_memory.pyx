# Design: rounds of one kind of call each, at C level and without the GIL, for leaks.py: what a call takes it has to give back.
from libc.stdint cimport int64_t, uint32_t, uintptr_t

from lapse cimport DONE, Key, Timestamp, Worker

import numpy as np

KINDS = ["pull", "push", "set", "localize", "pull_if_local", "acquire", "asynchronous", "sample", "rejected"]


def run(Worker kv not None, kind, keys, int64_t rounds, Py_ssize_t length):
    """Run so many rounds of a kind on these keys; the number of operations."""
    cdef int what = KINDS.index(kind)
    cdef object k = np.ascontiguousarray(keys, np.int64)
    cdef object v = np.ones(len(k) * length, np.float32)
    cdef const Key* p = <const Key*><uintptr_t>k.ctypes.data
    cdef float* vals = <float*><uintptr_t>v.ctypes.data
    cdef Py_ssize_t n = len(k)
    cdef int64_t i, operations = 0
    with nogil:
        for i in range(rounds):
            operations += one_round(kv, what, p, n, vals)
            if operations < 0:
                break
    if operations < 0:
        raise RuntimeError(f"{kind}: an unexpected code")
    return operations


cdef int64_t one_round(Worker kv, int what, const Key* keys, Py_ssize_t n, float* vals) noexcept nogil:
    cdef Timestamp[4] ts
    cdef Key wrong = -1
    cdef Key[8] drawn
    cdef void* rows[8]
    cdef int64_t handle
    cdef int i, bad = 0
    if what == 0:
        bad = kv.wait(kv.pull(keys, n, vals))
    elif what == 1:
        bad = kv.wait(kv.push(keys, n, vals))
    elif what == 2:
        bad = kv.wait(kv.set(keys, n, vals))
    elif what == 3:                             # the other operations wait for the keys, which the other node wants too
        ts[0] = kv.localize(keys, n)
        ts[1] = kv.push(keys, n, vals)
        ts[2] = kv.pull(keys, n, vals)
        ts[3] = kv.set(keys, 1, vals)
        bad = kv.waitall()
        for i in range(4):
            bad = bad if bad != 0 or ts[i] >= DONE else <int>ts[i]
        return -1 << 60 if bad != 0 else 4
    elif what == 4:
        bad = 0 if kv.pull_if_local(keys, n, vals) >= 0 else -1
    elif what == 5:
        bad = kv.acquire(keys, <int>min(n, <Py_ssize_t>8), rows)
        if bad >= 0:
            bad = kv.release(<uint32_t>1 if rows[0] != NULL else <uint32_t>0)
    elif what == 6:
        for i in range(4):
            ts[i] = kv.pull(keys, n, vals) if i & 1 else kv.push(keys, n, vals)
        for i in range(4):
            bad = bad if bad != 0 else kv.wait(ts[i])
        return -1 << 60 if bad != 0 else 4
    elif what == 7:
        handle = kv.prepare_sample(8)
        bad = 0 if handle >= 0 else <int>handle
        for i in range(2):
            if bad == 0:
                bad = kv.wait(kv.pull_sample(handle, drawn, 3, vals))
        if bad == 0:
            bad = kv.finish_sample(handle)
        return -1 << 60 if bad != 0 else 2
    else:
        if (kv.pull(&wrong, 1, vals) >= DONE or kv.push(&wrong, 1, vals) >= DONE or kv.localize(&wrong, 1) >= DONE
                or kv.finish_sample(-5) == 0):
            bad = -1
        return -1 << 60 if bad != 0 else 4
    return -1 << 60 if bad != 0 else 1
