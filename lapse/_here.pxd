"""Which keys of a distribution are on this node: what the local scheme draws from when few of them are.

Design: a look over the slots of the range, without a latch, gives a list of the keys that are here, with an alias table if they do not
weigh the same. A list is never changed; threads share it, by a count of references under their own lock. Whoever draws from it looks at the
key's slot again, and a key that has left is drawn anew: so the list stays right while keys leave, and lacks what has arrived since
`arrivals` was read, before the look began.
"""
from libc.stdint cimport int64_t
from lapse._draws cimport column_t, distribution_t, rng_t
from lapse._store cimport HERE, slot_word, state_of, store_t
from lapse._types cimport Key

cdef enum:
    FEW = 32                    # lists are for ranges of which less than 1 / FEW is here

cdef struct here_t:
    int64_t refs                # under the lock of whoever shares it
    int64_t arrivals            # Protocol.arrivals, before the look
    int64_t looked              # nanoseconds, when the look began
    int64_t cost                # nanoseconds that it took
    double share                # of all weight that is here
    int64_t count               # keys that are here
    Key* keys                   # owned; NULL if share >= 1 / FEW
    column_t* columns           # owned; NULL if all keys weigh the same

cdef struct seen_t:             # keys of a handle that may not come again: open addressing
    Key* keys                   # owned; mask + 1 entries, -1: free
    int64_t mask                # -1: whatever comes is new
    int64_t room


cdef inline bint is_here(const store_t* s, Key key) noexcept nogil:
    return state_of(s, key, slot_word(s, key)) == HERE


# `total`: total_weight of the distribution. NULL: out of memory.
cdef here_t* look_here(const store_t* s, const distribution_t* d, double total, const int64_t* arrivals) noexcept nogil
cdef void here_free(here_t*) noexcept nogil
# A key of the list by weight, whether it is still here or not.
cdef Key pick_listed(const here_t* l, rng_t* r) noexcept nogil
# By a pass over the list (NULL: over the range), a key that is here and has not been seen, by weight; -1: there is none.
cdef Key pick_exactly(const store_t* s, const distribution_t* d, const here_t* l, const seen_t* seen, rng_t* r) noexcept nogil

# Make a set for n keys. 0, or ERR_MEMORY.
cdef int seen_init(seen_t* seen, int64_t n) noexcept nogil
cdef bint seen_has(const seen_t* seen, Key key) noexcept nogil
# 1: it is new, and is in the set now. Without a set everything is new.
cdef bint seen_add(seen_t* seen, Key key) noexcept nogil
