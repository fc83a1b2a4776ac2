# Design: see _operations.pxd.
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from lapse._pins cimport pins_free
from lapse._sync cimport load_u8, store_u8
from lapse._types cimport ERR_MEMORY, Key

cdef enum:
    FEW = 8                     # keys that are compared with each other, without a table


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void**, size_t, size_t)


cdef void* aligned_zeros(size_t size) noexcept nogil:
    """Memory that shares no cache line with that of another worker. NULL: out of memory."""
    cdef void* p
    size = (size + 255) & ~<size_t>127
    if posix_memalign(&p, 128, size) != 0:
        return NULL
    memset(p, 0, size)
    return p


cdef worker_t* worker_new(uint32_t index, int64_t credit_ops, Rank num_nodes) noexcept nogil:
    cdef worker_t* w = <worker_t*>aligned_zeros(sizeof(worker_t))
    cdef int64_t size = 1, i
    if w == NULL:
        return NULL
    while size < credit_ops:
        size *= 2
    w.index = index
    w.mask = size - 1
    w.ops = <op_t*>calloc(size, sizeof(op_t))
    w.order = <Rank*>malloc(num_nodes * sizeof(Rank))
    w.heads = <int64_t*>malloc(num_nodes * sizeof(int64_t))
    w.tails = <int64_t*>malloc(num_nodes * sizeof(int64_t))
    if w.ops == NULL or w.order == NULL or w.heads == NULL or w.tails == NULL or ensure_room(w, 64) != 0:
        worker_free(w)
        return NULL
    for i in range(size):
        w.ops[i].ts = -1
    for i in range(num_nodes):
        w.heads[i] = -1
    return w


cdef void worker_free(worker_t* w) noexcept nogil:
    cdef int64_t i
    if w == NULL:
        return
    if w.ops != NULL:
        for i in range(w.mask + 1):
            free(w.ops[i].offsets)
            free(w.ops[i].under_way)
    pins_free(&w.pins)
    free(w.ops)
    free(w.misses)
    free(w.chain)
    free(w.offsets)
    free(w.seen)
    free(w.order)
    free(w.heads)
    free(w.tails)
    free(w)


cdef int ensure_room(worker_t* w, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t room = 64
    if n <= w.room:
        return 0
    while room < n:
        room *= 2
    free(w.misses)
    free(w.chain)
    free(w.offsets)
    w.room = 0
    w.misses = <uint32_t*>malloc(room * sizeof(uint32_t))
    w.chain = <uint32_t*>malloc(room * sizeof(uint32_t))
    w.offsets = <uint64_t*>malloc((room + 1) * sizeof(uint64_t))
    if w.misses == NULL or w.chain == NULL or w.offsets == NULL:
        return ERR_MEMORY
    w.room = room
    return 0


cdef int ensure_offsets(op_t* op, Py_ssize_t n) noexcept nogil:
    if n < op.offsets_room:
        return 0
    free(op.offsets)
    op.offsets_room = 0
    op.offsets = <uint64_t*>malloc((n + 1) * sizeof(uint64_t))
    if op.offsets == NULL:
        return ERR_MEMORY
    op.offsets_room = n + 1
    return 0


cdef int ensure_under_way(op_t* op, Py_ssize_t n) noexcept nogil:
    if n <= op.under_way_room:              # all zero again: an operation ends when the last of its positions has been answered
        return 0
    free(op.under_way)
    op.under_way_room = 0
    op.under_way = <uint8_t*>calloc(n, 1)
    if op.under_way == NULL:
        return ERR_MEMORY
    op.under_way_room = n
    return 0


cdef bint end_way(op_t* op, const uint32_t* positions, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, j
    for i in range(n):
        if load_u8(op.under_way + positions[i]) == 0:
            for j in range(i):
                store_u8(op.under_way + positions[j], 1)
            return False
        store_u8(op.under_way + positions[i], 0)
    return True


cdef int seen_clear(worker_t* w, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t room = 16
    while room < 2 * n:
        room *= 2
    if room > w.seen_room or 16 * room < w.seen_room:       # (a table that once was large would take long to clear for a few keys)
        free(w.seen)
        w.seen_room = 0
        w.seen = <Key*>malloc(room * sizeof(Key))
        if w.seen == NULL:
            return ERR_MEMORY
        w.seen_room = room
    memset(w.seen, 0xff, w.seen_room * sizeof(Key))         # -1, which is no key
    return 0


cdef bint seen_before(worker_t* w, Key key) noexcept nogil:
    cdef Py_ssize_t at = <Py_ssize_t>((<uint64_t>key * <uint64_t>0x9E3779B97F4A7C15) >> 32) & (w.seen_room - 1)
    while w.seen[at] != -1:
        if w.seen[at] == key:
            return True
        at = (at + 1) & (w.seen_room - 1)
    w.seen[at] = key
    return False


cdef Py_ssize_t first_repeated(worker_t* w, const Key* keys, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, j
    if n <= FEW:
        for i in range(1, n):
            for j in range(i):
                if keys[i] == keys[j]:
                    return i
        return -1
    if seen_clear(w, n) != 0:
        return ERR_MEMORY
    for i in range(n):
        if seen_before(w, keys[i]):
            return i
    return -1
