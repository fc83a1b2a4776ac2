# Design: see _pool.pxd.
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free, malloc
from lapse._sync cimport (add_i64, add_u32, fence, load_u32, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                          pthread_mutex_unlock, set_once_i32, unpark)
from lapse._types cimport ERR_MEMORY, Key


cdef pool_t* pool_new() noexcept nogil:
    cdef pool_t* p = <pool_t*>calloc(1, sizeof(pool_t))
    if p != NULL:
        pthread_mutex_init(&p.lock, NULL)
    return p


cdef void pool_free(pool_t* p) noexcept nogil:
    if p != NULL:
        pthread_mutex_destroy(&p.lock)
        free(p.ring)
        free(p)


cdef int make_room(pool_t* p, int64_t n) noexcept nogil:
    """Room for n more; under the lock."""
    cdef int64_t room = max(p.room, <int64_t>1024), i
    cdef Key* ring
    while room < p.tail - p.head + n:
        room *= 2
    if room == p.room:
        return 0
    ring = <Key*>malloc(room * sizeof(Key))
    if ring == NULL:
        return ERR_MEMORY
    for i in range(p.head, p.tail):
        ring[i & (room - 1)] = p.ring[i & (p.room - 1)]
    free(p.ring)
    p.ring = ring
    p.room = room
    return 0


cdef int64_t pool_take(pool_t* p, Key* keys, int64_t least, int64_t most, bint* low) noexcept nogil:
    cdef int64_t n, i
    pthread_mutex_lock(&p.lock)
    # of a small pool everybody takes what he needs; of a large one up to an eighth
    n = min(p.tail - p.head, max(least, min(most, (p.tail - p.head) // 8)))
    for i in range(n):
        keys[i] = p.ring[(p.head + i) & (p.room - 1)]
    p.head += n
    p.taken += n
    low[0] = p.tail - p.head + p.coming < p.target
    if n < least:
        add_i64(&p.dry, 1)
        low[0] = True
    pthread_mutex_unlock(&p.lock)
    return n


cdef int64_t pool_ready(pool_t* p) noexcept nogil:
    cdef int64_t n
    pthread_mutex_lock(&p.lock)
    n = p.tail - p.head
    pthread_mutex_unlock(&p.lock)
    return n


cdef void rouse(pool_t* p) noexcept nogil:
    add_u32(&p.event, 1)
    fence()                                 # pairs with the one between `waiting` and the last look of whoever waits
    if load_u32(&p.waiting):
        unpark(&p.event)


cdef int pool_put(pool_t* p, const Key* keys, int64_t n, int64_t coming) noexcept nogil:
    cdef int rc
    cdef int64_t i
    pthread_mutex_lock(&p.lock)
    rc = make_room(p, n)
    if rc == 0:
        for i in range(n):
            p.ring[(p.tail + i) & (p.room - 1)] = keys[i]
        p.tail += n
    p.coming -= coming
    pthread_mutex_unlock(&p.lock)
    rouse(p)
    return rc


cdef int pool_give_back(pool_t* p, const Key* keys, int64_t n) noexcept nogil:
    cdef int rc = 0
    cdef int64_t i
    if n == 0:
        return 0
    pthread_mutex_lock(&p.lock)
    rc = make_room(p, n)
    if rc == 0:
        for i in range(n):
            p.ring[(p.head - n + i) & (p.room - 1)] = keys[i]
        p.head -= n
        p.taken -= n
    pthread_mutex_unlock(&p.lock)
    rouse(p)
    return rc


cdef void pool_end(pool_t* p, int32_t code) noexcept nogil:
    set_once_i32(&p.ended, code)
    rouse(p)
