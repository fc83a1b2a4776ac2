# cython: language_level=3
from lapse cimport Key, Worker


def relocate(Worker kv):
    cdef Key[3] keys = [1, 3, 5]
    cdef float[6] ones = [1, 2, 1, 2, 1, 2]
    cdef float[6] pulled, localized
    with nogil:
        kv.wait(kv.push(keys, 3, ones))         # each call returns at once, with a timestamp to wait for
        kv.barrier()
        kv.pull(keys, 3, pulled)
        kv.localize(keys, 3)
        kv.pull(keys, 3, localized)             # three operations under way, seen in this order
        kv.waitall()
    return pulled, localized
