# Design: a Sampler belongs to one worker thread and shares no lock with others; it knows of no sockets and never waits, so that the
# simulation runs it, too. What has to be sent or waited for is its caller's part: preloc's localize, and the pool when it is empty (DRY).
#
# naive     draws when asked, out of the distribution.
# preloc    draws when prepared; the keys wait in the handle.
# pool      hands out what one thread per node has drawn and localized (see _pool.pxd, _refill.pyx).
# local     draws until a key is here: of the local keys each comes with its share of their weight. When few are here, it draws from a
#           list of them instead (see _here.pxd); with nothing local, a draw like a naive one, which is counted.
#
# Without replacement a handle has a set of what it has drawn, and draws again what is in it. When that does not help any more, the other
# keys are put in the order of exponential numbers with their weights as rates, which is the order in which they would be drawn one after
# the other (Efraimidis, Spirakis, 2006).
#
# Locking: Sampling.lock guards the list that workers share; it is held for a look over the range, and for nothing else.
import os

import numpy as np

cimport cython
cimport numpy as cnp
from libc.math cimport log
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memcpy, memmove, memset
from posix.unistd cimport getpid
from lapse._draws cimport (FUNCTION, LOG_UNIFORM, UNIFORM, WEIGHTS, distribution_free, distribution_init, draw_keys, next_fraction,
                           seed_numbers, total_weight, weight_of)
from lapse._here cimport (any_here, here_free, is_here, look_here, pick_exactly, pick_listed, recent_clear, recent_free, recent_init,
                          recent_update, seen_add, seen_has, seen_init, seen_remove)
from lapse._pool cimport pool_free, pool_give_back, pool_new, pool_take
from lapse._store cimport expect_slot, visible_bytes
from lapse._sync cimport (load_i64, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
                          unlikely)
from lapse._types cimport ERR_DRAW, ERR_MEMORY, ERR_SAMPLE, ERR_SAMPLE_COUNT, Key

from lapse.errors import KeyRangeError

cnp.import_array()

SCHEMES = {"naive": NAIVE, "preloc": PRELOC, "pool": POOL, "local": LOCAL}

cdef enum:
    AHEAD = 32                  # candidates drawn at once, whose slots are on their way to the cache meanwhile
    TRIES = 512                 # candidates until the local scheme looks over the range: fewer than one in 32 will be here
    TRIES_OF_FUNCTION = 4096    # the same of a callable, whose weights are not known
    LISTED_TRIES = 64           # draws out of a list of which most have left
    REPEATED = 64               # draws in a row that have been seen, until the rest is put in order
    REPEATED_OF_FUNCTION = 1000000
    BATCH = 64                  # uses that a worker takes from the pool at once
    KEEP = 4096                 # keys of a closed handle's memory that are kept
    RECENT = 256                # an arrival is worth a look at so many keys

cdef seen_t NOTHING_SEEN
NOTHING_SEEN.keys = NULL
NOTHING_SEEN.mask = -1
NOTHING_SEEN.room = 0

cdef struct turn_t:             # of one key, in order_rest
    double when
    Key key


# --- what the workers of a node share ----------------------------------------------------------------------------------------

@cython.final
cdef class Sampling:
    """The settings of `Server.enable_sampling_support`, checked there, and the distribution.

    distribution: "uniform", "log-uniform", a float64 array of high - low weights, or a callable. seed: in [0, 2**64), or None.
    """

    def __cinit__(self, NodeState protocol not None, scheme, bint with_replacement, distribution, Key low, Key high, *, seed=None,
                  int64_t group_size=250, int64_t reuse=1, bint postpone=False, int64_t batch_size=10000):
        cdef cnp.ndarray weights
        cdef const double* w = NULL
        cdef int kind
        cdef size_t size
        cdef Key key
        pthread_mutex_init(&self.lock, NULL)
        self.protocol = protocol
        self.pid = getpid()
        self.scheme = SCHEMES[scheme]
        self.with_replacement = with_replacement
        self.postpone = postpone
        self.group_size, self.reuse, self.batch_size = group_size, reuse, batch_size
        self.seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self.streams = {}
        if callable(distribution):
            self.function = distribution
            kind = FUNCTION
        elif isinstance(distribution, str):
            kind = {"uniform": UNIFORM, "log-uniform": LOG_UNIFORM}[distribution]
        else:
            weights = np.ascontiguousarray(distribution, dtype=np.float64)
            if cnp.PyArray_SIZE(weights) != high - low:
                raise ValueError("a weight per key")
            w = <const double*>cnp.PyArray_DATA(weights)
            kind = WEIGHTS
        if distribution_init(&self.d, kind, low, high, w, self.scheme == LOCAL or not with_replacement) != 0:
            raise MemoryError(f"no memory for the weights of {high - low} keys")
        self.total = total_weight(&self.d) if kind != WEIGHTS or self.d.weights != NULL else 0.0
        self.uniform = True
        self.longest = visible_bytes(protocol.store, low)
        if protocol.store.visible != NULL:
            for key in range(low, high):
                size = visible_bytes(protocol.store, key)
                self.uniform = self.uniform and size == self.longest
                self.longest = max(size, self.longest)
        if self.scheme == POOL:
            self.pool = pool_new()
            if self.pool == NULL:
                raise MemoryError("no memory for the pool")
        elif self.scheme == LOCAL:
            self.recent_room = max(64, (high - low) // RECENT)
            size = 1024
            while size < 4 * <size_t>self.recent_room:
                size *= 2
            if protocol.watch(low, high, <int64_t>size) != 0:
                raise MemoryError("no memory to note arrivals")

    def __dealloc__(self):
        here_free(self.latest)
        pool_free(self.pool)
        distribution_free(&self.d)
        pthread_mutex_destroy(&self.lock)

    @property
    def pooled(self):
        """Whether a thread has to fill the pool."""
        return self.scheme == POOL

    @property
    def support(self):
        """How many keys can be drawn."""
        return self.d.support

    def stream_of(self, label):
        """The number of the stream for a worker with this label: the same in every run, another one for each worker of a node."""
        number = label.__index__() & 0xffffffff if hasattr(label, "__index__") else 0xffffffff
        count = self.streams[number] = self.streams.get(number, 0) + 1
        return number << 32 | count & 0xffffffff

    cdef here_t* list_of_now(self, here_t* old) noexcept nogil:
        """A list that is better than `old`, which is let go; old itself when there is no memory."""
        cdef here_t* l
        pthread_mutex_lock(&self.lock)
        l = self.latest
        if l == NULL or l == old or l.many or load_i64(&self.protocol.arrivals) - l.arrivals > self.recent_room // 2:
            l = look_here(self.protocol.store, &self.d, self.total, &self.protocol.arrivals)
            if l != NULL:
                l.refs = 1
                self.unlist(self.latest)
                self.latest = l
        if l != NULL:
            l.refs += 1
            self.unlist(old)
            old = l
        pthread_mutex_unlock(&self.lock)
        return old

    cdef void unlist(self, here_t* l) noexcept nogil:
        if l != NULL:
            l.refs -= 1
            if l.refs == 0:
                here_free(l)

    cdef void let_go(self, here_t* l) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.unlist(l)
        pthread_mutex_unlock(&self.lock)


def checked_draws(keys, n, low, high):
    """What a callable has drawn, as an int64 array; TypeError, ValueError or KeyRangeError when that is not n keys in [low, high)."""
    keys = np.asarray(keys)
    if keys.dtype.kind not in "iu":
        raise TypeError(f"the callable must give an array of ints, not of {keys.dtype}")
    if keys.shape != (n,):
        raise ValueError(f"the callable must give {n} keys, not an array of shape {keys.shape}")
    wrong = (keys < low) | (keys >= high)
    if wrong.any():
        raise KeyRangeError(f"the callable has drawn key {keys[wrong][0]}, which is not in [{low}, {high})")
    return np.ascontiguousarray(keys, dtype=np.int64)


# --- runs of keys ----------------------------------------------------------------------------------------------------------

cdef int run_room(run_t* run, int64_t n) noexcept nogil:
    """Room for n more behind what is there. 0, or ERR_MEMORY."""
    cdef int64_t length = run.end - run.begin, room
    cdef Key* keys
    if run.end + n <= run.room:
        return 0
    if length + n <= run.room // 2:
        memmove(run.keys, run.keys + run.begin, length * sizeof(Key))
    else:
        room = max(2 * (length + n), <int64_t>32)
        keys = <Key*>malloc(room * sizeof(Key))
        if keys == NULL:
            return ERR_MEMORY
        if length > 0:
            memcpy(keys, run.keys + run.begin, length * sizeof(Key))
        free(run.keys)
        run.keys = keys
        run.room = room
    run.begin, run.end = 0, length
    return 0


cdef void run_clear(run_t* run) noexcept nogil:
    run.begin = run.end = 0
    if run.room > KEEP:
        free(run.keys)
        run.keys = NULL
        run.room = 0


cdef void forget(handle_t* h, const Key* keys, Py_ssize_t n) noexcept nogil:
    """A call has failed after it had drawn these: they may be drawn again."""
    cdef Py_ssize_t i
    for i in range(n):
        seen_remove(&h.seen, keys[i])


cdef int earlier(const void* a, const void* b) noexcept nogil:
    cdef double x = (<const turn_t*>a).when, y = (<const turn_t*>b).when
    return -1 if x < y else x > y


# --- what a worker has ------------------------------------------------------------------------------------------------------

@cython.final
@cython.no_gc_clear
cdef class Sampler:
    """One worker's draws. One thread at a time."""

    def __cinit__(self, Sampling sampling not None, stream):
        self.sampling = sampling
        self.store = sampling.protocol.store
        self.d = &sampling.d
        self.free_handle = -1
        self.barren = -1
        self.recent.known.mask = -1
        if sampling.scheme == LOCAL and recent_init(&self.recent, sampling.recent_room) != 0:
            raise MemoryError("no memory for a worker's draws")
        self.stream = stream
        seed_numbers(&self.rng, sampling.seed, sampling.protocol.me, self.stream)

    def __dealloc__(self):
        cdef int64_t i
        self.give_up()
        for i in range(self.used):
            free(self.handles[i].drawn.keys)
            free(self.handles[i].rest.keys)
            free(self.handles[i].seen.keys)
        free(self.handles)
        free(self.ahead.keys)
        free(self.uses.keys)
        recent_free(&self.recent)

    cdef void give_up(self) noexcept nogil:
        cdef int64_t i
        if getpid() != self.sampling.pid:       # a forked child: its copies of the locks may be taken for ever
            return
        for i in range(self.used):
            if self.handles[i].left >= 0:
                self.close(self.handles + i)
        if self.sampling.pool != NULL:
            pool_give_back(self.sampling.pool, self.uses.keys + self.uses.begin, self.uses.end - self.uses.begin)
            self.uses.begin = self.uses.end = 0
        if self.listed != NULL:
            self.sampling.let_go(self.listed)
            self.listed = NULL

    # --- handles

    cdef handle_t* find(self, int64_t handle, int* code) noexcept nogil:
        """The open handle of this number; NULL, and ERR_SAMPLE for one that never was, ERR_SAMPLE_COUNT for one that is closed."""
        cdef int64_t slot = handle & ((1 << SLOT_BITS) - 1), turn = handle >> SLOT_BITS
        cdef handle_t* h
        if unlikely(handle < 0 or slot >= self.used):
            code[0] = ERR_SAMPLE
            return NULL
        h = self.handles + slot
        if unlikely(turn > h.turn or (turn == h.turn and h.left < 0)):
            code[0] = ERR_SAMPLE
            return NULL
        if unlikely(turn < h.turn):
            code[0] = ERR_SAMPLE_COUNT
            return NULL
        return h

    cdef handle_t* new_handle(self, int64_t n) noexcept nogil:
        """A handle for n draws. NULL: out of memory."""
        cdef handle_t* h
        cdef handle_t* more
        if self.free_handle < 0:
            if self.used == self.room:
                if self.used >> SLOT_BITS:
                    return NULL
                more = <handle_t*>realloc(self.handles, (2 * self.room + 8) * sizeof(handle_t))
                if more == NULL:
                    return NULL
                self.handles = more
                self.room = 2 * self.room + 8
            h = self.handles + self.used
            memset(h, 0, sizeof(handle_t))
            h.left = -1
            h.seen.mask = -1
            h.next_free = -1
            self.free_handle = <int32_t>self.used
            self.used += 1
        h = self.handles + self.free_handle
        if not self.sampling.with_replacement and seen_init(&h.seen, n) != 0:
            return NULL
        if self.sampling.scheme == PRELOC and run_room(&h.drawn, n) != 0:
            return NULL
        self.free_handle = h.next_free
        h.left = n
        h.barren = -1
        h.ordered = False
        return h

    cdef void close(self, handle_t* h) noexcept nogil:
        cdef int64_t n = h.drawn.end - h.drawn.begin
        if self.sampling.pool != NULL and n > 0:
            if run_room(&self.uses, n) == 0:
                memcpy(self.uses.keys + self.uses.end, h.drawn.keys + h.drawn.begin, n * sizeof(Key))
                self.uses.end += n
        run_clear(&h.drawn)
        run_clear(&h.rest)
        if h.seen.room > KEEP:
            free(h.seen.keys)
            h.seen.keys = NULL
            h.seen.room = 0
            h.seen.mask = -1
        h.left = -1
        h.turn += 1
        h.next_free = self.free_handle
        self.free_handle = <int32_t>(h - self.handles)

    cdef int64_t prepare(self, int64_t n) noexcept nogil:
        cdef handle_t* h
        cdef int rc
        if n < 0 or (not self.sampling.with_replacement and n > self.d.support):
            return ERR_SAMPLE_COUNT
        h = self.new_handle(n)
        if h == NULL:
            return ERR_MEMORY
        if self.sampling.scheme == PRELOC:
            rc = self.raw(h.drawn.keys, n) if self.sampling.with_replacement else self.distinct(h, h.drawn.keys, n)
            if rc != 0:
                self.close(h)
                return rc
            h.drawn.end = n
        return h.turn << SLOT_BITS | (h - self.handles)

    cdef int64_t left_of(self, int64_t handle) noexcept nogil:
        cdef int code = 0
        cdef handle_t* h = self.find(handle, &code)
        if h != NULL:
            return h.left
        return 0 if code == ERR_SAMPLE_COUNT else code

    cdef const Key* prepared(self, int64_t handle) noexcept nogil:
        cdef int code
        cdef handle_t* h = self.find(handle, &code)
        return h.drawn.keys + h.drawn.begin if h != NULL else NULL

    cdef int finish(self, int64_t handle) noexcept nogil:
        cdef int code = 0
        cdef handle_t* h = self.find(handle, &code)
        if h == NULL:
            return 0 if code == ERR_SAMPLE_COUNT else code
        self.close(h)
        return 0

    cdef int draw(self, int64_t handle, Key* keys, Py_ssize_t n, Py_ssize_t* done) noexcept nogil:
        cdef int scheme = self.sampling.scheme
        cdef int rc = 0
        cdef Py_ssize_t i
        cdef handle_t* h = self.find(handle, &rc)
        done[0] = 0
        if unlikely(h == NULL):
            return 0 if n == 0 and rc == ERR_SAMPLE_COUNT else rc
        if unlikely(n < 0 or n > h.left):
            return ERR_SAMPLE_COUNT
        if scheme == PRELOC:
            memcpy(keys, h.drawn.keys + h.drawn.begin, n * sizeof(Key))
            h.drawn.begin += n
        elif scheme == NAIVE:
            rc = self.raw(keys, n) if self.sampling.with_replacement else self.distinct(h, keys, n)
        elif scheme == LOCAL:
            for i in range(n):
                rc = self.here(h, keys + i)
                if rc != 0:
                    forget(h, keys, i)
                    break
        else:
            rc = self.from_pool(h, keys, n, done)
            n = done[0]
        if unlikely(rc < 0 and scheme != POOL):
            return rc
        done[0] = n
        h.left -= n
        self.w.counters.sampled += n
        if unlikely(rc < 0):
            self.undo(handle, keys, n)
            return rc
        if h.left == 0:
            self.close(h)
        return rc

    # --- draws of the distribution

    cdef int raw(self, Key* keys, Py_ssize_t n) noexcept nogil:
        cdef Py_ssize_t some
        cdef int rc
        if self.d.kind != FUNCTION:
            draw_keys(self.d, &self.rng, keys, n)
            return 0
        while n > 0:
            if self.ahead.begin == self.ahead.end:
                rc = self.call()
                if rc != 0:
                    return rc
            some = min(n, self.ahead.end - self.ahead.begin)
            memcpy(keys, self.ahead.keys + self.ahead.begin, some * sizeof(Key))
            self.ahead.begin += some
            keys += some
            n -= some
        return 0

    cdef int call(self) noexcept nogil:
        """Have the callable draw the next batch. 0, ERR_MEMORY or ERR_DRAW."""
        self.ahead.begin = self.ahead.end = 0
        if run_room(&self.ahead, self.sampling.batch_size) != 0:
            return ERR_MEMORY
        return self.call_function()

    cdef int call_function(self) noexcept with gil:
        """What it raises is kept in self.error."""
        cdef int64_t n = self.sampling.batch_size
        cdef cnp.ndarray keys
        try:
            if self.generator is None:
                self.generator = np.random.default_rng([self.sampling.seed, self.sampling.protocol.me, self.stream])
            keys = checked_draws(self.sampling.function(self.generator, n), n, self.d.low, self.d.high)
            memcpy(self.ahead.keys, cnp.PyArray_DATA(keys), n * sizeof(Key))
        except BaseException as error:
            self.error = error
            return ERR_DRAW
        self.ahead.end = n
        return 0

    cdef void repeats(self, int64_t times) noexcept with gil:
        self.error = ValueError(f"the callable has given nothing but keys that it had drawn before, {times} times in a row, and the draws "
                                "of one sample are to be different")

    # --- without replacement

    cdef int distinct(self, handle_t* h, Key* keys, Py_ssize_t n) noexcept nogil:
        """Draws of the distribution that this handle has not had."""
        cdef Py_ssize_t i
        cdef int64_t repeated
        cdef int rc
        for i in range(n):
            repeated = 0
            while True:
                if h.ordered:
                    if h.rest.begin == h.rest.end:
                        return ERR_SAMPLE_COUNT
                    keys[i] = h.rest.keys[h.rest.begin]
                    h.rest.begin += 1
                else:
                    rc = self.raw(keys + i, 1)
                    if rc != 0:
                        forget(h, keys, i)
                        return rc
                if seen_add(&h.seen, keys[i]):
                    break
                repeated += 1
                if repeated == REPEATED and self.d.kind != FUNCTION:
                    rc = self.order_rest(h)
                    if rc != 0:
                        forget(h, keys, i)
                        return rc
                if repeated == REPEATED_OF_FUNCTION and self.d.kind == FUNCTION:
                    self.repeats(repeated)
                    forget(h, keys, i)
                    return ERR_DRAW
        return 0

    cdef int order_rest(self, handle_t* h) noexcept nogil:
        cdef turn_t* turns = <turn_t*>malloc(self.d.span * sizeof(turn_t))
        cdef int64_t n = 0, i
        cdef double weight
        cdef Key key
        if turns == NULL:
            return ERR_MEMORY
        for key in range(self.d.low, self.d.high):
            weight = weight_of(self.d, key)
            if weight > 0.0 and not seen_has(&h.seen, key):
                turns[n].when = -log(1.0 - next_fraction(&self.rng)) / weight
                turns[n].key = key
                n += 1
        qsort(turns, n, sizeof(turn_t), earlier)
        run_clear(&h.rest)
        if run_room(&h.rest, n) != 0:
            free(turns)
            return ERR_MEMORY
        for i in range(n):
            h.rest.keys[i] = turns[i].key
        h.rest.end = n
        h.ordered = True
        free(turns)
        return 0

    # --- local

    cdef int here(self, handle_t* h, Key* key) noexcept nogil:
        """A key that is here now; with none, any: 0, or ERR_DRAW, ERR_MEMORY."""
        cdef int rc = self.local_key(h, key)
        if rc != 0 or key[0] >= 0:
            return rc
        self.w.counters.sample_fallbacks += 1
        return self.raw(key, 1) if h.seen.mask < 0 else self.distinct(h, key, 1)

    cdef int local_key(self, handle_t* h, Key* key) noexcept nogil:
        """A key that is here now, and new to the handle (NULL: any); -1 with none. 0, or ERR_DRAW, ERR_MEMORY."""
        cdef seen_t* seen = &h.seen if h != NULL else &NOTHING_SEEN
        cdef int64_t* barren = &h.barren if h != NULL and seen.mask >= 0 else &self.barren
        cdef int64_t arrivals = load_i64(&self.sampling.protocol.arrivals)
        cdef int rc = 0
        key[0] = -1
        if barren[0] == arrivals:                       # nothing was here, and nothing has come
            return 0
        if self.listed == NULL:
            rc = self.candidate(seen, key, TRIES if self.d.kind != FUNCTION else TRIES_OF_FUNCTION)
            if rc != 0 or key[0] >= 0:
                return rc
            if self.d.kind != FUNCTION:
                self.refresh()
                if self.listed == NULL:                 # many are here; this handle has seen them, or they came only now
                    key[0] = pick_exactly(self.store, self.d, NULL, NULL, seen, &self.rng)
        if self.listed != NULL:
            key[0] = self.from_list(seen)
        if key[0] >= 0:
            seen_add(seen, key[0])
        elif self.d.kind != FUNCTION or not any_here(self.store, self.d, seen):
            barren[0] = arrivals                        # (what a callable has not drawn this time, it may the next)
        return 0

    cdef int candidate(self, seen_t* seen, Key* key, int most) noexcept nogil:
        """Draw until a key is here, and new; *key stays as it is after `most` draws in vain. 0, or ERR_DRAW, ERR_MEMORY."""
        cdef int tries
        cdef int rc
        cdef Key k
        for tries in range(most):
            if self.ahead.begin == self.ahead.end:
                rc = self.call() if self.d.kind == FUNCTION else self.look_ahead()
                if rc != 0:
                    return rc
            k = self.ahead.keys[self.ahead.begin]
            self.ahead.begin += 1
            if is_here(self.store, k) and seen_add(seen, k):
                key[0] = k
                return 0
        return 0

    cdef int look_ahead(self) noexcept nogil:
        """Draw the next candidates. 0, or ERR_MEMORY."""
        cdef int i
        self.ahead.begin = self.ahead.end = 0
        if run_room(&self.ahead, AHEAD) != 0:
            return ERR_MEMORY
        draw_keys(self.d, &self.rng, self.ahead.keys, AHEAD)
        self.ahead.end = AHEAD
        for i in range(AHEAD):
            expect_slot(self.store, self.ahead.keys[i])
        return 0

    cdef void refresh(self) noexcept nogil:
        """Have a list of what is here now, or none if enough is here."""
        cdef here_t* l = self.sampling.list_of_now(self.listed)
        self.effort = 0
        self.listed = l
        if l == NULL:
            return
        recent_clear(&self.recent, l.arrivals)
        if l.many:
            self.sampling.let_go(l)
            self.listed = NULL

    cdef Key from_list(self, const seen_t* seen) noexcept nogil:
        """A key of the list, or of what has come since, that is still here, by weight; -1: there is none."""
        cdef Key key
        if self.recent.arrivals != load_i64(&self.sampling.protocol.arrivals) and not self.catch_up():
            return pick_exactly(self.store, self.d, NULL, NULL, seen, &self.rng)
        key = self.pick(seen)
        if key < 0 and self.listed.count + self.recent.count > 0:
            # Most have left, or been seen. A new list is due when passing over this one has cost as much.
            self.effort += self.listed.count + self.recent.count + LISTED_TRIES
            key = pick_exactly(self.store, self.d, self.listed, &self.recent, seen, &self.rng)
            if self.effort > <int64_t>self.d.span:
                self.refresh()
        return key

    cdef bint catch_up(self) noexcept nogil:
        """Take up what has arrived. 0: so much has come that there is no list any more."""
        cdef int i
        for i in range(4):                              # should ever more arrive meanwhile
            if recent_update(&self.recent, self.listed, self.d, self.sampling.protocol.arrived, self.sampling.protocol.arrived_mask,
                             &self.sampling.protocol.arrivals):
                return True
            self.refresh()
            if self.listed == NULL:
                return False
        return True

    cdef Key pick(self, const seen_t* seen) noexcept nogil:
        cdef int i
        cdef Key key
        if self.listed.count + self.recent.count > 0:
            for i in range(LISTED_TRIES):
                key = pick_listed(self.listed, &self.recent, &self.rng)
                if is_here(self.store, key) and not seen_has(seen, key):
                    return key
        return -1

    cdef int redraw(self, Key* key) noexcept nogil:
        cdef Key other
        cdef int rc = self.local_key(NULL, &other)
        if rc == 0 and other >= 0:
            key[0] = other
            return 1
        return rc

    # --- pool

    cdef int from_pool(self, handle_t* h, Key* keys, Py_ssize_t n, Py_ssize_t* done) noexcept nogil:
        """Hand out n uses: what is not local goes to the handle's end if it may; DRY when the pool has no more now."""
        cdef int64_t postponed
        cdef int rc
        cdef Key key
        while done[0] < n:
            postponed = h.drawn.end - h.drawn.begin
            if postponed == h.left - done[0]:           # the handle's end
                keys[done[0]] = h.drawn.keys[h.drawn.begin]
                h.drawn.begin += 1
                done[0] += 1
                continue
            rc = self.next_use(h, min(n - done[0], h.left - done[0] - postponed), &key)
            if rc != 0:
                return rc
            if self.sampling.postpone and not is_here(self.store, key) and run_room(&h.drawn, 1) == 0:
                h.drawn.keys[h.drawn.end] = key
                h.drawn.end += 1
                self.w.counters.sample_postponed += 1
                continue
            keys[done[0]] = key
            done[0] += 1
        return 0

    cdef int next_use(self, handle_t* h, int64_t wanted, Key* key) noexcept nogil:
        """The next use that is new to the handle; the others stay for other handles. 0, DRY, or an ERR_ code."""
        cdef run_t* uses = &self.uses
        cdef int64_t known = 0, most = 4 * self.sampling.group_size * self.sampling.reuse + 256, n
        cdef bint low = False
        while True:
            if uses.begin + known == uses.end:
                if known > most:
                    self.w.counters.sample_fallbacks += 1
                    return self.distinct(h, key, 1)
                n = max(wanted, <int64_t>BATCH)
                if run_room(uses, n) != 0:
                    return ERR_MEMORY
                n = pool_take(self.sampling.pool, uses.keys + uses.end, wanted, n, &low)
                self.low = self.low or low
                if n == 0:
                    return DRY
                uses.end += n
            key[0] = uses.keys[uses.begin + known]
            if seen_add(&h.seen, key[0]):
                uses.keys[uses.begin + known] = uses.keys[uses.begin]
                uses.begin += 1
                return 0
            known += 1

    cdef int undo(self, int64_t handle, const Key* keys, Py_ssize_t n) noexcept nogil:
        cdef int rc = 0
        cdef handle_t* h = self.find(handle, &rc)
        if h == NULL or n == 0:
            return rc
        if run_room(&h.drawn, n) != 0:
            return ERR_MEMORY
        memmove(h.drawn.keys + h.drawn.begin + n, h.drawn.keys + h.drawn.begin, (h.drawn.end - h.drawn.begin) * sizeof(Key))
        memcpy(h.drawn.keys + h.drawn.begin, keys, n * sizeof(Key))
        h.drawn.end += n
        h.left += n
        self.w.counters.sampled -= n
        return 0
