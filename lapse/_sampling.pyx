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
# keys are put in the order in which they would be drawn (see _turns.pxd), and handed out in it.
#
# A handle's number is its slot, below how often that has been used. That count begins elsewhere for each Sampler of a node, so that the
# numbers of others are told apart from its own without a look at anything else.
import numpy as np

cimport cython
cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset
from posix.unistd cimport getpid
from lapse._draws cimport FUNCTION, draw_keys, seed_numbers
from lapse._here cimport (any_here, is_here, pick_exactly, pick_listed, recent_clear, recent_free, recent_init, recent_update, seen_add,
                          seen_has, seen_init, seen_remove)
from lapse._pool cimport pool_give_back, pool_take
from lapse._store cimport expect_slot
from lapse._sync cimport load_i64, unlikely
from lapse._turns cimport turns_clear, turns_free, turns_init, turns_join, turns_next, turns_of_all, turns_of_here
from lapse._types cimport ERR_DRAW, ERR_MEMORY, ERR_SAMPLE, ERR_SAMPLE_COUNT, Key

from lapse._schemes import checked_draws

cnp.import_array()

cdef enum:
    AHEAD = 32                  # candidates drawn at once, whose slots are on their way to the cache meanwhile
    TRIES = 512                 # candidates until the local scheme looks over the range: fewer than one in 32 will be here
    TRIES_OF_FUNCTION = 4096    # the same of a callable, whose weights are not known
    LISTED_TRIES = 64           # draws out of a list of which most have left
    REPEATED = 64               # draws in a row that have been seen, until the rest is put in order
    REPEATED_OF_FUNCTION = 1000000
    BATCH = 64                  # uses that a worker takes from the pool at once
    KEEP = 4096                 # keys of a closed handle's memory that are kept

cdef seen_t NOTHING_SEEN
NOTHING_SEEN.keys = NULL
NOTHING_SEEN.mask = -1
NOTHING_SEEN.room = 0


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
    if n > 0:
        h.rest.begun = h.turns.begun = False
        h.barren = -1
    for i in range(n):
        seen_remove(&h.seen, keys[i])


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
        self.tries = TRIES if self.d.kind != FUNCTION else TRIES_OF_FUNCTION
        self.first_turn = sampling.samplers % MOST_SAMPLERS << TURN_BITS
        sampling.samplers += 1
        self.stream = stream
        seed_numbers(&self.rng, sampling.seed, sampling.protocol.me, self.stream)

    def __dealloc__(self):
        cdef int64_t i
        self.give_up()
        for i in range(self.used):
            free(self.handles[i].drawn.keys)
            turns_free(&self.handles[i].rest)
            turns_free(&self.handles[i].turns)
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
        if unlikely(slot >= self.used or turn < self.first_turn):       # what is below 0 is that, too
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
            h.turn = self.first_turn
            h.left = -1
            h.seen.mask = -1
            turns_init(&h.rest)
            turns_init(&h.turns)
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
        h.tries = self.tries
        return h

    cdef void close(self, handle_t* h) noexcept nogil:
        cdef int64_t n = h.drawn.end - h.drawn.begin
        if self.sampling.pool != NULL and n > 0:
            if run_room(&self.uses, n) == 0:
                memcpy(self.uses.keys + self.uses.end, h.drawn.keys + h.drawn.begin, n * sizeof(Key))
                self.uses.end += n
        run_clear(&h.drawn)
        if not self.sampling.with_replacement:
            turns_clear(&h.rest, KEEP)
            turns_clear(&h.turns, KEEP)
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
                if h.rest.begun:
                    keys[i] = turns_next(&h.rest)
                    if keys[i] < 0:
                        forget(h, keys, i)
                        return ERR_SAMPLE_COUNT
                else:
                    rc = self.raw(keys + i, 1)
                    if rc != 0:
                        forget(h, keys, i)
                        return rc
                if seen_add(&h.seen, keys[i]):
                    break
                repeated += 1
                if repeated == REPEATED and self.d.kind != FUNCTION and not h.rest.begun:
                    rc = turns_of_all(&h.rest, self.d, &h.seen, &self.rng)
                    if rc != 0:
                        forget(h, keys, i)
                        return rc
                if repeated == REPEATED_OF_FUNCTION and self.d.kind == FUNCTION:
                    self.repeats(repeated)
                    forget(h, keys, i)
                    return ERR_DRAW
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
            rc = self.candidate(seen, key, h.tries if h != NULL else self.tries)
            if rc != 0 or key[0] >= 0:
                return rc
        rc = self.scarce(h, key)
        if rc == 0 and key[0] < 0 and (self.d.kind != FUNCTION or not any_here(self.store, self.d, seen)):
            barren[0] = arrivals                        # (what a callable has not drawn this time, it may the next)
        return rc

    cdef int scarce(self, handle_t* h, Key* key) noexcept nogil:
        """A key that is here where drawing finds none, or -1. 0, or ERR_MEMORY."""
        if h != NULL and h.turns.begun:
            return self.next_turn(h, key)
        if self.d.kind == FUNCTION:
            return 0
        if self.listed == NULL:
            self.refresh()
        if self.listed != NULL:
            return self.from_list(h, key)
        return self.exactly(h, key)             # many are here; this handle has seen them, or they came only now

    cdef int exactly(self, handle_t* h, Key* key) noexcept nogil:
        """A key that is here by a look at all that may be, or -1. A handle that must not repeat itself has them put in order for the
        next draws, too: few of them are new to it, and a look for each would take too long. 0, or ERR_MEMORY."""
        cdef here_t* l = self.listed
        if h == NULL or h.seen.mask < 0:
            key[0] = pick_exactly(self.store, self.d, l, &self.recent, &NOTHING_SEEN, &self.rng)
            return 0
        return self.order_turns(h) or self.next_turn(h, key)

    cdef int order_turns(self, handle_t* h) noexcept nogil:
        """Put the keys in order that are here, and new to the handle. 0, or ERR_MEMORY."""
        h.tries = 0
        if self.listed == NULL:
            return turns_of_here(&h.turns, self.store, self.d, NULL, NULL, &h.seen, load_i64(&self.sampling.protocol.arrivals),
                                 self.sampling.recent_room, &self.rng)
        return turns_of_here(&h.turns, self.store, self.d, self.listed, &self.recent, &h.seen, self.recent.arrivals,
                             self.listed.count + self.recent.count + LISTED_TRIES, &self.rng)

    cdef int next_turn(self, handle_t* h, Key* key) noexcept nogil:
        """The next key in order that is here; -1: there is none. 0, or ERR_MEMORY."""
        cdef Key k
        if (h.turns.arrivals != load_i64(&self.sampling.protocol.arrivals)
                and not turns_join(&h.turns, self.d, &h.seen, self.sampling.protocol.arrived, self.sampling.protocol.arrived_mask,
                                   &self.sampling.protocol.arrivals, &self.rng)):
            if self.listed != NULL:
                self.catch_up()
            if self.order_turns(h) != 0:
                return ERR_MEMORY
        while True:
            k = turns_next(&h.turns)
            if k < 0:
                return 0
            if is_here(self.store, k) and seen_add(&h.seen, k):
                key[0] = k
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

    cdef int from_list(self, handle_t* h, Key* key) noexcept nogil:
        """A key of the list, or of what has come since, that is still here, by weight; -1: there is none. 0, or ERR_MEMORY."""
        cdef seen_t* seen = &h.seen if h != NULL else &NOTHING_SEEN
        cdef int rc
        if self.recent.arrivals != load_i64(&self.sampling.protocol.arrivals) and not self.catch_up():
            return self.exactly(h, key)
        key[0] = self.pick(seen)
        if key[0] >= 0:
            seen_add(seen, key[0])
        elif self.listed.count + self.recent.count > 0:
            # Most have left, or been seen. A new list is due when passing over this one has cost as much.
            self.effort += self.listed.count + self.recent.count + LISTED_TRIES
            rc = self.exactly(h, key)
            if self.effort > <int64_t>self.d.span:
                self.refresh()
            return rc
        return 0

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
