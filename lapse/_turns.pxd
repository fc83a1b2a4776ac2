"""Keys in the order in which they would be drawn one after the other without replacement: what a sample goes over to when nearly all
that is drawn has been drawn before.

Design: each key gets an exponential number with its weight as rate, and the smallest comes first (Efraimidis, Spirakis, 2006). They lie
in a heap. Exponential numbers have no memory, so the order can be joined later: a key that arrives while keys are handed out gets the
time of the last one plus a number of its own, and has from then on the same right as if it had always been there. A key that is not
here when its turn comes is dropped by the caller, and joins again when it comes back.
"""
from libc.stdint cimport int64_t
from lapse._draws cimport distribution_t, rng_t
from lapse._here cimport here_t, recent_t, seen_t
from lapse._store cimport store_t
from lapse._types cimport Key

cdef struct turn_t:             # of one key
    double when
    Key key

cdef struct turns_t:
    bint begun
    turn_t* heap                # owned; the next key is the first one
    int64_t count, room
    double now                  # when the last key's turn was
    # if only keys that are here take part
    seen_t waiting              # the keys of the heap
    int64_t most                # of them
    int64_t arrivals            # that have been taken up


cdef void turns_init(turns_t* t) noexcept nogil
cdef void turns_free(turns_t* t) noexcept nogil
# Forget all; memory for more than `kept` keys is freed.
cdef void turns_clear(turns_t* t, int64_t kept) noexcept nogil
# Put all keys of the distribution in order that are not in the set. 0, or ERR_MEMORY.
cdef int turns_of_all(turns_t* t, const distribution_t* d, const seen_t* seen, rng_t* r) noexcept nogil
# Those of them that are here, of a list and recent keys (NULL: of the range), with room for `more` that will come. `arrivals`: how many
# there had been when the list, or the look that begins now, was up to date. 0, or ERR_MEMORY.
cdef int turns_of_here(turns_t* t, const store_t* s, const distribution_t* d, const here_t* l, const recent_t* recent, const seen_t* seen,
                       int64_t arrivals, int64_t more, rng_t* r) noexcept nogil
# Let what has arrived since join. 0: there is too much, and the order has to be made anew.
cdef bint turns_join(turns_t* t, const distribution_t* d, const seen_t* seen, const int64_t* log, int64_t mask, const int64_t* arrivals,
                     rng_t* r) noexcept nogil
cdef Key turns_next(turns_t* t) noexcept nogil                          # takes it out; -1: there is none
