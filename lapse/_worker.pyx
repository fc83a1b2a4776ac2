# Design: a call checks everything, tries the local rows under their latches alone, takes credit for what is left, and hands that to the
# protocol, all without the GIL. A waiting worker sleeps on its event word, which the server thread bumps for every operation that finishes.
# Threads may outnumber cores, so nothing spins for long: only a wait for the one operation under way looks on for some microseconds,
# giving the core away at each look, and only as long as that has paid off of late (`pause_for`). In the main thread, and only there, it wakes now and then to let Python's signal
# handlers run (another thread must not ask for the GIL: somebody may hold it for long).
import threading

from libc.stdint cimport int64_t, uint32_t, uint64_t

from lapse._operations cimport ensure_room, op_finished
from lapse._pool cimport pool_ready, pool_t
from lapse._protocol cimport Protocol, worker_t
from lapse._sampling cimport DRY, LOCAL, PRELOC, Sampler
from lapse._store cimport (HERE, KeyState, absent_rows, batch_bytes, first_out_of_range, latch, pull_rows, push_rows, row_of, set_rows,
                           slot_word, state_of, stored_bytes, store_t, unlatch, visible_bytes)
from lapse._sync cimport (add_u32, fence, likely, load_i32, load_i64, load_u32, nanoseconds, park, store_u32, unlikely, yield_core)
from lapse._types cimport (ACQUIRE_MAX, DONE, ERR_DRAW, ERR_FAILED, ERR_HELD, ERR_INTERRUPTED, ERR_KEY_RANGE, ERR_MEMORY, ERR_NO_SAMPLING,
                           ERR_SAMPLE_COUNT, ERR_STOPPED, ERR_TIMEOUT, ERR_TIMESTAMP, ERR_TOO_MANY, OP_LOCALIZE, OP_PULL, OP_PUSH, OP_SET, Key, Timestamp)
from lapse._van cimport Van

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef extern from *:
    """
    #include <pthread.h>
    static inline unsigned long lapse_this_thread(void) { return (unsigned long)pthread_self(); }
    """
    unsigned long lapse_this_thread() noexcept nogil

cdef unsigned long MAIN_THREAD = threading.main_thread().ident

cdef enum:
    # what a worker waits for
    ONE = 0                     # an operation
    ALL = 1                     # all its operations
    CREDIT = 2                  # room for one more, of so many bytes
    SLICE = 100000000           # nanoseconds between looks at signals
    REDRAWS = 8                 # of a key that has left between draw and pull
    PIECE = 1024                # keys of one of prepare_sample's localizes
    SPIN = 60000                # nanoseconds of looking on before sleeping


cdef void drop_latches(Protocol protocol, worker_t* w) noexcept nogil:
    cdef int k
    for k in range(w.held_rows):
        unlatch(protocol.store, w.held_keys[k], w.held_words[k])
    w.held = 0
    w.held_rows = 0


cdef inline int refusal(worker_t* w, Van van) noexcept nogil:
    """Why no operation may begin now (an ERR_ code), or 0."""
    cdef int rc
    if w == NULL:
        return ERR_STOPPED
    rc = load_i32(&van.state)
    if rc == 0 and w.held != 0:
        return ERR_HELD
    return rc


cdef class Worker:
    """One worker thread's access to the parameters; the C level. `attach` it to a server before anything else."""

    def __cinit__(self):
        self.buffers = {}
        self.index = -1
        self.patience = -1

    def __dealloc__(self):
        # Not through another thread, which may need the GIL that somebody keeps while waiting for the latch. (Without protocol:
        # the garbage collector has taken it away; then the node does it.)
        if self.protocol is not None and self.w != NULL and self.w.holder == <void*>self:
            drop_latches(self.protocol, self.w)

    def attach(self, server, int index, int64_t credit_bytes, label=None):
        """Take worker slot `index` of the server's node. credit_bytes bounds what is under way at once; label names its random numbers."""
        cdef Protocol protocol = server._protocol
        self.w = protocol.add_worker(index, protocol.credit_ops)
        if self.w == NULL:
            raise MemoryError(f"no memory for worker {index}")
        self.protocol = protocol
        self.van = server._van
        self.server = server
        self.index = index
        self.credit_bytes = credit_bytes
        sampling = getattr(server, "_sampling", None)
        if sampling is not None:
            self.sampler = Sampler(sampling, sampling.stream_of(index if label is None else label))
            self.sampler.w = self.w
        drop_latches(protocol, self.w)          # an earlier Worker of the slot may have left some
        self.w.holder = <void*>self
        self.w.busy = 0

    # --- primitives --------------------------------------------------------------------------------------------------------------

    cdef Timestamp pull(self, const Key* keys, Py_ssize_t n, void* vals) noexcept nogil:
        return self.issue(OP_PULL, keys, n, vals)

    cdef Timestamp push(self, const Key* keys, Py_ssize_t n, const void* vals) noexcept nogil:
        return self.issue(OP_PUSH, keys, n, <void*>vals)

    cdef Timestamp set(self, const Key* keys, Py_ssize_t n, const void* vals) noexcept nogil:
        return self.issue(OP_SET, keys, n, <void*>vals)

    cdef Timestamp localize(self, const Key* keys, Py_ssize_t n) noexcept nogil:
        return self.issue(OP_LOCALIZE, keys, n, NULL)

    cdef Timestamp issue(self, int kind, const Key* keys, Py_ssize_t n, void* vals) noexcept nogil:
        cdef worker_t* w = self.w
        cdef store_t* s
        cdef Py_ssize_t m = n, j
        cdef size_t credit
        cdef Timestamp ts
        cdef int rc
        rc = refusal(w, self.van)
        if unlikely(rc != 0):
            return rc
        s = self.protocol.store
        if unlikely(first_out_of_range(keys, n, s.num_keys) >= 0):
            return ERR_KEY_RANGE
        if n > w.room:
            if <uint64_t>n >> 32:
                return ERR_TOO_MANY
            if ensure_room(w, n) != 0:
                return ERR_MEMORY
        if n > 0 and load_i64(&w.open_ops) != 0:
            # Should it have to wait for credit, then before anything is applied: it may be interrupted.
            credit = self.credit_of(kind, keys, NULL, n)
            if not self.reached(CREDIT, <int64_t>credit):
                if self.protocol.shared_memory and (kind == OP_LOCALIZE or load_i64(&w.pins.cached) == 0):
                    m = absent_rows(s, keys, n, w.misses)
                    credit = self.credit_of(kind, keys, w.misses, m)
                if m > 0 and not self.reached(CREDIT, <int64_t>credit):
                    rc = self.block(CREDIT, <int64_t>credit, self.patience)
                    if rc != 0:
                        return rc
        # what is here needs no more than its latch, unless operations by a guessed route are still unanswered
        if self.protocol.shared_memory and (kind == OP_LOCALIZE or load_i64(&w.pins.cached) == 0):
            if kind == OP_PULL:
                m = pull_rows(s, keys, n, vals, w.misses)
            elif kind == OP_PUSH:
                m = push_rows(s, keys, n, vals, w.misses)
            elif kind == OP_SET:
                m = set_rows(s, keys, n, vals, w.misses)
            else:
                m = absent_rows(s, keys, n, w.misses)
            if unlikely(m < 0):
                return ERR_MEMORY
            (<int64_t*>&w.counters)[(kind - OP_PULL) * 3] += n - m
        else:
            m = n
            for j in range(n):
                w.misses[j] = <uint32_t>j
        if m == 0:
            return DONE
        credit = self.credit_of(kind, keys, w.misses, m)
        if not self.reached(CREDIT, <int64_t>credit):       # keys have left meanwhile
            rc = self.block(CREDIT, <int64_t>credit, -1)
            if rc != 0:
                return rc
        rc = self.protocol.issue(w, kind, keys, n, vals, w.misses, m, credit, &ts)
        if unlikely(rc != 0):
            self.van.abort(ERR_FAILED)
            return rc if rc == ERR_MEMORY else load_i32(&self.van.state)    # the cause, if the node had ended before
        return ts

    cdef size_t credit_of(self, int kind, const Key* keys, const uint32_t* positions, Py_ssize_t m) noexcept nogil:
        """What these positions of a call (NULL: the first m) are charged."""
        cdef const store_t* s = self.protocol.store
        cdef size_t credit = 16 * m
        cdef Py_ssize_t j
        if s.visible == NULL and s.stored == NULL:
            return credit + m * (s.uniform_stored if kind == OP_LOCALIZE else s.uniform_visible)
        for j in range(m):
            credit += stored_bytes(s, keys[positions[j] if positions != NULL else j])
        return credit

    # --- waiting -------------------------------------------------------------------------------------------------------------------

    cdef bint reached(self, int what, int64_t arg) noexcept nogil:
        cdef worker_t* w = self.w
        if what == ONE:
            return op_finished(w, arg)
        if what == ALL:
            return load_i64(&w.open_ops) == 0
        if load_i64(&w.ops[w.next_ts & w.mask].remaining) != 0:
            return False
        return load_i64(&w.open_bytes) == 0 or load_i64(&w.open_bytes) + arg <= self.credit_bytes

    cdef int block(self, int what, int64_t arg, int64_t nanoseconds_left) noexcept nogil:
        """Sleep until it is reached: 0, or why not. nanoseconds_left < 0: for ever."""
        cdef worker_t* w = self.w
        cdef int64_t deadline = nanoseconds() + nanoseconds_left if nanoseconds_left >= 0 else -1
        cdef int64_t slice_, left
        cdef bint in_main = lapse_this_thread() == MAIN_THREAD
        cdef bint signalled
        cdef uint32_t seen
        cdef int rc
        if what == ONE and load_i64(&w.open_ops) == 1 and (deadline < 0 or nanoseconds_left > SPIN) and self.pause_for(arg):
            return 0
        while True:
            seen = load_u32(&w.event)
            if self.reached(what, arg):
                return 0
            rc = load_i32(&self.van.state)
            if rc != 0 and load_i32(&self.van.serving) == 0:
                return rc
            slice_ = SLICE
            if deadline >= 0:
                left = deadline - nanoseconds()
                if left <= 0:
                    return ERR_TIMEOUT
                slice_ = min(left, slice_)
            store_u32(&w.sleeping, 1)
            fence()                             # the last look comes after `sleeping` is seen by Van.wake
            signalled = False
            if not self.reached(what, arg):
                signalled = park(&w.event, seen, slice_)
            store_u32(&w.sleeping, 0)
            if in_main and not self.reached(what, arg) and (signalled or slice_ == SLICE) and self.interrupted():
                return ERR_INTERRUPTED

    cdef bint pause_for(self, Timestamp ts) noexcept nogil:
        """Look on for an answer that may come in the time that a sleeping thread needs to be woken; 1 when it has come.

        Waking a thread costs several microseconds of a round trip of some forty. Whoever succeeds keeps trying; whoever fails skips ever
        more waits before the next try, so that a busy machine or a slow network sees next to no spinning.
        """
        cdef worker_t* w = self.w
        cdef int64_t until
        if w.spin_skips > 0:
            w.spin_skips -= 1
            return False
        until = nanoseconds() + SPIN
        while nanoseconds() < until:
            if op_finished(w, ts):
                w.spin_misses = 0
                return True
            yield_core()
        w.spin_misses = min(w.spin_misses + 1, 8)
        w.spin_skips = (1 << w.spin_misses) - 1
        return False

    cdef bint interrupted(self) noexcept nogil:
        """Let Python's signal handlers run; 1 when one raised, which is kept in self.signal."""
        with gil:
            try:
                PyErr_CheckSignals()
            except BaseException as error:
                self.signal = error
                return True
        return False

    cdef int wait(self, Timestamp ts) noexcept nogil:
        return self.wait_for(ts, -1)

    cdef int wait_for(self, Timestamp ts, int64_t nanoseconds) noexcept nogil:
        cdef int finished = self.is_finished(ts)
        if finished != 0:
            return 0 if finished == 1 else finished
        return self.block(ONE, ts, nanoseconds)

    cdef int waitall(self) noexcept nogil:
        return self.waitall_for(-1)

    cdef int waitall_for(self, int64_t nanoseconds) noexcept nogil:
        if self.w == NULL:
            return ERR_STOPPED
        if self.w.held != 0:
            return ERR_HELD
        return 0 if self.reached(ALL, 0) else self.block(ALL, 0, nanoseconds)

    cdef int is_finished(self, Timestamp ts) noexcept nogil:
        cdef int code
        if ts < 0:
            return 1 if ts == DONE else <int>ts          # an operation that was refused
        if self.w == NULL:
            return ERR_STOPPED
        if ts >= self.w.next_ts:
            return ERR_TIMESTAMP
        if self.w.held != 0:
            return ERR_HELD
        if op_finished(self.w, ts):
            return 1
        code = load_i32(&self.van.state)
        if code == 0 or load_i32(&self.van.serving) != 0:
            return 0
        return 1 if op_finished(self.w, ts) else code       # whoever looks again and again has to hear of the end, too

    # --- what is here ------------------------------------------------------------------------------------------------------------------

    cdef int pull_if_local(self, const Key* keys, Py_ssize_t n, void* vals) noexcept nogil:
        cdef worker_t* w = self.w
        cdef Py_ssize_t j
        cdef int rc
        rc = refusal(w, self.van)
        if unlikely(rc != 0):
            return rc
        if first_out_of_range(keys, n, self.protocol.store.num_keys) >= 0:
            return ERR_KEY_RANGE
        if ensure_room(w, n) != 0:
            return ERR_MEMORY
        if not self.protocol.shared_memory:
            return n == 0
        if load_i64(&w.pins.cached) != 0:
            for j in range(n):
                if self.protocol.is_pinned(w, keys[j]):
                    return 0
        if pull_rows(self.protocol.store, keys, n, vals, w.misses) != 0:
            return 0
        w.counters.pulled_local += n
        return 1

    cdef bint is_local(self, Key key) noexcept nogil:
        cdef store_t* s
        if self.w == NULL:
            return False
        s = self.protocol.store
        return 0 <= key < s.num_keys and state_of(s, key, slot_word(s, key)) == HERE

    cdef int acquire(self, const Key* keys, int n, void** rows) noexcept nogil:
        cdef worker_t* w = self.w
        cdef store_t* s
        cdef int order[ACQUIRE_MAX]
        cdef int i, j, k, rc
        cdef uint64_t word
        cdef bint pinned
        rc = refusal(w, self.van)
        if unlikely(rc != 0):
            return rc
        if unlikely(not 0 <= n <= ACQUIRE_MAX):
            return ERR_TOO_MANY
        s = self.protocol.store
        # in the order of the keys, so that two workers cannot wait for each other
        for i in range(n):
            if unlikely(not 0 <= keys[i] < s.num_keys):
                return ERR_KEY_RANGE
            j = i
            while j > 0 and keys[order[j - 1]] > keys[i]:
                order[j] = order[j - 1]
                j -= 1
            order[j] = i
        if n == 0 or not self.protocol.shared_memory:
            for i in range(n):
                rows[i] = NULL
            w.held = n
            w.held_rows = 0
            return 0
        pinned = load_i64(&w.pins.cached) != 0
        k = 0
        rc = 0
        for j in range(n):
            i = order[j]
            if j > 0 and keys[i] == keys[order[j - 1]]:
                rows[i] = rows[order[j - 1]]
            else:
                rows[i] = NULL
                if not (pinned and self.protocol.is_pinned(w, keys[i])):
                    word = latch(s, keys[i])
                    if state_of(s, keys[i], word) == HERE:
                        rows[i] = row_of(s, keys[i], &word)
                    if rows[i] != NULL:
                        w.held_keys[k] = keys[i]
                        w.held_words[k] = word
                        k += 1
                    else:
                        unlatch(s, keys[i], word)
            rc += rows[i] != NULL
        w.held = n
        w.held_rows = k
        w.counters.pulled_local += rc
        return rc

    cdef int release(self, uint32_t changed) noexcept nogil:
        cdef worker_t* w = self.w
        if w == NULL:
            return ERR_STOPPED
        drop_latches(self.protocol, w)
        while changed:
            changed &= changed - 1
            w.counters.pushed_local += 1
        return 0

    # --- sampling ----------------------------------------------------------------------------------------------------------------------

    cdef int64_t prepare_sample(self, int64_t n) noexcept nogil:
        cdef int64_t handle
        cdef int rc = refusal(self.w, self.van)
        if unlikely(rc != 0):
            return rc
        if unlikely(self.sampler is None):
            return ERR_NO_SAMPLING
        if unlikely(n >> 32):
            return ERR_TOO_MANY if n > 0 else ERR_SAMPLE_COUNT
        handle = self.sampler.prepare(n)
        if self.sampler.sampling.scheme == PRELOC and handle >= 0:
            self.localize_ahead(self.sampler.prepared(handle), n)
        elif handle == ERR_DRAW:
            return self.sample_error(ERR_DRAW)
        return handle

    cdef void localize_ahead(self, const Key* keys, Py_ssize_t n) noexcept nogil:
        """Localize, as far as the worker's credit goes without waiting: it is a hint."""
        cdef Py_ssize_t some
        while n > 0:
            some = min(n, <Py_ssize_t>PIECE)
            if load_i64(&self.w.open_ops) != 0 and not self.reached(CREDIT, <int64_t>self.credit_of(OP_LOCALIZE, keys, NULL, some)):
                return
            if self.issue(OP_LOCALIZE, keys, some, NULL) < DONE:
                return                          # the job has failed, as the next call will say
            keys += some
            n -= some

    cdef int draw_sample(self, int64_t handle, Key* keys, Py_ssize_t n) noexcept nogil:
        cdef Py_ssize_t done = 0, some = 0
        cdef int64_t deadline = 0               # none yet: most draws need no clock
        cdef int rc = refusal(self.w, self.van)
        if unlikely(rc != 0):
            return rc
        if unlikely(self.sampler is None):
            return ERR_NO_SAMPLING
        rc = self.sampler.draw(handle, keys, n, &done)
        while True:
            if unlikely(self.sampler.low):
                self.sampler.low = False
                if self.sampler.sampling.filler != NULL:
                    self.van.wake(self.sampler.sampling.filler)
            if likely(rc == 0):
                return 0
            if rc == DRY:
                if deadline == 0:
                    deadline = nanoseconds() + self.patience if self.patience >= 0 else -1
                rc = self.await_pool(deadline)
                if rc == 0:
                    rc = self.sampler.draw(handle, keys + done, n - done, &some)
                    done += some
                    continue
            if done > 0:
                self.sampler.undo(handle, keys, done)
            return self.sample_error(rc)

    cdef int await_pool(self, int64_t deadline) noexcept nogil:
        """Sleep until the pool has something to hand out: 0, or why not. deadline: by the clock of nanoseconds(); -1: none."""
        cdef pool_t* pool = self.sampler.sampling.pool
        cdef int64_t slice_
        cdef bint in_main = lapse_this_thread() == MAIN_THREAD
        cdef bint signalled
        cdef uint32_t seen
        cdef int rc
        self.w.counters.pool_waits += 1
        while True:
            seen = load_u32(&pool.event)
            if pool_ready(pool) > 0:
                return 0
            rc = load_i32(&self.van.state)
            if rc == 0:
                rc = load_i32(&pool.ended)
            if rc != 0:
                return rc
            slice_ = SLICE
            if deadline >= 0:
                slice_ = min(slice_, deadline - nanoseconds())
                if slice_ <= 0:
                    return ERR_TIMEOUT
            add_u32(&pool.waiting, 1)
            fence()                             # pairs with the one in the pool between `event` and a look at `waiting`
            signalled = park(&pool.event, seen, slice_)
            add_u32(&pool.waiting, <uint32_t>-1)
            if in_main and (signalled or slice_ == SLICE) and self.interrupted():
                return ERR_INTERRUPTED

    cdef int sample_error(self, int code) noexcept nogil:
        """Keep what a callable has raised, for the Python face to raise, or for whoever looks at draw_error."""
        if code == ERR_DRAW:
            with gil:
                self.draw_error, self.sampler.error = self.sampler.error, None
                if self.draw_error is None:             # the pool's thread has called it
                    self.draw_error = self.sampler.sampling.error
        return code

    cdef Timestamp pull_sample(self, int64_t handle, Key* keys, Py_ssize_t n, void* vals) noexcept nogil:
        cdef int rc = self.draw_sample(handle, keys, n)
        if unlikely(rc != 0):
            return rc
        if self.sampler.sampling.scheme == LOCAL:
            rc = self.pull_drawn(keys, n, vals)
            if rc != 0:
                return DONE if rc > 0 else rc
        return self.issue(OP_PULL, keys, n, vals)

    cdef int pull_drawn(self, Key* keys, Py_ssize_t n, void* vals) noexcept nogil:
        cdef worker_t* w = self.w
        cdef store_t* s = self.protocol.store
        cdef Py_ssize_t m, i, j
        cdef int tries
        cdef uint32_t missed
        if not self.protocol.shared_memory or load_i64(&w.pins.cached) != 0:
            return 0
        if ensure_room(w, n) != 0:
            return ERR_MEMORY
        m = pull_rows(s, keys, n, vals, w.misses)
        if m > 0 and not (self.sampler.sampling.with_replacement and self.sampler.sampling.uniform):
            return 0
        for j in range(m):
            i = w.misses[j]
            for tries in range(REDRAWS):
                if self.sampler.redraw(keys + i) <= 0:
                    return 0                    # nothing is here: the keys are pulled as they are
                if pull_rows(s, keys + i, 1, <char*>vals + i * <Py_ssize_t>self.sampler.sampling.longest, &missed) == 0:
                    break
            else:
                return 0
        w.counters.pulled_local += n
        return 1

    cdef int finish_sample(self, int64_t handle) noexcept nogil:
        cdef int rc = refusal(self.w, self.van)
        if unlikely(rc != 0):
            return rc
        return self.sampler.finish(handle) if self.sampler is not None else ERR_NO_SAMPLING

    cdef int barrier(self) noexcept nogil:
        cdef int rc
        if self.w == NULL:
            return ERR_STOPPED
        if self.w.held != 0:
            return ERR_HELD
        with gil:
            try:
                self.server._worker_barrier(self.index)
                return 0
            except BaseException as error:
                self.signal = error
        rc = load_i32(&self.van.state)
        return rc if rc != 0 else ERR_INTERRUPTED

    cdef Py_ssize_t value_length(self, Key key) noexcept nogil:
        return visible_bytes(self.protocol.store, key) // self.protocol.store.itemsize

    cdef Key num_keys(self) noexcept nogil:
        return self.protocol.store.num_keys
