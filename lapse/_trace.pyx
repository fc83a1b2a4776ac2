# Design: see _trace.pxd.
from libc.stdlib cimport calloc, free, realloc
from lapse._sync cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock


cdef trace_t* trace_new(Key num_keys) noexcept nogil:
    cdef trace_t* t = <trace_t*>calloc(1, sizeof(trace_t))
    if t == NULL:
        return NULL
    t.chosen = <uint8_t*>calloc((num_keys + 7) // 8, 1)
    if t.chosen == NULL:
        free(t)
        return NULL
    pthread_mutex_init(&t.mutex, NULL)
    return t


cdef void trace_free(trace_t* t) noexcept nogil:
    if t != NULL:
        pthread_mutex_destroy(&t.mutex)
        free(t.chosen)
        free(t.events)
        free(t)


cdef void trace_choose(trace_t* t, Key key) noexcept nogil:
    t.chosen[key >> 3] |= <uint8_t>(1 << (key & 7))


cdef void trace_add(trace_t* t, int64_t when, Key key, Rank peer, Epoch epoch, bint arrived) noexcept nogil:
    cdef event_t* more
    cdef event_t* e
    if not t.chosen[key >> 3] >> (key & 7) & 1:
        return
    pthread_mutex_lock(&t.mutex)
    if t.used == t.room:
        more = <event_t*>realloc(t.events, (2 * t.room + 1024) * sizeof(event_t))
        if more != NULL:
            t.events = more
            t.room = 2 * t.room + 1024
    if t.used < t.room:
        e = t.events + t.used
        t.used += 1
        e.when, e.key, e.peer, e.epoch, e.arrived = when, key, peer, epoch, arrived
    else:
        t.lost += 1
    pthread_mutex_unlock(&t.mutex)


cdef list trace_drain(trace_t* t):
    cdef int64_t i
    cdef event_t* events
    cdef int64_t used
    pthread_mutex_lock(&t.mutex)
    events, used = t.events, t.used
    t.events = NULL
    t.used = t.room = 0
    pthread_mutex_unlock(&t.mutex)
    drained = [(events[i].when, events[i].key, "arrived" if events[i].arrived else "left", events[i].peer, events[i].epoch)
               for i in range(used)]
    free(events)
    return drained
