# Design: plain malloc; entries live for the milliseconds that a key is under way, and glibc's thread caches make them cheap. The locking is
# the caller's: a transfer is reached through its key's slot word and guarded by that key's latch.
from libc.stdlib cimport free, malloc


cdef transfer_t* transfer_new(Epoch last_epoch) noexcept nogil:
    cdef transfer_t* t = <transfer_t*>malloc(sizeof(transfer_t))
    if t != NULL:
        t.last_epoch = last_epoch
        t.next_owner = -1
        t.next_epoch = 0
        t.first = t.last = NULL
        t.own.embedded = True
        t.own.next = NULL
        t.own.value_bytes = 0
    return t


cdef void transfer_free(transfer_t* t) noexcept nogil:
    cdef entry_t* e = t.first
    cdef entry_t* following
    while e != NULL:
        following = e.next
        entry_free(e)
        e = following
    free(t)


cdef entry_t* entry_new(size_t value_bytes) noexcept nogil:
    cdef entry_t* e = <entry_t*>malloc(sizeof(entry_t) + value_bytes)
    if e != NULL:
        e.next = NULL
        e.embedded = False
        e.value_bytes = value_bytes
    return e


cdef void entry_free(entry_t* e) noexcept nogil:
    if not e.embedded:
        free(e)


cdef void transfer_append(transfer_t* t, entry_t* e) noexcept nogil:
    if t.last == NULL:
        t.first = e
    else:
        t.last.next = e
    t.last = e


cdef void transfer_prepend(transfer_t* t, entry_t* e) noexcept nogil:
    e.next = t.first
    t.first = e
    if t.last == NULL:
        t.last = e
