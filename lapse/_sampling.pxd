"""The sampling schemes: what a node shares (`Sampling`), and what each worker has of its own (`Sampler`: random numbers, handles)."""
cimport cython
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from lapse._draws cimport distribution_t, rng_t
from lapse._here cimport here_t, recent_t, seen_t
from lapse._node_state cimport NodeState
from lapse._operations cimport worker_t
from lapse._pool cimport pool_t
from lapse._store cimport store_t
from lapse._sync cimport pthread_mutex_t
from lapse._types cimport Key

cdef enum Scheme:
    NAIVE
    PRELOC
    POOL
    LOCAL

cdef enum:
    DRY = 1                     # result of Sampler.draw: the pool is empty; wait for it, and draw the rest
    SLOT_BITS = 24              # of a handle's number; the others count how often the slot has been used

cdef struct run_t:              # keys in order, taken from `begin`
    Key* keys                   # owned
    int64_t begin, end, room

cdef struct handle_t:
    int64_t turn                # how often the slot has been used before
    int64_t left                # draws not handed out yet; -1: the slot is free
    run_t drawn                 # preloc: all draws. pool: those postponed
    run_t rest                  # without replacement, when nearly all keys have been drawn: the others in the order of their turn
    bint ordered                # `rest` is in use
    seen_t seen                 # without replacement: what has been drawn
    int64_t barren              # local, without replacement: arrivals at which there was nothing more to draw; -1: never
    int32_t next_free


@cython.final
cdef class Sampling:
    cdef:
        readonly int scheme     # Scheme
        readonly bint with_replacement
        readonly bint postpone
        readonly int64_t group_size
        readonly int64_t reuse
        readonly int64_t batch_size
        readonly object seed
        NodeState protocol
        int pid                 # of the process that made it
        distribution_t d        # owned
        double total            # total_weight
        object function         # FUNCTION: the callable
        readonly size_t longest # bytes of the longest visible value of the range
        readonly bint uniform   # all values of the range are equally long
        dict streams            # {label of a worker: how many Samplers have it}; under the GIL
        pool_t* pool            # owned; POOL
        worker_t* filler        # borrowed from protocol; of the thread that fills the pool, NULL: there is none yet
        public object error     # what the pool's callable raised
        int64_t recent_room     # LOCAL: arrivals after which a look is due
        pthread_mutex_t lock    # guards latest, and refs of all lists
        here_t* latest          # the last list of local keys
    cdef here_t* list_of_now(self, here_t* old) noexcept nogil
    cdef void unlist(self, here_t* l) noexcept nogil
    cdef void let_go(self, here_t* l) noexcept nogil


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
    cdef int order_rest(self, handle_t* h) noexcept nogil
    cdef int call_function(self) noexcept with gil
    cdef void repeats(self, int64_t times) noexcept with gil
    cdef int here(self, handle_t* h, Key* key) noexcept nogil
    cdef int local_key(self, handle_t* h, Key* key) noexcept nogil
    cdef int candidate(self, seen_t* seen, Key* key, int most) noexcept nogil
    cdef int look_ahead(self) noexcept nogil
    cdef Key from_list(self, const seen_t* seen) noexcept nogil
    cdef bint catch_up(self) noexcept nogil
    cdef Key pick(self, const seen_t* seen) noexcept nogil
    cdef void refresh(self) noexcept nogil
    cdef int from_pool(self, handle_t* h, Key* keys, Py_ssize_t n, Py_ssize_t* done) noexcept nogil
    cdef int next_use(self, handle_t* h, int64_t wanted, Key* key) noexcept nogil
