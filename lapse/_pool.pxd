"""The pool scheme's store of draws that are ready for use, one per node: filled by one thread, emptied by the workers.

Design: a ring of keys under a mutex, which is held for a copy of some keys and never while anybody waits, allocates Python objects or
wants the GIL. A worker takes a batch at once, so that the lock is paid for once in many draws. What is under way to this node
counts as `coming`; whoever takes and finds less left, with what is coming, than `target` wakes the thread.
"""
from libc.stdint cimport int32_t, int64_t, uint32_t
from lapse._sync cimport pthread_mutex_t
from lapse._types cimport Key

cdef struct pool_t:
    pthread_mutex_t lock
    # under lock
    Key* ring                   # owned; room entries (a power of 2), of which [head, tail) are uses to hand out
    int64_t room
    int64_t head, tail          # they only grow; modulo room
    int64_t coming              # uses of the groups that are under way
    int64_t target              # uses, ready and coming, that the thread wants there to be
    int64_t taken               # uses handed to workers, less those given back
    # atomic
    int32_t ended               # 0 while the thread fills the pool, else the ERR_ code of everybody who finds the pool empty
    int32_t stop                # 1: the thread is to end
    uint32_t event              # bumped when uses have come, and at the end
    uint32_t waiting            # workers that sleep on `event`
    int64_t dry                 # how often a worker found too little: the thread fills more

cdef pool_t* pool_new() noexcept nogil                                      # NULL: out of memory
cdef void pool_free(pool_t*) noexcept nogil
# Up to `most` uses, but as few as `least` when there are not many; *low: 1 when the thread should be woken. Returns how many.
cdef int64_t pool_take(pool_t*, Key* keys, int64_t least, int64_t most, bint* low) noexcept nogil
cdef int64_t pool_ready(pool_t*) noexcept nogil                             # uses to hand out
# Uses to hand out, `coming` less of them under way, everybody who waits woken. 0, or ERR_MEMORY.
cdef int pool_put(pool_t*, const Key* keys, int64_t n, int64_t coming) noexcept nogil
# Uses that were taken and not needed: to be handed out next. 0, or ERR_MEMORY.
cdef int pool_give_back(pool_t*, const Key* keys, int64_t n) noexcept nogil
cdef void pool_end(pool_t*, int32_t code) noexcept nogil                    # nothing will be put any more
