# Design: the thread that fills a node's pool. It has a worker slot of its own, behind those of the program's workers, and so its own
# operations and credit; it comes to no barrier. A group is drawn, localized with one operation, and when that has arrived each draw goes
# into the pool as often as it is to be used, in random order. Groups overlap, and arrive in the order in which they were drawn.
#
# How much is to be there: what is used up in twice the time that a group takes to arrive, at the pace measured of late, and at least a
# group ready and a group coming. A worker that finds too little doubles the amount for a while: while it waits, the pace measured is too
# low.
#
# It sleeps on its worker's event word, which the server thread bumps when a group has arrived, and a worker when it leaves less than
# there should be. No GIL, but for a callable's draws.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from lapse._draws cimport next_below
from lapse._operations cimport worker_t
from lapse._pool cimport pool_end, pool_put, pool_t
from lapse._schemes cimport Sampling
from lapse._sync cimport (fence, load_i32, load_i64, load_u32, nanoseconds, park, pthread_mutex_lock, pthread_mutex_unlock, store_i32,
                          store_u32)
from lapse._types cimport DONE, ERR_DRAW, ERR_MEMORY, ERR_STOPPED, Key, Timestamp
from lapse._worker cimport Worker

cdef enum:
    GROUPS = 64                 # that may be under way
    SLICE = 100000000           # nanoseconds of sleep
    WINDOW = 1000000            # nanoseconds that a measurement of the pace takes at least
    MOST_BOOST = 64

cdef struct group_t:
    Timestamp ts
    int64_t began
    Key* keys                   # owned; group_size

cdef struct filler_t:
    group_t[GROUPS] groups      # a ring: [first, next)
    int64_t first, next
    Key* uses                   # owned; group_size * reuse
    double pace                 # uses per nanosecond
    double lead                 # nanoseconds from drawing a group to its arrival
    int64_t measured            # when the pace was measured last
    int64_t taken               # and what had been taken until then
    int64_t dry
    int64_t boost
    int64_t boosted             # when boost has changed last


cdef class System:
    """What a Worker needs of a server, for one that belongs to the node itself."""
    cdef readonly object _protocol, _van, _sampling

    def __init__(self, protocol, van, sampling):
        self._protocol, self._van, self._sampling = protocol, van, sampling


cdef class Filler:
    """Fills the pool of a node: `run` in a thread of its own, `stop` from another one."""
    cdef Worker worker
    cdef Sampling sampling

    def __init__(self, protocol, van, Sampling sampling not None, int index, int64_t credit_bytes):
        self.sampling = sampling
        self.worker = Worker()
        self.worker.attach(System(protocol, van, sampling), index, credit_bytes, -1)
        sampling.filler = self.worker.w

    def stop(self):
        """Tell the thread to end: workers that wait for the pool get a RuntimeError. Asynchronous; thread-safe; local."""
        store_i32(&self.sampling.pool.stop, 1)
        self.worker.van.wake(self.worker.w)

    def run(self):
        """Fill the pool until `stop`, or until the node ends; what is under way has finished then. Blocking; one thread; local."""
        cdef filler_t* f = <filler_t*>calloc(1, sizeof(filler_t))
        cdef int64_t size = self.sampling.group_size
        cdef int i, code = ERR_MEMORY
        if f != NULL:
            with nogil:
                f.uses = <Key*>malloc(size * self.sampling.reuse * sizeof(Key))
                f.groups[0].keys = <Key*>malloc(GROUPS * size * sizeof(Key))
                if f.uses != NULL and f.groups[0].keys != NULL:
                    for i in range(1, GROUPS):
                        f.groups[i].keys = f.groups[0].keys + i * size
                    code = fill(self, f)
        self.sampling.error = self.worker.sampler.error if code == ERR_DRAW else None
        with nogil:
            pool_end(self.sampling.pool, code)
            self.worker.waitall()
            if f != NULL:
                free(f.uses)
                free(f.groups[0].keys)
            free(f)


cdef int fill(Filler self, filler_t* f) noexcept nogil:
    """The loop. Returns the code for those who find the pool empty from now on."""
    cdef worker_t* w = self.worker.w
    cdef pool_t* pool = self.sampling.pool
    cdef int64_t group = self.sampling.group_size * self.sampling.reuse
    cdef int64_t lacking
    cdef uint32_t seen
    cdef int rc
    f.boost = 1
    f.measured = nanoseconds()
    while True:
        seen = load_u32(&w.event)
        rc = load_i32(&self.worker.van.state)
        if rc != 0:
            return rc
        if load_i32(&pool.stop):
            return ERR_STOPPED
        while f.first < f.next and self.worker.is_finished(f.groups[f.first % GROUPS].ts) == 1:
            rc = publish(self, f)
            if rc != 0:
                return rc
        measure(self, f)
        lacking = lack(self, f)
        while lacking > 0 and f.next - f.first < GROUPS:
            rc = begin_group(self, f)
            if rc != 0:
                return rc
            lacking -= group
            if f.groups[(f.next - 1) % GROUPS].ts == DONE:
                break                           # all was here
        if f.first < f.next and f.groups[f.first % GROUPS].ts == DONE:
            continue
        store_u32(&w.sleeping, 1)
        fence()                                 # the last look comes after `sleeping` is seen by Van.wake
        if load_u32(&w.event) == seen:
            park(&w.event, seen, SLICE)
        store_u32(&w.sleeping, 0)


cdef int begin_group(Filler self, filler_t* f) noexcept nogil:
    """Draw a group and send for it. 0, or an ERR_ code."""
    cdef group_t* g = &f.groups[f.next % GROUPS]
    cdef pool_t* pool = self.sampling.pool
    cdef int rc = self.worker.sampler.raw(g.keys, self.sampling.group_size)
    if rc != 0:
        return rc
    if load_i32(&pool.stop):                    # while a callable was drawing: the node may be past its last look at what is under way
        return ERR_STOPPED
    g.began = nanoseconds()
    g.ts = self.worker.localize(g.keys, self.sampling.group_size)
    if g.ts < DONE:
        return <int>g.ts
    f.next += 1
    pthread_mutex_lock(&pool.lock)
    pool.coming += self.sampling.group_size * self.sampling.reuse
    pthread_mutex_unlock(&pool.lock)
    return 0


cdef int publish(Filler self, filler_t* f) noexcept nogil:
    """The oldest group has arrived: its uses go into the pool. 0, or ERR_MEMORY."""
    cdef group_t* g = &f.groups[f.first % GROUPS]
    cdef int64_t size = self.sampling.group_size, n = size * self.sampling.reuse, i, j
    cdef double took = <double>(nanoseconds() - g.began)
    cdef Key other
    f.first += 1
    f.lead = took if f.lead == 0.0 else f.lead + (took - f.lead) * (0.5 if took > f.lead else 0.1)
    for i in range(self.sampling.reuse):
        memcpy(f.uses + i * size, g.keys, size * sizeof(Key))
    for i in range(n - 1, 0, -1):               # Fisher, Yates
        j = <int64_t>next_below(&self.worker.sampler.rng, <uint64_t>(i + 1))
        other = f.uses[i]
        f.uses[i] = f.uses[j]
        f.uses[j] = other
    self.worker.w.counters.pool_refills += 1
    return pool_put(self.sampling.pool, f.uses, n, n)


cdef void measure(Filler self, filler_t* f) noexcept nogil:
    """How fast uses are taken."""
    cdef pool_t* pool = self.sampling.pool
    cdef int64_t now = nanoseconds(), taken, dry = load_i64(&pool.dry)
    cdef double pace
    if dry != f.dry:
        f.boost = min(2 * f.boost, <int64_t>MOST_BOOST)
        f.boosted = now
        f.dry = dry
    elif f.boost > 1 and now - f.boosted > 10 * WINDOW:
        f.boost -= 1
        f.boosted = now
    if now - f.measured < WINDOW:
        return
    pthread_mutex_lock(&pool.lock)
    taken = pool.taken
    pthread_mutex_unlock(&pool.lock)
    pace = <double>(taken - f.taken) / <double>(now - f.measured)
    f.pace = pace if f.pace == 0.0 else f.pace + (pace - f.pace) * 0.25
    f.taken = taken
    f.measured = now


cdef int64_t lack(Filler self, filler_t* f) noexcept nogil:
    """Uses that should be sent for now."""
    cdef pool_t* pool = self.sampling.pool
    cdef int64_t group = self.sampling.group_size * self.sampling.reuse
    cdef double wanted = 2.0 * <double>group * <double>f.boost + 2.0 * f.pace * f.lead
    cdef int64_t target = min(<int64_t>wanted, GROUPS * group), lacking
    pthread_mutex_lock(&pool.lock)
    pool.target = target
    lacking = target - (pool.tail - pool.head) - pool.coming
    pthread_mutex_unlock(&pool.lock)
    return lacking
