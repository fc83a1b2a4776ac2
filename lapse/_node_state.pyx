# Design: what there is, without what is done with it. Routing (`_routing`) and messages (`_protocol`) are built on this class.
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

import numpy

from lapse._answers cimport answers_free
from lapse._counters cimport worker_dict, relocations_dict
from lapse._directory cimport cached_owner, digest_directory, directory_free, directory_new, home_of, owner_of
from lapse._operations cimport counters_t, worker_free, worker_new
from lapse._store cimport COMING, HERE, digest_rows, is_home, slot_word, state_of, store_free, store_new, transfer_of
from lapse._sync cimport load_i64, store_u64
from lapse._trace cimport trace_choose, trace_drain, trace_free, trace_new
from lapse._transfers cimport transfer_free, transfer_t
from lapse._types cimport ERR_MEMORY, FLOAT32, FLOAT64, INT32, INT64, MAX_NODES

cdef Key MAX_KEYS = <Key>1 << 56     # more than any machine has memory for; sizes of tables stay far below 2**64

DTYPES = {"float32": (FLOAT32, 4), "float64": (FLOAT64, 8), "int32": (INT32, 4), "int64": (INT64, 8)}


cdef class NodeState:
    """The state of one node: its share of the parameters, the directory of the keys homed here, what waits for keys in transfer.

    num_keys: size of the key space. rank, num_nodes: this node, all nodes. dtype: "float32", "float64", "int32" or "int64". visible, stored:
    numbers per key, an int or a C-contiguous uint32 array of num_keys. max_workers: worker slots of this node. location_caches: route by
    guesses of the owner. shared_memory: workers reach local rows directly. credit_ops: operations that a worker may have under way.
    """

    def __cinit__(self, Key num_keys, Rank rank=0, Rank num_nodes=1, *, dtype="float32", visible=1, stored=None,
                  int max_workers=1, bint location_caches=False, bint shared_memory=True, int64_t credit_ops=1024):
        cdef uint32_t* visible_lengths = NULL
        cdef uint32_t* stored_lengths = NULL
        cdef size_t uniform_visible = 0, uniform_stored = 0
        cdef Key per_home
        if not 0 < num_nodes <= MAX_NODES or not 0 <= rank < num_nodes:
            raise ValueError(f"rank {rank} of {num_nodes} nodes")
        if num_keys <= 0 or max_workers <= 0 or credit_ops <= 0:
            raise ValueError("num_keys, max_workers and credit_ops must be positive")
        if num_keys > MAX_KEYS:
            raise MemoryError(f"no memory for {num_keys} keys")
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        self.me = rank
        self.num_nodes = num_nodes
        self.max_workers = max_workers
        self.shared_memory = shared_memory
        self.credit_ops = credit_ops
        stored = visible if stored is None else stored
        if isinstance(visible, int) and isinstance(stored, int):
            uniform_visible, uniform_stored = visible, stored
        else:
            visible = numpy.ascontiguousarray(numpy.broadcast_to(visible, num_keys), dtype=numpy.uint32)
            stored = numpy.ascontiguousarray(numpy.broadcast_to(stored, num_keys), dtype=numpy.uint32)
            visible_lengths = <uint32_t*><uintptr_t>visible.ctypes.data
            stored_lengths = <uint32_t*><uintptr_t>stored.ctypes.data
        per_home = (num_keys + num_nodes - 1) // num_nodes
        self.store = store_new(num_keys, min(rank * per_home, num_keys), min((rank + 1) * per_home, num_keys),
                               DTYPES[dtype][0], uniform_visible, uniform_stored, visible_lengths, stored_lengths)
        self.directory = directory_new(num_keys, rank, num_nodes, location_caches and shared_memory)
        self.workers = <worker_t**>calloc(max_workers, sizeof(worker_t*))
        self.server = worker_new(0, 1, num_nodes)
        if self.store == NULL or self.directory == NULL or self.workers == NULL or self.server == NULL:
            raise MemoryError(f"no memory for {num_keys} keys")

    def __dealloc__(self):
        cdef Key key
        cdef int i
        if self.store != NULL and self.moving:
            for key in range(self.store.num_keys):
                if state_of(self.store, key, slot_word(self.store, key)) == COMING:
                    transfer_free(<transfer_t*>transfer_of(slot_word(self.store, key)))
        if self.store != NULL:
            store_free(self.store)
        free(self.arrived)
        directory_free(self.directory)
        trace_free(self.trace_)
        if self.workers != NULL:
            for i in range(self.max_workers):
                worker_free(self.workers[i])
        free(self.workers)
        worker_free(self.server)
        answers_free(&self.answers)

    cdef worker_t* add_worker(self, uint32_t index, int64_t credit_ops) noexcept nogil:
        cdef worker_t* w
        if index >= <uint32_t>self.max_workers:
            return NULL
        if self.workers[index] == NULL:         # a later Worker in the same slot takes over what the earlier one left open
            w = worker_new(index, credit_ops, self.num_nodes)
            store_u64(<uint64_t*>&self.workers[index], <uint64_t><uintptr_t>w)
        return self.workers[index]

    cdef int watch(self, Key begin, Key end, int64_t room) noexcept nogil:
        free(self.arrived)
        self.arrived_mask = room - 1
        self.arrived = <int64_t*>calloc(room, sizeof(int64_t))
        if self.arrived == NULL:
            return ERR_MEMORY
        self.watch_begin = begin
        self.watch_end = end
        return 0

    def connect(self, Sink sink not None):
        """Give the protocol its way out. Once, before anything is issued."""
        self.sink = sink

    def audit(self):
        """Digests for the comparison of homes and owners; only at quiescence.

        "directory"[o] is [count, digest] of the keys homed here that node o owns by the directory; "rows"[h] of the keys that are here and
        homed at h. Keys that never moved are left out on both sides. Home h's directory[o] must equal node o's rows[h].
        """
        digests = numpy.zeros((4, self.num_nodes), numpy.uint64)
        cdef uint64_t* d = <uint64_t*><uintptr_t>digests.ctypes.data
        cdef Rank n = self.num_nodes
        with nogil:
            digest_directory(self.directory, d, d + n)
            digest_rows(self.store, self.directory.per_home, d + 2 * n, d + 3 * n)
        return {"directory": digests[:2].T.tolist(), "rows": digests[2:].T.tolist()}

    def leftovers(self):
        """What must be zero at quiescence: keys in transfer to this node, open operations, unanswered routes."""
        cdef Key key, coming = 0
        cdef int i
        cdef int64_t operations = 0, pins = 0
        with nogil:
            if self.moving:
                for key in range(self.store.num_keys):
                    if state_of(self.store, key, slot_word(self.store, key)) == COMING:
                        coming += 1
            for i in range(self.max_workers):
                if self.workers[i] != NULL:
                    operations += load_i64(&self.workers[i].open_ops)
                    pins += self.workers[i].pins.used
        return {"coming": coming, "operations": operations, "pins": pins}

    def open_operations(self):
        """How many operations of this node's workers have not finished."""
        cdef int i
        cdef int64_t operations = 0
        for i in range(self.max_workers):
            if self.workers[i] != NULL:
                operations += load_i64(&self.workers[i].open_ops)
        return operations

    def is_local(self, Key key):
        """Is the key here at this instant?"""
        self.check_key(key)
        return state_of(self.store, key, slot_word(self.store, key)) == HERE

    def owner(self, Key key):
        """Who owns the key: exact at this instant for keys that are here or homed here, else a guess (its home, or the cache)."""
        cdef Rank guess
        self.check_key(key)
        if state_of(self.store, key, slot_word(self.store, key)) == HERE:
            return self.me
        if is_home(self.store, key):
            return owner_of(self.directory, key)
        guess = cached_owner(self.directory, key)
        return guess if guess >= 0 and guess != self.me else home_of(self.directory, key)

    def home(self, Key key):
        """The rank of the key's home node."""
        self.check_key(key)
        return home_of(self.directory, key)

    cdef int check_key(self, Key key) except -1:
        if not 0 <= key < self.store.num_keys:
            raise IndexError(f"key {key} is not in [0, {self.store.num_keys})")
        return 0

    def counters(self):
        """Statistics so far: a dict of ints, with one dict per worker and one for operations through the server thread."""
        return {
            "workers": [worker_dict(&self.workers[i].counters) for i in range(self.max_workers) if self.workers[i] != NULL],
            "server": worker_dict(&self.server.counters),
            **relocations_dict(&self.counters_),
        }

    def trace(self, keys):
        """Note the relocations of these keys from now on (call once, before the node serves)."""
        if self.trace_ != NULL:
            raise RuntimeError("keys are traced already")
        for key in keys:
            self.check_key(key)
        self.trace_ = trace_new(self.store.num_keys)
        if self.trace_ == NULL:
            raise MemoryError("no memory to trace keys")
        for key in keys:
            trace_choose(self.trace_, key)

    def drain_trace(self):
        """The relocations of traced keys since the last call: (nanoseconds, key, "arrived" or "left", peer, epoch)."""
        return trace_drain(self.trace_) if self.trace_ != NULL else []

    def reset_counters(self):
        """Start the statistics anew."""
        cdef int i
        memset(&self.counters_, 0, sizeof(protocol_counters_t))
        memset(&self.server.counters, 0, sizeof(counters_t))
        for i in range(self.max_workers):
            if self.workers[i] != NULL:
                memset(&self.workers[i].counters, 0, sizeof(counters_t))
