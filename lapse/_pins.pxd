"""The cache rule's memory: by which route a worker's unanswered operations on a key went.

Design: with location caches, two operations of one worker on one key must not travel by different routes, or the second could
overtake the first. A pin counts, per worker and key, the positions under way and remembers their route. The issuing thread adds,
the server thread removes; a spin lock guards the table, which holds unanswered keys only and is not touched without caches.
"""
from libc.stdint cimport int32_t, int64_t
from lapse._types cimport Key, Rank

cdef struct pin_t:
    Key key                     # -1: free place
    Rank route
    bint cached                 # the route was a guess of the location cache; else it is the home
    int64_t count               # unanswered positions

cdef struct pins_t:
    int32_t lock                # atomic
    int64_t cached              # atomic; pins with a cached route; the fast path tests this one word
    pin_t* places               # owned; open addressing with linear probing, mask + 1 places; NULL until needed
    int64_t mask
    int64_t used


cdef void pins_free(pins_t*) noexcept nogil
# A copy of the key's pin in *out: 1, or 0 when it has none.
cdef bint pin_find(pins_t*, Key key, pin_t* out) noexcept nogil
# One more position on this route (the key's pin, if it has one, must name the same): 0 or ERR_MEMORY.
cdef int pin_add(pins_t*, Key key, Rank route, bint cached) noexcept nogil
# One position has been answered: 0, or -1 when the key has no pin.
cdef int pin_drop(pins_t*, Key key) noexcept nogil
