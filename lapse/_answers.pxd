"""Answers to operations that waited for keys: collected while a message is handled, sent when it is done.

Design: a queue that is applied holds operations of many workers, and many positions of one operation. So answers are gathered by
operation, in memory that is used again for the next message. For the server thread alone.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from lapse._types cimport Key, Rank, Timestamp

cdef struct answer_t:           # the answers to one operation that the message in hand gives rise to
    Rank origin
    uint32_t worker
    Timestamp ts
    int kind
    int64_t count
    Key* keys                   # owned, with positions; used only when origin is another node
    uint32_t* positions
    int64_t room
    char* values                # owned
    size_t value_bytes
    size_t value_room

cdef struct answers_t:
    answer_t* list              # owned
    int used, room


cdef void answers_free(answers_t*) noexcept nogil
# The answer to this operation, with room in its frame for one more value of `size` bytes. NULL: out of memory.
cdef answer_t* answer_to(answers_t*, Rank origin, uint32_t worker, Timestamp ts, int kind, size_t size) noexcept nogil
# One more position, for another node; row NULL: without a value. 0 or ERR_MEMORY. (The caller counts it.)
cdef int answer_add(answer_t*, Key key, uint32_t position, const char* row, size_t size) noexcept nogil
# Keys, positions and values of a collected answer, behind the header of its message.
cdef void answer_copy(const answer_t*, char* p) noexcept nogil
# The header of a message whose keys, positions or epochs, and values follow.
cdef void write_header(char* data, int kind, uint32_t origin, uint32_t worker, uint64_t ts, size_t count, size_t value_bytes) noexcept nogil
