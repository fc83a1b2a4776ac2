"""One node's protocol, for tests that write its messages themselves; what it sends is kept."""
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from lapse._directory cimport cached_owner, directory_epoch, owner_of, set_owner
from lapse._operations cimport ensure_room, op_finished, worker_t
from lapse._pins cimport pin_add, pin_drop, pin_find, pin_t, pins_free, pins_t
from lapse._protocol cimport Protocol, Sink, out_t
from lapse._routing cimport FINE_STEPS
from lapse._store cimport (COMING, HERE, LATCH, epoch_of, gone_word, is_home, row_of, slot_word, state_of, store_t, stored_bytes, transfer_of,
                           unlatch)
from lapse._sync cimport load_i64, peek_u64, store_i32
from lapse._transfers cimport entry_t, entry_values, transfer_t
from lapse._types cimport ERR_FAILED, ERR_MEMORY, Epoch, Key, Rank, Timestamp


cdef class Recorder(Sink):
    cdef public list sent       # (dest, message)
    cdef public int unsent      # messages that were begun, and neither sent nor discarded
    cdef public int locks       # how often a channel has been locked
    cdef public int locked      # channels that are
    cdef public bint starved    # there is no memory for messages
    cdef public bint broken     # no message can be sent
    cdef public int64_t clock   # what time it is
    cdef public object before_lock      # called with the channel's destination, or None
    cdef public object at_step  # called between two steps of the protocol, if it is to make FINE_STEPS; or None

    def __cinit__(self):
        self.sent = []

    cdef void lock(self, Rank dest) noexcept nogil:
        with gil:
            if self.before_lock is not None:
                self.before_lock(dest)
        self.locks += 1
        self.locked += 1

    cdef void unlock(self, Rank dest) noexcept nogil:
        self.locked -= 1

    cdef int64_t now(self) noexcept nogil:
        return self.clock

    cdef void step(self) noexcept nogil:
        with gil:
            if self.at_step is not None:
                self.at_step()

    cdef int alloc(self, out_t* out, size_t size) noexcept nogil:
        if self.starved:
            return ERR_MEMORY
        out.data = <char*>malloc(size)
        out.size = size
        self.unsent += 1
        if out.data == NULL:
            return ERR_MEMORY
        memset(out.data, 0xaa, size)            # what is not written shows
        return 0

    cdef int send(self, Rank dest, out_t* out) noexcept nogil:
        if self.broken:
            self.discard(out)
            return ERR_FAILED
        with gil:
            self.sent.append((dest, out.data[:out.size]))
        self.discard(out)
        return 0

    cdef void discard(self, out_t* out) noexcept nogil:
        self.unsent -= 1
        free(out.data)


cdef class Probe:
    cdef Protocol protocol
    cdef worker_t* worker       # borrowed
    cdef public Recorder sink
    cdef dict held              # {timestamp: array}

    def __init__(self, num_keys, rank, num_nodes, *, credit=8, **settings):
        self.protocol = Protocol(num_keys, rank, num_nodes, **settings)
        self.sink = Recorder()
        self.held = {}
        self.protocol.connect(self.sink)
        self.worker = self.protocol.add_worker(0, credit)
        if self.worker == NULL:
            raise MemoryError("no memory for a worker")

    def add_worker(self, uint32_t index, credit):
        """The places of its ring; None: there is no such worker."""
        cdef worker_t* w = self.protocol.add_worker(index, credit)
        return w.mask + 1 if w != NULL else None

    def fill_tail(self, int index):
        """Write what the protocol does not use of a worker; how many bytes of that were not 0."""
        cdef worker_t* w = self.protocol.workers[index]
        cdef char* begin = <char*>&w.held_keys
        cdef size_t i, size = <size_t>(<char*>(w + 1) - begin), before = 0
        for i in range(size):
            before += begin[i] != 0
        memset(begin, 0x5a, size)
        return before

    def issue(self, int kind, keys, vals, worker=0):
        """The timestamp of an operation on keys (int64)."""
        cdef Timestamp ts
        rc, ts = self.issued(kind, keys, vals, worker)
        assert rc == 0
        return ts

    def issued(self, int kind, keys, vals, int worker=0):
        """(what the protocol says: 0 or an error, the timestamp)"""
        cdef const Key* k = <const Key*><uintptr_t>keys.ctypes.data
        cdef uint32_t todo[256]
        cdef Timestamp ts = -1
        cdef int i, n = len(keys)
        assert n <= 256
        for i in range(n):
            todo[i] = i
        if ensure_room(self.protocol.workers[worker], n) != 0:      # as a Worker does
            return ERR_MEMORY, ts
        rc = self.protocol.issue(self.protocol.workers[worker], kind, k, n, <void*><uintptr_t>vals.ctypes.data, todo, n, 0, &ts)
        self.held[ts] = vals
        return rc, ts

    def handle(self, bytes message, Rank src):
        """What the protocol says of the message: 0 or a violation."""
        cdef const char* data = message
        cdef char* copy = <char*>malloc(len(message) + 1)
        cdef int rc
        memcpy(copy, data, len(message))
        rc = self.protocol.handle(copy, len(message), src)
        free(copy)
        return rc

    def state(self):
        """All that a message may change: of each key where it is, its value, and what waits for it; directory; operations; messages."""
        cdef store_t* s = self.protocol.store
        cdef Key key
        cdef uint64_t word
        cdef transfer_t* t
        cdef entry_t* e
        keys = []
        for key in range(s.num_keys):
            word = slot_word(s, key)
            what = [word, cached_owner(self.protocol.directory, key)]
            if is_home(s, key):
                what += [owner_of(self.protocol.directory, key), directory_epoch(self.protocol.directory, key)]
            if state_of(s, key, word) == HERE and word != 0:
                what += [epoch_of(s, key, word), row_of(s, key, &word)[:stored_bytes(s, key)]]
            elif state_of(s, key, word) == COMING:
                t = <transfer_t*>transfer_of(word)
                what += [t.last_epoch, t.next_owner, t.next_epoch]
                e = t.first
                while e != NULL:
                    what.append((e.kind, e.origin, e.worker, e.ts, e.position, entry_values(e)[:e.value_bytes]))
                    e = e.next
            keys.append(what)
        operations = [(load_i64(&self.worker.ops[i].ts), load_i64(&self.worker.ops[i].remaining)) for i in range(self.worker.mask + 1)]
        return keys, operations, [array.tobytes() for array in self.held.values()], len(self.sink.sent), self.sink.unsent

    def latched(self):
        """How many keys' latches are taken."""
        cdef store_t* s = self.protocol.store
        cdef Key key, found = 0
        for key in range(s.num_keys):
            found += peek_u64(s.slots + key) & LATCH
        return found

    def contradict(self, Key key, Rank owner, Epoch epoch):
        """The directory says something else than before."""
        set_owner(self.protocol.directory, key, owner, epoch)

    def lose(self, Key key):
        """A key that has no row yet is not here any more, and nobody knows."""
        unlatch(self.protocol.store, key, gone_word(1))

    def step_finely(self):
        self.protocol.faults = FINE_STEPS

    def look(self, name):
        """What the protocol says of itself: audit, counters, leftovers."""
        return getattr(self.protocol, name)()

    def owner(self, Key key):
        return self.protocol.owner(key)

    def finished(self, Timestamp ts):
        return op_finished(self.worker, ts)

    def open_operations(self):
        return load_i64(&self.worker.open_ops)

    def blamed(self):
        """(key, epoch) that the last violation was about."""
        return self.protocol.bad_key, self.protocol.bad_epoch

    def watch(self, begin, end, room):
        assert self.protocol.watch(begin, end, room) == 0

    def arrived(self):
        """(how many watched keys have come, the last of them)."""
        cdef int64_t count = load_i64(&self.protocol.arrivals)
        return count, [load_i64(self.protocol.arrived + (i & self.protocol.arrived_mask))
                       for i in range(max(0, count - self.protocol.arrived_mask - 1), count)]

    def pinned(self):
        return load_i64(&self.worker.pins.cached), self.worker.pins.used

    def is_pinned(self, Key key):
        return self.protocol.is_pinned(self.worker, key)


cdef class Pins:
    """A table of pins."""
    cdef pins_t pins

    def __dealloc__(self):
        pins_free(&self.pins)

    def add(self, Key key, Rank route, bint cached):
        cdef int rc
        with nogil:
            rc = pin_add(&self.pins, key, route, cached)
        return rc

    def drop(self, Key key):
        cdef int rc
        with nogil:
            rc = pin_drop(&self.pins, key)
        return rc

    def find(self, Key key):
        """(route, cached, count), or None."""
        cdef pin_t pin
        cdef bint found
        with nogil:
            found = pin_find(&self.pins, key, &pin)
        return (pin.route, pin.cached, pin.count) if found else None

    def lock(self, bint taken):
        """As a thread does that is in the table."""
        store_i32(&self.pins.lock, taken)

    def held(self):
        return load_i64(&self.pins.cached), self.pins.used

    def storm(self, Key begin, Key end, Py_ssize_t rounds, int shift=0):
        """Add, find and drop the keys again and again, without the GIL; how often one was not as this thread had left it."""
        cdef Py_ssize_t wrong = 0, i
        cdef Key key
        cdef pin_t pin
        with nogil:
            for i in range(rounds):
                for key in range(begin, end):
                    wrong += pin_add(&self.pins, key << shift, <Rank>(key & 7), True) != 0
                wrong += load_i64(&self.pins.cached) < end - begin         # (without the lock, as the fast path looks)
                for key in range(begin, end):
                    wrong += not pin_find(&self.pins, key << shift, &pin) or pin.route != key & 7 or pin.count != 1
                    wrong += pin_drop(&self.pins, key << shift) != 0
        return wrong
