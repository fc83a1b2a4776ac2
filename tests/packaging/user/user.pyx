"""A user's own module, compiled out of the tree against the installed package: every method of the C level of a Worker, without the GIL.

`exercise` takes a lapse.Worker of a job of one node with num_keys >= 8 and two float32 values per key; it raises AssertionError where a
result is not the right one. The keys start as zeros.
"""
from lapse cimport Key, Worker


cdef int primitives(Worker kv) noexcept nogil:
    """Push, set, localize, pull; 0, or the number of the step that went wrong."""
    cdef Key[3] keys = [1, 3, 5]
    cdef float[6] ones = [1, 1, 1, 1, 1, 1]
    cdef float[6] got
    if kv.wait(kv.push(keys, 3, ones)):
        return 1
    if kv.wait_for(kv.set(keys + 1, 1, ones), -1):
        return 2
    if kv.wait(kv.localize(keys, 3)):
        return 3
    kv.push(keys, 3, ones)
    if kv.waitall() or kv.waitall_for(1000000000):
        return 4
    if kv.wait(kv.pull(keys, 3, got)):
        return 5
    for i in range(6):
        if got[i] != 2:
            return 6
    if kv.is_finished(-1) != 1:
        return 7
    return 0


cdef int local(Worker kv) noexcept nogil:
    """What needs no message: look-ups, pull_if_local, rows in place; 0, or the number of the step that went wrong."""
    cdef Key[2] keys = [1, 6]
    cdef float[4] got
    cdef void* rows[2]
    if not kv.is_local(1) or kv.value_length(1) != 2 or kv.num_keys() < 8:
        return 11
    if kv.acquire(keys, 2, rows) != 2:
        return 12
    (<float*>rows[0])[1] += 5
    (<float*>rows[1])[0] = 7
    if kv.release(3):
        return 13
    if kv.pull_if_local(keys, 2, got) != 1:
        return 14
    if got[0] != 2 or got[1] != 7 or got[2] != 7 or got[3] != 0:
        return 15
    return kv.barrier()


def exercise(Worker kv):
    cdef int step
    with nogil:
        step = primitives(kv)
        if step == 0:
            step = local(kv)
    if step:
        raise AssertionError(f"step {step} went wrong")
