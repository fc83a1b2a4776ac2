"""The sampling schemes: what each worker has of its own (`Sampler`: random numbers, handles). What they share is in _schemes.pxd."""
cimport cython
from libc.stdint cimport int32_t, int64_t, uint64_t
from lapse._draws cimport distribution_t, rng_t
from lapse._here cimport here_t, recent_t, seen_t
from lapse._operations cimport worker_t
from lapse._schemes cimport LOCAL, NAIVE, POOL, PRELOC, Sampling
from lapse._store cimport store_t
from lapse._turns cimport turns_t
from lapse._types cimport Key

cdef enum:
    DRY = 1                     # result of Sampler.draw: the pool is empty; wait for it, and draw the rest
    SLOT_BITS = 24              # of a handle's number; the others are its turn
    TURN_BITS = 27              # a slot's turns count up, from the number of the Sampler shifted by these
    MOST_SAMPLERS = 4096        # that are told apart

cdef struct run_t:              # keys in order, taken from `begin`
    Key* keys                   # owned
    int64_t begin, end, room

cdef struct handle_t:
    int64_t turn                # first_turn, and how often the slot has been used before
    int64_t left                # draws not handed out yet; -1: the slot is free
    run_t drawn                 # preloc: all draws. pool: those postponed
    seen_t seen                 # without replacement: what has been drawn
    int64_t barren              # local, without replacement: arrivals at which there was nothing more to draw; -1: never
    int32_t next_free
    int tries                   # local: candidates until a draw looks over the range; 0: what is left is in order
    # seldom looked at
    turns_t rest                # without replacement, when nearly all keys have been drawn: the others in order
    turns_t turns               # local: the same of those that are here


@cython.final
cdef class Sampler:
    cdef:
        Sampling sampling
        store_t* store          # borrowed from sampling.protocol
        worker_t* w             # borrowed from sampling.protocol: counters
        distribution_t* d       # borrowed from sampling
        rng_t rng
        object generator        # numpy's, for a callable
        readonly object error   # what the callable raised
        uint64_t stream
        int64_t first_turn      # of all slots
        int tries               # of a new handle
        handle_t* handles       # owned; used of room
        int64_t used, room
        int32_t free_handle     # -1: none
        run_t ahead             # draws of the distribution that come next: a callable's, or candidates of the local scheme
        run_t uses              # POOL: taken from the pool, not used yet
        int64_t barren          # LOCAL: arrivals at which nothing was here, -1: never
        here_t* listed          # LOCAL: shared; NULL while enough is local
        recent_t recent         # LOCAL: what has come since that list was made
        int64_t effort          # LOCAL: keys passed over because most of the list has left
        bint low                # POOL: the thread that fills the pool should be woken
    # A handle >= 0 for n draws, ERR_MEMORY, ERR_DRAW, or ERR_SAMPLE_COUNT (n < 0, or more different keys than there are).
    cdef int64_t prepare(self, int64_t n) noexcept nogil
    # The next n draws: 0, DRY after the first *done of them, or an ERR_ code and nothing drawn.
    cdef int draw(self, int64_t handle, Key* keys, Py_ssize_t n, Py_ssize_t* done) noexcept nogil
    # LOCAL, with replacement: a key in place of one that has left meanwhile. 1, or 0 when nothing is here, or ERR_DRAW, ERR_MEMORY.
    cdef int redraw(self, Key* key) noexcept nogil
    # POOL: take back what an unfinished draw has handed out; the handle gives it again.
    cdef int undo(self, int64_t handle, const Key* keys, Py_ssize_t n) noexcept nogil
    # Draws not handed out yet, or ERR_SAMPLE.
    cdef int64_t left_of(self, int64_t handle) noexcept nogil
    cdef int finish(self, int64_t handle) noexcept nogil                    # 0, or ERR_SAMPLE
    # Independent draws of the distribution; 0, or ERR_DRAW, ERR_MEMORY.
    cdef int raw(self, Key* keys, Py_ssize_t n) noexcept nogil
    # The keys of a preloc handle.
    cdef const Key* prepared(self, int64_t handle) noexcept nogil
    cdef void give_up(self) noexcept nogil                                  # nothing will be drawn any more
    # private
    cdef handle_t* find(self, int64_t handle, int* code) noexcept nogil
    cdef handle_t* new_handle(self, int64_t n) noexcept nogil
    cdef void close(self, handle_t* h) noexcept nogil
    cdef int call(self) noexcept nogil
    cdef int distinct(self, handle_t* h, Key* keys, Py_ssize_t n) noexcept nogil
    cdef int call_function(self) noexcept with gil
    cdef void repeats(self, int64_t times) noexcept with gil
    cdef int here(self, handle_t* h, Key* key) noexcept nogil
    cdef int local_key(self, handle_t* h, Key* key) noexcept nogil
    cdef int candidate(self, seen_t* seen, Key* key, int most) noexcept nogil
    cdef int look_ahead(self) noexcept nogil
    cdef int from_list(self, handle_t* h, Key* key) noexcept nogil
    cdef int scarce(self, handle_t* h, Key* key) noexcept nogil
    cdef int exactly(self, handle_t* h, Key* key) noexcept nogil
    cdef int order_turns(self, handle_t* h) noexcept nogil
    cdef int next_turn(self, handle_t* h, Key* key) noexcept nogil
    cdef bint catch_up(self) noexcept nogil
    cdef Key pick(self, const seen_t* seen) noexcept nogil
    cdef void refresh(self) noexcept nogil
    cdef int from_pool(self, handle_t* h, Key* keys, Py_ssize_t n, Py_ssize_t* done) noexcept nogil
    cdef int next_use(self, handle_t* h, int64_t wanted, Key* key) noexcept nogil
