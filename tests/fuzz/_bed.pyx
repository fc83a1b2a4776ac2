# Design: real nodes talk to each other in memory (states.py). At some instant that stops; what one of them has been through until then, the
# calls of its workers and the frames that came, is its history, and played to an empty node it gives the same state again. So a bed has a
# state with all that belongs to it (keys here, away, on their way with queues and next owners, operations under way, a directory that has
# moved on), takes microseconds to be made anew, and needs that only when a frame was accepted: a refused one changes nothing, which is the
# first thing that is checked. Of accepted ones it is checked what they may have changed.
#
# An input is a byte that names the bed and then frames: who sent it (a byte), its size (two), its bytes. One thread, with the GIL.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from lapse._directory cimport directory_epoch, owner_of
from lapse._operations cimport counters_t, op_t, worker_t
from lapse._pins cimport pins_t
from lapse._protocol cimport FINE, Protocol, Sink, entry_t, out_t, transfer_t
from lapse._store cimport (AWAY, COMING, HERE, LATCH, OWNED, KeyState, absent_rows, away_epoch, batch_bytes, epoch_of, is_home, pull_rows,
                           push_rows, remove_row, row_of, set_rows, state_of, store_t, stored_bytes, transfer_of, visible_bytes)
from lapse._transfers cimport entry_values, transfer_free
from lapse._types cimport ERR_MEMORY, OP_LOCALIZE, OP_PULL, OP_PUSH, OP_SET, Key, Rank, Timestamp
from lapse._wire cimport (ACK, FRAME_BYTES, HAND_OVER, HEADER_BYTES, LOCALIZE, MAGIC, PULL, PUSH, SET, TRANSFER, VALUES, VERSION,
                          aux_bytes, frame_bytes, header_t)

from lapse._protocol import VIOLATIONS

cdef uint64_t JOB = 0x5eed


cdef inline uint64_t mix(uint64_t h, uint64_t x) noexcept nogil:
    h = (h ^ x) * <uint64_t>0x9E3779B97F4A7C15
    return h ^ (h >> 29)


cdef uint64_t digest(uint64_t h, const void* data, size_t size) noexcept nogil:
    cdef const uint8_t* p = <const uint8_t*>data
    cdef uint64_t x
    while size >= 8:
        memcpy(&x, p, 8)
        h = mix(h, x)
        p += 8
        size -= 8
    x = size
    if size:
        memcpy(&x, p, size)
    return mix(h, x)


cdef class Relay(Sink):
    """A node's way out: to the post of the nodes it talks to, or into nothing, after a look at what it says."""

    cdef void begin(self) noexcept nogil:
        self.messages = 0
        self.wrong = NULL
        memset(self.left, 0, sizeof(self.left))

    cdef void lock(self, Rank dest) noexcept nogil:
        if self.held >= 0:
            self.wrong = "a channel was locked while another one was"
        self.held = dest

    cdef void unlock(self, Rank dest) noexcept nogil:
        if self.held != dest:
            self.wrong = "a channel was unlocked that was not locked"
        self.held = -1

    cdef int alloc(self, out_t* out, size_t size) noexcept nogil:
        if size > <size_t>FRAME_BYTES:
            self.wrong = "a message larger than a frame was made"
        out.data = <char*>malloc(size)
        out.size = size
        if out.data == NULL:
            return ERR_MEMORY
        self.unsent += 1
        return 0

    cdef int send(self, Rank dest, out_t* out) noexcept nogil:
        cdef header_t* h = <header_t*>out.data
        self.unsent -= 1
        self.messages += 1
        if self.held != dest:
            self.wrong = "a message was sent by a channel that was not locked"
        elif self.post is None:
            if self.wrong == NULL:
                self.wrong = self.look(dest, out.data, out.size)
        else:
            self.seq[dest] += 1
            h.magic = MAGIC
            h.version = VERSION
            h.job = JOB
            h.src = <uint32_t>self.me
            h.seq = self.seq[dest]
            with gil:
                self.post.append((self.me, dest, out.data[:out.size]))
        free(out.data)
        return 0

    cdef void discard(self, out_t* out) noexcept nogil:
        self.unsent -= 1
        free(out.data)

    cdef int64_t now(self) noexcept nogil:
        return 1

    cdef const char* look(self, Rank dest, const char* data, size_t size) noexcept nogil:
        """What is wrong with a message that this node sends, or NULL."""
        cdef const header_t* h = <const header_t*>data
        cdef const Key* keys = <const Key*>(data + HEADER_BYTES)
        cdef size_t expected = 0
        cdef uint32_t i
        if not 0 <= dest < NODES or dest == self.me:
            return "a message went to a node that does not exist, or to its sender"
        if size < HEADER_BYTES or h.count == 0 or size < frame_bytes(h.count, 0) or h.value_bytes != size - frame_bytes(h.count, 0):
            return "a message was sent whose size is not what its header says"
        if not PULL <= h.type <= ACK or h.origin >= <uint32_t>NODES:
            return "a message of an unknown type or origin was sent"
        for i in range(h.count):
            if not 0 <= keys[i] < KEYS:
                return "a message about a key that does not exist was sent"
            if h.type == TRANSFER:
                self.left[keys[i]] += 1
                expected += stored_bytes(self.store, keys[i])
            elif h.type == PUSH or h.type == SET or h.type == VALUES:
                expected += visible_bytes(self.store, keys[i])
        if expected != h.value_bytes:
            return "a message was sent whose values are not those of its keys"
        return NULL


cdef class Bed:
    """A node of a cluster of three, and its two workers: `call` and `take` make its history, until `freeze`; then `feed` it.

    Settings are those of Protocol. post: a list that gets (from, to, frame) of what it sends until then.
    """

    def __cinit__(self, int me, list post, **settings):
        cdef int i
        self.settings = dict(settings, rank=me)
        self.node = Protocol(KEYS, me, NODES, max_workers=WORKERS, credit_ops=PLACES, **settings)
        self.relay = Relay()
        self.relay.me = me
        self.relay.held = -1
        self.relay.store = self.node.store
        self.relay.post = post
        self.node.connect(self.relay)
        for i in range(WORKERS):
            self.w[i] = self.node.add_worker(i, PLACES)
            if self.w[i] == NULL:
                raise MemoryError()

    def __dealloc__(self):
        cdef int i, j
        for i in range(self.used):
            free(self.events[i].data)
        free(self.events)
        for i in range(WORKERS):
            for j in range(PLACES):
                free(self.buffers[i][j])

    # --- the history ------------------------------------------------------------------------------------------------------------------

    def call(self, int worker, int kind, keys, bytes values=b""):
        """A worker's call; False if it would have to wait for an earlier one."""
        cdef int64_t copy[KEYS * 4]
        cdef op_t* op = self.w[worker].ops + (self.w[worker].next_ts & self.w[worker].mask)
        cdef const char* vals = values
        cdef Py_ssize_t i, n = len(keys)
        if op.remaining > 0:
            return False
        for i in range(n):
            copy[i] = keys[i]
        if (kind == OP_PUSH or kind == OP_SET) and len(values) != <Py_ssize_t>batch_bytes(self.node.store, copy, n):
            raise ValueError("values of another size")
        self.note(kind, worker, copy, n * sizeof(Key), vals, len(values))
        self.events[self.used - 1].n = n
        self.play_last()
        return True

    def take(self, bytes frame, int src):
        """A frame has come."""
        cdef const char* data = frame
        self.note(0, src, data, len(frame), NULL, 0)
        self.play_last()

    def play_last(self):
        cdef const char* wrong = self.play(&self.events[self.used - 1])
        if wrong != NULL:
            raise AssertionError(f"in its history: {wrong.decode()}")

    @property
    def faults(self):
        """Fault bits (lapse.testing.simulation.FAULTS), for tests that show that the promises can be seen broken."""
        return self.node.faults

    @faults.setter
    def faults(self, int bits):
        self.node.faults = bits

    def value_bytes(self, keys):
        """How many bytes the values of these keys have."""
        return sum([<size_t>visible_bytes(self.node.store, <Key>key) for key in keys])

    def freeze(self):
        """From now on it is fed with frames."""
        self.relay.post = None
        self.frozen = True
        self.replay()

    cdef int note(self, int kind, int who, const void* first, size_t n, const void* second, size_t m) except -1:
        cdef event_t* e
        if self.frozen:
            raise RuntimeError("its history is complete")
        if self.used == self.room:
            e = <event_t*>realloc(self.events, (2 * self.room + 32) * sizeof(event_t))
            if e == NULL:
                raise MemoryError()
            self.events = e
            self.room = 2 * self.room + 32
        e = self.events + self.used
        e.kind = kind
        e.who = who
        e.n = n
        e.data = <char*>malloc(n + m + 1)
        if e.data == NULL:
            raise MemoryError()
        memcpy(e.data, first, n)
        if m:
            memcpy(e.data + n, second, m)
        self.used += 1
        return 0

    cdef const char* play(self, event_t* e) noexcept nogil:
        """NULL, or what is wrong."""
        cdef char* frame
        cdef int rc
        if e.kind != 0:
            return self.issue(e.who, e.kind, <const Key*>e.data, e.n, e.data + e.n * sizeof(Key))
        frame = <char*>malloc(e.n)              # (the node may write to it)
        if frame == NULL:
            return "out of memory"
        memcpy(frame, e.data, e.n)
        rc = self.node.handle(frame, e.n, e.who)
        free(frame)
        if rc != FINE:
            return "a real message was refused"
        return NULL

    cdef const char* issue(self, int worker, int kind, const Key* keys, Py_ssize_t n, const char* values) noexcept nogil:
        """As a Worker does it: what is here at once, the rest through the protocol."""
        cdef worker_t* w = self.w[worker]
        cdef int place = <int>(w.next_ts & w.mask)
        cdef size_t size = 0 if kind == OP_LOCALIZE else batch_bytes(self.node.store, keys, n)
        cdef char* buffer = <char*>malloc(size)
        cdef Py_ssize_t m = n, i
        cdef Timestamp ts
        if buffer == NULL and size > 0:
            return "out of memory"
        if kind == OP_PUSH or kind == OP_SET:
            memcpy(buffer, values, size)
        elif size:
            memset(buffer, 0x55, size)
        if self.node.shared_memory and (kind == OP_LOCALIZE or w.pins.cached == 0):
            if kind == OP_PULL:
                m = pull_rows(self.node.store, keys, n, buffer, w.misses)
            elif kind == OP_PUSH:
                m = push_rows(self.node.store, keys, n, buffer, w.misses)
            elif kind == OP_SET:
                m = set_rows(self.node.store, keys, n, buffer, w.misses)
            else:
                m = absent_rows(self.node.store, keys, n, w.misses)
        else:
            for i in range(n):
                w.misses[i] = <uint32_t>i
        if m == 0:
            free(buffer)
            return NULL
        free(self.buffers[worker][place])
        self.buffers[worker][place] = buffer
        self.sizes[worker][place] = size
        if self.node.issue(w, kind, keys, n, buffer, w.misses, m, size, &ts) != 0:
            return "a call was refused"
        return NULL

    # --- making the state anew ----------------------------------------------------------------------------------------------------------

    cdef void reset(self) noexcept nogil:
        """An empty node."""
        cdef store_t* s = self.node.store
        cdef worker_t* w
        cdef Key key
        cdef uint64_t word
        cdef int i, j
        cdef char scratch[256]
        for key in range(KEYS):
            word = s.slots[key] & ~<uint64_t>LATCH
            if state_of(s, key, word) == COMING:
                transfer_free(<transfer_t*>transfer_of(word))
            elif word & OWNED:
                remove_row(s, key, word, 0, scratch)
            s.slots[key] = 0
        memset(self.node.directory.words, 0, (self.node.directory.home_end - self.node.directory.home_begin) * sizeof(uint64_t))
        if self.node.directory.cache != NULL:
            memset(self.node.directory.cache, 0, KEYS * 2)
        for i in range(WORKERS):
            w = self.w[i]
            for j in range(PLACES):
                free(self.buffers[i][j])
                self.buffers[i][j] = NULL
                self.sizes[i][j] = 0
                w.ops[j].ts = -1
                w.ops[j].remaining = 0
                if w.ops[j].under_way != NULL:
                    memset(w.ops[j].under_way, 0, w.ops[j].under_way_room)
            w.next_ts = 0
            w.event = 0
            w.open_ops = w.open_bytes = 0
            memset(&w.counters, 0, sizeof(counters_t))
            free(w.pins.places)
            memset(&w.pins, 0, sizeof(pins_t))
        memset(&self.node.counters_, 0, sizeof(self.node.counters_))
        memset(&self.node.server.counters, 0, sizeof(counters_t))
        self.node.moving = 0
        self.node.late_used = 0
        self.node.answers.used = 0

    cdef void replay(self) noexcept nogil:
        cdef int i
        cdef const char* wrong
        self.reset()
        for i in range(self.used):
            wrong = self.play(&self.events[i])
            if wrong != NULL and not self.node.faults:
                self.wrong = wrong
        self.picture(&self.now)
        self.dirty = False

    cdef void picture(self, picture_t* p) noexcept nogil:
        cdef store_t* s = self.node.store
        cdef key_picture_t* k
        cdef worker_picture_t* v
        cdef op_picture_t* o
        cdef worker_t* w
        cdef transfer_t* t
        cdef entry_t* e
        cdef char* row
        cdef op_t* op
        cdef Key key
        cdef uint64_t word
        cdef int i, j
        memset(p, 0, sizeof(picture_t))
        for key in range(KEYS):
            k = &p.key[key]
            k.word = word = s.slots[key]
            if state_of(s, key, word) == COMING:
                t = <transfer_t*>transfer_of(word)
                k.transfer = mix(mix(t.last_epoch, <uint64_t>t.next_owner), t.next_epoch)
                e = t.first
                while e != NULL:
                    k.queue = mix(mix(mix(mix(k.queue, e.kind), e.origin), e.worker), <uint64_t>e.ts)
                    k.queue = mix(mix(mix(k.queue, e.position), e.routed), <uint64_t>e.wanted)
                    k.queue = digest(k.queue, entry_values(e), e.value_bytes)
                    e = e.next
            elif word & OWNED and not word >> 63:
                row = row_of(s, key, &word)
                k.row = digest(epoch_of(s, key, word), row, stored_bytes(s, key))
            if is_home(s, key):
                k.directory = self.node.directory.words[key - self.node.directory.home_begin]
            elif self.node.directory.cache != NULL:
                k.guess = self.node.directory.cache[key]
        for i in range(WORKERS):
            v = &p.worker[i]
            w = self.w[i]
            v.next_ts = <uint64_t>w.next_ts
            v.open_ops = <uint64_t>w.open_ops
            v.open_bytes = <uint64_t>w.open_bytes
            v.event = w.event
            v.pins = mix(<uint64_t>w.pins.cached, <uint64_t>w.pins.used)
            if w.pins.places != NULL:
                for j in range(<int>w.pins.mask + 1):
                    v.pins = mix(mix(v.pins, <uint64_t>w.pins.places[j].key), <uint64_t>w.pins.places[j].count)
            v.counters = digest(0, &w.counters, sizeof(counters_t))
            for j in range(PLACES):
                o = &v.op[j]
                op = w.ops + j
                o.ts = <uint64_t>op.ts
                o.remaining = <uint64_t>op.remaining
                o.under_way = digest(0, op.under_way, op.n) if op.remaining and op.kind != LOCALIZE else 0
                o.buffer = digest(0, self.buffers[i][j], self.sizes[i][j])
                o.rest = mix(mix(<uint64_t>op.kind, <uint64_t>op.n), op.credit) if op.ts >= 0 else 0
        p.counters = digest(0, &self.node.counters_, sizeof(self.node.counters_))
        p.served = digest(0, &self.node.server.counters, sizeof(counters_t))
        p.answers = self.node.answers.used
        p.late = self.node.late_used

    # --- feeding --------------------------------------------------------------------------------------------------------------------------

    def feed(self, bytes data):
        """The frames of an input (without the byte that names the bed). AssertionError if they broke something."""
        cdef const char* p = data
        cdef const char* wrong = self.feed_all(<const uint8_t*>p, len(data))
        if wrong != NULL:
            raise AssertionError(self.report())

    def report(self):
        """What the last input broke."""
        text = "accepted" if self.verdict == FINE else VIOLATIONS.get(self.verdict, self.verdict)
        return (f"{self.wrong.decode() if self.wrong != NULL else 'nothing is wrong'}; the node ({self.settings}) said: {text}; "
                f"the frame: {(self.frame or b'').hex()}")

    cdef const char* feed_all(self, const uint8_t* data, size_t size) noexcept:
        cdef size_t n
        cdef Rank src
        cdef int frames = 0
        cdef const char* wrong
        self.wrong = NULL
        while size >= 3 and frames < MAX_FRAMES and self.wrong == NULL:
            src = (self.node.me + 1 + data[0] % (NODES - 1)) % NODES        # (a node does not get frames of others from itself)
            n = min(<size_t>data[1] | <size_t>data[2] << 8, size - 3)
            self.wrong = self.feed_one(data + 3, n, src)
            data += 3 + n
            size -= 3 + n
            frames += 1
        if self.dirty:
            wrong = self.wrong
            self.replay()           # now, so that what an execution takes in memory is what it leaks
            self.wrong = wrong if self.wrong == NULL else self.wrong
        return self.wrong

    cdef const char* feed_one(self, const uint8_t* data, size_t size, Rank src) noexcept:
        cdef picture_t after
        cdef char* frame = <char*>malloc(size)          # exactly: the sanitizer sees what is read beyond it
        cdef const char* wrong
        cdef uint8_t kind = data[6] if size > 6 else 0
        if size:
            memcpy(frame, data, size)
        self.relay.begin()
        self.verdict = self.node.handle(frame, size, src)
        free(frame)
        self.picture(&after)
        if self.relay.unsent != 0:
            wrong = "a message was made and neither sent nor freed"
            self.relay.unsent = 0
        elif self.relay.held >= 0:
            wrong = "a channel stayed locked"
            self.relay.held = -1
        elif self.verdict != FINE:
            self.refused += 1
            wrong = NULL
            if self.relay.messages:
                wrong = "a refused frame was answered or forwarded"
            elif memcmp(&after, &self.now, sizeof(picture_t)) != 0:
                wrong = self.difference(&self.now, &after)
        else:
            self.accepted += 1
            self.dirty = True
            wrong = self.relay.wrong
            if size < HEADER_BYTES:
                wrong = "a frame shorter than a header was accepted"
            elif wrong == NULL:
                wrong = self.compare(<const header_t*>data, <const Key*>(data + HEADER_BYTES), &self.now, &after)
            memcpy(&self.now, &after, sizeof(picture_t))
        if wrong != NULL:
            self.dirty = True
            self.frame = data[:size]
        return wrong

    # --- what may change --------------------------------------------------------------------------------------------------------------------

    cdef const char* difference(self, const picture_t* a, const picture_t* b) noexcept nogil:
        cdef int i
        for i in range(KEYS):
            if a.key[i].word != b.key[i].word or a.key[i].row != b.key[i].row:
                return "a refused frame changed a key's slot or value"
            if a.key[i].transfer != b.key[i].transfer or a.key[i].queue != b.key[i].queue:
                return "a refused frame changed what waits for a key"
            if a.key[i].directory != b.key[i].directory or a.key[i].guess != b.key[i].guess:
                return "a refused frame changed the directory or a guess"
        for i in range(WORKERS):
            if memcmp(&a.worker[i], &b.worker[i], sizeof(worker_picture_t)) != 0:
                return "a refused frame changed a worker's operations, buffers, pins or counters"
        return "a refused frame changed the node's counters or left answers"

    cdef const char* compare(self, const header_t* frame, const Key* frame_keys, const picture_t* a, const picture_t* b) noexcept nogil:
        """An accepted frame: has it changed what it may change? The rules, once more, and written by somebody else."""
        cdef header_t h
        cdef Key key
        cdef uint8_t named[KEYS]
        cdef const char* wrong
        cdef int64_t open_ops
        cdef uint32_t i
        cdef int j, k
        memcpy(&h, frame, sizeof(header_t))             # (it need not be aligned)
        memset(named, 0, sizeof(named))
        if h.count > 64 or not PULL <= h.type <= ACK or h.origin >= <uint32_t>NODES:
            return "a frame with an unknown type or origin, or with many keys, was accepted"
        for i in range(h.count):
            memcpy(&key, frame_keys + i, sizeof(Key))
            if not 0 <= key < KEYS:
                return "a frame about a key that does not exist was accepted"
            named[key] += 1
        if h.hops and h.type > SET:
            return "a message that nobody forwards had been forwarded"
        for key in range(KEYS):
            if not named[key] and memcmp(&a.key[key], &b.key[key], sizeof(key_picture_t)) != 0:
                return "a frame changed a key that it does not name"
            wrong = self.look_at_key(key, h.type, &a.key[key], &b.key[key])
            if wrong != NULL:
                return wrong
        for j in range(WORKERS):
            open_ops = 0
            for k in range(PLACES):
                if <int64_t>b.worker[j].op[k].remaining < 0 or b.worker[j].op[k].remaining > a.worker[j].op[k].remaining:
                    return "an operation has fewer than no positions left, or got more"
                open_ops += b.worker[j].op[k].remaining != 0
                if a.worker[j].op[k].remaining == 0 and a.worker[j].op[k].buffer != b.worker[j].op[k].buffer:
                    return "an array was written to that belongs to no operation any more"
                if (h.type != TRANSFER and (<uint32_t>j != h.worker or a.worker[j].op[k].ts != h.ts or h.origin != <uint32_t>self.node.me)
                        and memcmp(&a.worker[j].op[k], &b.worker[j].op[k], sizeof(op_picture_t)) != 0):
                    return "a frame changed another operation than the one it is about"
                if a.worker[j].op[k].ts != b.worker[j].op[k].ts or a.worker[j].op[k].rest != b.worker[j].op[k].rest:
                    return "a frame changed what an operation is"
            if <uint64_t>open_ops != b.worker[j].open_ops:
                return "the number of open operations is wrong"
        if b.answers != 0:
            return "answers were left"
        return NULL

    cdef const char* look_at_key(self, Key key, int kind, const key_picture_t* a, const key_picture_t* b) noexcept nogil:
        cdef store_t* s = self.node.store
        cdef KeyState before = state_of(s, key, a.word), after = state_of(s, key, b.word)
        cdef int left = self.relay.left[key]
        cdef Rank owner, next_owner
        if b.word & LATCH:
            return "a latch stayed taken"
        if before == HERE and after != HERE and not (left == 1 and (kind == LOCALIZE or kind == HAND_OVER)):
            return "a key left without one TRANSFER, or by something else than LOCALIZE and HAND_OVER"
        if before != HERE and after == HERE and kind != TRANSFER:
            return "a key came without a TRANSFER"
        if before == AWAY and after == COMING:
            return "a frame of another node began a transfer to this one"
        if before == COMING and after == AWAY and not (left == 1 and kind == TRANSFER):
            return "a key that was expected did not come, or was not sent on once"
        if before == after and left:
            return "a TRANSFER of a key was sent that stayed what it was"
        if is_home(s, key):
            owner = owner_of(self.node.directory, key)
            if after == HERE and (owner != self.node.me or epoch_of(s, key, b.word) != directory_epoch(self.node.directory, key)):
                return "home has a key that it does not own by its directory, or with another epoch"
            if after == AWAY and owner == self.node.me:
                return "home owns a key by its directory that is not there"
            if after == COMING:
                next_owner = (<transfer_t*>transfer_of(b.word)).next_owner
                if (owner == self.node.me) != (next_owner < 0):        # (the next owner may have one itself)
                    return "home awaits a key to keep it, but does not own it by its directory; or the other way round"
            if owner >= NODES or owner < 0:
                return "the directory names a node that does not exist"
        return NULL

    cdef void describe_to(self, layout_t* l) noexcept nogil:
        cdef store_t* s = self.node.store
        cdef Key key
        cdef uint64_t word
        cdef int i, j
        memset(l, 0, sizeof(layout_t))
        l.me = self.node.me
        for key in range(KEYS):
            l.visible[key] = <uint32_t>visible_bytes(s, key)
            l.stored[key] = <uint32_t>stored_bytes(s, key)
            word = s.slots[key]
            if state_of(s, key, word) == COMING:
                l.epochs[key] = (<transfer_t*>transfer_of(word)).last_epoch + 1
                if (<transfer_t*>transfer_of(word)).next_owner >= 0:
                    l.epochs[key] = (<transfer_t*>transfer_of(word)).next_epoch - 1
                elif is_home(s, key):
                    l.epochs[key] = directory_epoch(self.node.directory, key)
            elif state_of(s, key, word) == HERE:
                l.epochs[key] = epoch_of(s, key, word) + 1
            else:
                l.epochs[key] = away_epoch(word) + 1
        for i in range(WORKERS):
            for j in range(PLACES):
                if self.w[i].ops[j].remaining > 0:
                    l.open_worker[l.opened] = i
                    l.open_ts[l.opened] = <uint64_t>self.w[i].ops[j].ts
                    l.open_kind[l.opened] = <uint8_t>self.w[i].ops[j].kind
                    l.open_n[l.opened] = <uint32_t>self.w[i].ops[j].n
                    l.opened += 1
