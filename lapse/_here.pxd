"""Which keys of a distribution are on this node: what the local scheme draws from when few of them are.

Design: a look over the slots of the range, without a latch, gives a list of the keys that are here, with an alias table if they do not
weigh the same. A list is never changed; threads share it, and count references under their own lock. What has arrived since goes into the
`recent_t` of each thread, out of the protocol's log of arrivals: the log is read before the look begins, and written after a key can be
seen, so no key is missed. Whoever draws looks at the key's slot again, and draws anew if it has left. So list and recent keys together stay right
while keys come and go. When many have come since, a look is due: it costs no more than a constant per arrival.
"""
from libc.stdint cimport int64_t
from lapse._draws cimport column_t, distribution_t, rng_t
from lapse._store cimport HERE, slot_word, state_of, store_t
from lapse._types cimport Key

cdef enum:
    FEW = 32                    # lists are for ranges of which less than 1 / FEW is here

cdef struct here_t:
    int64_t refs                # under the lock of whoever shares it
    int64_t arrivals            # that there had been before the look
    double weight               # of the keys that were here
    bint many                   # at least 1 / FEW of all weight: there is no list
    int64_t count               # keys that were here
    Key* keys                   # owned; in their order
    column_t* columns           # owned; NULL if all keys weigh the same

cdef struct seen_t:             # a set of keys: open addressing
    Key* keys                   # owned; mask + 1 entries, -1: free
    int64_t mask                # -1: there is no set, and whatever comes is new
    int64_t room

cdef struct recent_t:           # what has arrived since a list was made
    int64_t arrivals            # that have been looked at
    int64_t count, room         # at most `room`
    Key* keys                   # owned
    double* sums                # owned; of the weights up to each key
    seen_t known                # the same keys


cdef inline bint is_here(const store_t* s, Key key) noexcept nogil:
    return state_of(s, key, slot_word(s, key)) == HERE


# `total`: total_weight of the distribution. NULL: out of memory.
cdef here_t* look_here(const store_t* s, const distribution_t* d, double total, const int64_t* arrivals) noexcept nogil
cdef void here_free(here_t*) noexcept nogil

cdef int recent_init(recent_t* r, int64_t room) noexcept nogil                                  # 0, or ERR_MEMORY
cdef void recent_free(recent_t* r) noexcept nogil
cdef void recent_clear(recent_t* r, int64_t arrivals) noexcept nogil
# Take up what has arrived, but for what the list has. 0: there is too much, and a look is due.
cdef bint recent_update(recent_t* r, const here_t* l, const distribution_t* d, const int64_t* log, int64_t mask,
                        const int64_t* arrivals) noexcept nogil

# A key of list and recent ones by weight, whether it is still here or not. One at least has a key.
cdef Key pick_listed(const here_t* l, const recent_t* recent, rng_t* r) noexcept nogil
# By a pass over them (l NULL: over the range), a key that is here and not in the set, by weight; -1: there is none.
cdef Key pick_exactly(const store_t* s, const distribution_t* d, const here_t* l, const recent_t* recent, const seen_t* seen,
                      rng_t* r) noexcept nogil

# Is a key of the range here, and not in the set?
cdef bint any_here(const store_t* s, const distribution_t* d, const seen_t* seen) noexcept nogil

# Make a set for n keys. 0, or ERR_MEMORY.
cdef int seen_init(seen_t* seen, int64_t n) noexcept nogil
cdef bint seen_has(const seen_t* seen, Key key) noexcept nogil
# 1: it is new, and is in the set now. Without a set everything is new.
cdef bint seen_add(seen_t* seen, Key key) noexcept nogil
cdef void seen_remove(seen_t* seen, Key key) noexcept nogil
