"""The sans-I/O state machine of one node."""
cimport cython
from libc.stdint cimport uint32_t
from lapse._operations cimport op_t, worker_t
from lapse._routing cimport (BAD_ANSWER, BAD_EPOCH, BAD_FIELD, BAD_HOME, BAD_KEY, BAD_ORIGIN, BAD_SIZE, BAD_TYPE, FAULT_CACHE_FORWARD,
                             FAULT_DROP_QUEUE, FAULT_EARLY_ROW, FAULT_LATE_DIRECTORY, FAULT_LOST_UPDATE, FAULT_NO_CACHE_RULE, FAULT_NO_COPY,
                             FAULT_NO_NEXT, FAULT_NO_QUEUE, FAULT_OLD_EPOCH, FAULT_OVERWRITE_NEXT, FAULT_QUEUE_LOST, FAULT_REVERSE_QUEUE,
                             FAULT_SPLIT_ROUTE, FAULT_STALE_HOME, FINE, FINE_STEPS,
                             NO_MEMORY, NOT_COMING, NOT_HERE, OWNER_ASKS, SECOND_NEXT, SEND_FAILED, TOO_MANY_HOPS, TWICE, Router, batch_t,
                             value_offsets)
from lapse._sink cimport Sink, out_t
from lapse._transfers cimport entry_t, transfer_t
from lapse._types cimport Epoch, Key, Rank, Timestamp
from lapse._wire cimport header_t


@cython.final
cdef class Protocol(Router):
    # A message has arrived (magic, version, job, src and seq have been checked): FINE or a Violation. Server thread only.
    # `data` may be written to.
    cdef int handle(self, char* data, size_t size, Rank src) noexcept nogil

    # private to _protocol.pyx
    cdef char* copy_early(self, Key key) noexcept nogil
    cdef op_t* find_op(self, uint32_t worker, Timestamp ts) noexcept nogil
    cdef bint has_place(self, const op_t* op, uint32_t position, Key key) noexcept nogil
    cdef bint unpin(self, worker_t* w, Key key) noexcept nogil
    cdef int handle_operation(self, header_t* h, const Key* keys, const uint32_t* aux, char* vals, Rank src) noexcept nogil
    cdef int check_own(self, header_t* h, const Key* keys, const uint32_t* aux) noexcept nogil
    cdef void settle_local_localize(self, header_t* h, Py_ssize_t here) noexcept nogil
    cdef int serve_here(self, header_t* h, const Key* keys, const uint32_t* aux, char* vals, Py_ssize_t m) noexcept nogil
    cdef int send_to(self, Rank dest, out_t* out) noexcept nogil
    cdef int handle_localize(self, header_t* h, const Key* keys) noexcept nogil
    cdef int note_next(self, Key key, Rank next_owner, Epoch epoch) noexcept nogil
    cdef int handle_hand_over(self, header_t* h, const Key* keys, const uint32_t* epochs, Rank src) noexcept nogil
    cdef int send_transfer(self, Rank to, const Key* keys, const uint32_t* epochs, const uint32_t* chosen,
                           Py_ssize_t count) noexcept nogil
    cdef int handle_transfer(self, header_t* h, const Key* keys, const uint32_t* epochs, const char* vals) noexcept nogil
    cdef int arrive(self, Key key, Epoch epoch, const char* vals) noexcept nogil
    cdef int pass_on(self, header_t* h, const Key* keys, const uint32_t* epochs, Py_ssize_t moving) noexcept nogil
    cdef int apply_queue(self, transfer_t* t, Key key, char* row) noexcept nogil
    cdef int answer_entry(self, entry_t* e, Key key, const char* row) noexcept nogil
    cdef int flush_answers(self) noexcept nogil
    cdef int handle_answer(self, header_t* h, const Key* keys, const uint32_t* aux, const char* vals, Rank src) noexcept nogil
