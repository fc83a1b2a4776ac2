# Design: what the workers of a node share for sampling. It is checked and made once, before the first Worker, and then only read, but for
# the list of local keys, which they draw from when few are here (see _here.pxd).
#
# Locking: Sampling.lock guards the list; it is held for a look over the range, and for nothing else.
import os

import numpy as np

cimport cython
cimport numpy as cnp
from libc.stdint cimport int64_t
from posix.unistd cimport getpid
from lapse._draws cimport FUNCTION, LOG_UNIFORM, UNIFORM, WEIGHTS, distribution_free, distribution_init, total_weight
from lapse._here cimport here_free, look_here
from lapse._pool cimport pool_free, pool_new
from lapse._store cimport visible_bytes
from lapse._sync cimport load_i64, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock
from lapse._types cimport Key

from lapse.errors import KeyRangeError

cnp.import_array()

SCHEMES = {"naive": NAIVE, "preloc": PRELOC, "pool": POOL, "local": LOCAL}

cdef enum:
    RECENT = 256                # an arrival is worth a look at so many keys


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
