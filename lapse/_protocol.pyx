# Design: all of the relocation protocol, and no I/O (DESIGN of Lapse: Renz-Wieland et al., PVLDB 13(11), 2020, section 3; the order of
# asynchronous operations is stronger here, see docs/protocol.md). Messages leave through the sink while the lock is held that makes the step
# atomic.
#
# Threads: any number of workers call issue(), one each; one server thread calls handle(). Locking: channel, then latch, nothing else. What
# makes the order:
#   * only the server thread removes a key from this node or inserts one, so what is HERE stays HERE for that thread, and only a
#     worker's or (shared_memory off) the server's localize makes an AWAY key COMING;
#   * a key homed elsewhere becomes COMING under the lock of the channel to its home, and operations on it take that lock,
#     re-check its state, and send: so none that was routed before can be overtaken by the LOCALIZE or overtake it;
#   * a key homed here changes its owner from O under the lock of the channel to O, and operations take that lock, re-check the entry, and send.
from libc.stdint cimport uint8_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset

import numpy

cimport cython
from lapse._directory cimport (cached_owner, digest_directory, directory_epoch, directory_free, directory_new, expect_owner, home_of,
                               owner_of, remember_owner, set_owner)
from lapse._operations cimport chain_to, ensure_offsets, ensure_room, worker_free, worker_new
from lapse._pins cimport pin_add, pin_drop, pin_find
from lapse._store cimport (AWAY, COMING, HERE, ROW_AHEAD, SLOT_AHEAD, KeyState, absent_rows, add_values, away_epoch, batch_bytes,
                           digest_rows, epoch_of, expect_row, expect_slot, first_out_of_range, gone_word, incoming_word, insert_row,
                           is_home, latch, pull_rows, push_rows, remove_row, row_of, set_rows, slot_word, state_of, store_free,
                           store_new, stored_bytes, transfer_of, unlatch, visible_bytes)
from lapse._sync cimport add_i64, load_i64, load_u64, prefetch_write, store_i32, store_i64, store_u64, unlikely
from lapse._trace cimport trace_add, trace_choose, trace_drain, trace_free, trace_new
from lapse._transfers cimport entry_free, entry_new, entry_values, transfer_append, transfer_free, transfer_new
from lapse._types cimport (ERR_FAILED, ERR_MEMORY, FLOAT32, FLOAT64, INT32, INT64, MAX_NODES, OP_LOCALIZE, OP_PULL, OP_PUSH,
                           OP_SET)
from lapse._wire cimport (ACK, FRAME_BYTES, HAND_OVER, HEADER_BYTES, LOCALIZE, PULL, PUSH, SET, TRANSFER, VALUES, aux_bytes,
                          frame_bytes)

cdef enum:
    # what became of a position
    STILL_AWAY = 0
    SETTLED = 1                 # done on the spot
    QUEUED = 2                  # waits for the key
    GO = 3                      # goes into the message
    # where a position was found, for the statistics
    LOCAL = 0
    IN_TRANSFER = 1
    REMOTE = 2
    LONG_WAY = 8                # hops after which an operation is counted as astray
    MAX_LOOKS = 1000            # at a key that has neither arrived nor an owner elsewhere, until home counts as contradicting itself
    MAX_HOPS = 64               # hops after which the job is aborted
    LATE_MESSAGES = 3           # FAULT_LATE_DIRECTORY: how many messages late

cdef Key MAX_KEYS = <Key>1 << 56     # more than any machine has memory for; sizes of tables stay far below 2**64

VIOLATIONS = {
    BAD_SIZE: "a message whose size does not follow from its keys",
    BAD_TYPE: "a message of an unknown type",
    BAD_KEY: "a key out of range",
    BAD_ORIGIN: "an origin that cannot be",
    BAD_HOME: "a relocation message that its key's home did not send or should not get",
    OWNER_ASKS: "a localize by the node that owns the key already",
    NOT_HERE: "a key that should be here is neither here nor on its way",
    SECOND_NEXT: "a second next owner for a key in transfer",
    NOT_COMING: "a transfer of a key that was not asked for",
    BAD_EPOCH: "an epoch that is not the next one",
    TOO_MANY_HOPS: "an operation that was forwarded more than 64 times",
    BAD_ANSWER: "an answer to an operation that is not open",
    NO_MEMORY: "out of memory",
    SEND_FAILED: "a message could not be sent",
}

DTYPES = {"float32": (FLOAT32, 4), "float64": (FLOAT64, 8), "int32": (INT32, 4), "int64": (INT64, 8)}


cdef inline void tally(counters_t* c, int kind, int where, int64_t n) noexcept nogil:
    (<int64_t*>c)[(kind - OP_PULL) * 3 + where] += n


cdef inline size_t entry_offset(const batch_t* b, const store_t* s, Py_ssize_t i) noexcept nogil:
    return b.offsets[i] if b.offsets != NULL else i * s.uniform_visible


cdef void value_offsets(const store_t* s, const Key* keys, Py_ssize_t n, uint64_t* offsets) noexcept nogil:
    """Byte offsets of n values that follow each other; n + 1 entries."""
    cdef uint64_t at = 0
    cdef Py_ssize_t i
    for i in range(n):
        offsets[i] = at
        at += visible_bytes(s, keys[i])
    offsets[n] = at


cdef int relocation_bucket(int64_t ns) noexcept nogil:
    """Eight buckets per power of two: 12 % wide."""
    cdef int power = 0
    cdef uint64_t x = <uint64_t>max(ns, 1)
    while x >> (power + 1):
        power += 1
    if power < 3:
        return <int>x
    return min(power * 8 + <int>((x >> (power - 3)) & 7), 511)


cdef int64_t bucket_value(int bucket) noexcept nogil:
    cdef int power = bucket // 8
    if bucket < 8:
        return bucket
    return (<int64_t>(8 + bucket % 8)) << (power - 3)


cdef class Sink:
    cdef void lock(self, Rank dest) noexcept nogil:
        pass

    cdef void unlock(self, Rank dest) noexcept nogil:
        pass

    cdef int alloc(self, out_t* out, size_t size) noexcept nogil:
        return ERR_MEMORY

    cdef int send(self, Rank dest, out_t* out) noexcept nogil:
        return ERR_FAILED

    cdef void wake(self, worker_t* w) noexcept nogil:
        pass

    cdef int64_t now(self) noexcept nogil:
        return 0

    cdef void step(self) noexcept nogil:
        pass


@cython.final
cdef class Protocol:
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
        directory_free(self.directory)
        trace_free(self.trace_)
        if self.workers != NULL:
            for i in range(self.max_workers):
                worker_free(self.workers[i])
        free(self.workers)
        worker_free(self.server)
        for i in range(self.answers_room):
            free(self.answers[i].keys)
            free(self.answers[i].positions)
            free(self.answers[i].values)
        free(self.answers)

    cdef worker_t* add_worker(self, uint32_t index, int64_t credit_ops) noexcept nogil:
        cdef worker_t* w
        if index >= <uint32_t>self.max_workers:
            return NULL
        if self.workers[index] == NULL:         # a later Worker in the same slot takes over what the earlier one left open
            w = worker_new(index, credit_ops, self.num_nodes)
            store_u64(<uint64_t*>&self.workers[index], <uint64_t><uintptr_t>w)
        return self.workers[index]

    # --- issuing ------------------------------------------------------------------------------------------------------------

    cdef int issue(self, worker_t* w, int kind, const Key* keys, Py_ssize_t n, void* vals, uint32_t* todo, Py_ssize_t m,
                   size_t credit, Timestamp* ts) noexcept nogil:
        cdef batch_t b
        cdef int rc
        cdef op_t* op = w.ops + (w.next_ts & w.mask)
        memset(&b, 0, sizeof(b))
        ts[0] = w.next_ts
        if self.store.visible != NULL and kind != OP_LOCALIZE:
            if ensure_offsets(op, n) != 0:
                return ERR_MEMORY
            value_offsets(self.store, keys, n, op.offsets)
            b.offsets = op.offsets
        if kind == OP_SET and m > 1:
            b.done = keep_last(keys, todo, &m)
            if b.done < 0:
                return ERR_MEMORY
        store_i64(&op.ts, w.next_ts)            # before `remaining`, which opens the operation: see find_op
        op.vals = <char*>vals
        op.n = n
        op.kind = kind
        op.credit = credit
        add_i64(&w.open_ops, 1)
        add_i64(&w.open_bytes, <int64_t>credit)
        store_i64(&op.remaining, m + b.done + 1)
        w.next_ts += 1
        b.kind = kind
        b.origin = self.me
        b.worker = w.index
        b.ts = ts[0]
        b.own = True
        b.to_server = not self.shared_memory
        b.counted = not b.to_server
        b.caches = self.directory.cache != NULL
        b.w = w
        b.op = op
        b.keys = keys
        b.vals = <char*>vals
        rc = self.route(&b, todo, m)
        self.complete(w, ts[0], b.done + 1)
        return ERR_FAILED if rc == NOT_HERE else rc

    cdef void complete(self, worker_t* w, Timestamp ts, int64_t count) noexcept nogil:
        """Count positions of an operation as done; wake its worker when they were the last."""
        cdef op_t* op = w.ops + (ts & w.mask)
        cdef int64_t credit = <int64_t>op.credit        # read first: at 0 the place may be used again
        if add_i64(&op.remaining, -count) == 0:
            add_i64(&w.open_bytes, -credit)
            add_i64(&w.open_ops, -1)
            self.sink.wake(w)

    cdef bint is_pinned(self, worker_t* w, Key key) noexcept nogil:
        cdef pin_t pin
        return load_i64(&w.pins.cached) != 0 and pin_find(&w.pins, key, &pin) and pin.cached

    cdef void between(self) noexcept nogil:
        """Another thread may come in between here: a simulation that wants fine steps lets it."""
        if unlikely(self.faults & FINE_STEPS):
            self.sink.step()

    # --- routing ---------------------------------------------------------------------------------------------------------------

    cdef Rank destination(self, batch_t* b, Key key) noexcept nogil:
        """Where a position goes if its key is not here: a first look, re-checked under the channel's lock."""
        cdef pin_t pin
        cdef Rank guess
        if b.to_server:
            return self.me
        if is_home(self.store, key):
            return owner_of(self.directory, key)
        if b.caches and b.kind != OP_LOCALIZE:
            if not self.faults & FAULT_NO_CACHE_RULE and pin_find(&b.w.pins, key, &pin):
                return pin.route
            guess = cached_owner(self.directory, key)
            if guess >= 0 and guess != self.me:
                return guess
        return home_of(self.directory, key)

    cdef int settle(self, batch_t* b, Py_ssize_t i) noexcept nogil:
        """Apply position i if its key is here, queue it if the key is on its way: SETTLED, QUEUED, STILL_AWAY or ERR_MEMORY."""
        cdef Key key = b.keys[i]
        cdef uint64_t word = latch(self.store, key)
        cdef KeyState state = state_of(self.store, key, word)
        cdef entry_t* e
        cdef char* row
        cdef char* vals
        cdef size_t size = 0
        cdef int result = STILL_AWAY
        if state == HERE:
            result = SETTLED
            if b.kind != OP_LOCALIZE:
                vals = b.vals + entry_offset(b, self.store, i)
                row = row_of(self.store, key, &word)
                if row == NULL:
                    result = ERR_MEMORY
                elif b.kind == OP_PULL:
                    memcpy(vals, row, visible_bytes(self.store, key))
                elif b.kind == OP_PUSH:
                    add_values(self.store, key, row, vals)
                else:
                    memcpy(row, vals, visible_bytes(self.store, key))
        elif state == COMING and not (self.faults & FAULT_NO_QUEUE and b.kind != OP_LOCALIZE):
            if b.kind == OP_PUSH or b.kind == OP_SET:
                size = visible_bytes(self.store, key)
            e = entry_new(size)
            if e == NULL:
                result = ERR_MEMORY
            else:
                result = QUEUED
                e.kind = b.kind
                e.origin = b.origin
                e.worker = b.worker
                e.ts = b.ts
                e.position = b.positions[i] if b.positions != NULL else <uint32_t>i
                e.routed = not b.own
                e.wanted = 0
                if size:
                    memcpy(entry_values(e), b.vals + entry_offset(b, self.store, i), size)
                transfer_append(<transfer_t*>transfer_of(word), e)
        unlatch(self.store, key, word)
        if result == SETTLED:
            b.done += 1
        if b.counted and result > 0:
            tally(&b.w.counters, b.kind, LOCAL if result == SETTLED else IN_TRANSFER, 1)
        return result

    cdef int recheck(self, batch_t* b, Py_ssize_t i, Rank dest) noexcept nogil:
        """Under the lock of the channel to `dest`: does position i go there? GO, what settle() says, or STILL_AWAY for another route."""
        cdef Key key = b.keys[i]
        cdef bint home = is_home(self.store, key)
        cdef bint pinned = False
        cdef pin_t pin
        cdef transfer_t* t
        cdef entry_t* e
        cdef uint64_t word
        cdef Epoch epoch
        if b.to_server:
            return GO
        if self.faults & FAULT_SPLIT_ROUTE and b.kind != OP_LOCALIZE:
            return self.pinned_go(b, key, dest)
        if b.caches and not home and b.kind != OP_LOCALIZE and not self.faults & FAULT_NO_CACHE_RULE:
            pinned = pin_find(&b.w.pins, key, &pin)
            if pinned and pin.route != dest:
                return STILL_AWAY
            if pinned and pin.cached:
                return self.pinned_go(b, key, dest)
        self.between()
        if state_of(self.store, key, slot_word(self.store, key)) != AWAY:
            if not (self.faults & FAULT_NO_QUEUE and b.kind != OP_LOCALIZE):
                return self.settle(b, i)
        if home and owner_of(self.directory, key) != dest:
            return STILL_AWAY
        if b.kind != OP_LOCALIZE:
            return self.pinned_go(b, key, dest)
        # The key becomes incoming before anyone can see the LOCALIZE.
        word = latch(self.store, key)
        if state_of(self.store, key, word) != AWAY:         # (another worker was here first)
            unlatch(self.store, key, word)
            return self.settle(b, i)
        t = transfer_new(away_epoch(word))
        if t == NULL:
            unlatch(self.store, key, word)
            return ERR_MEMORY
        e = &t.own
        e.kind = OP_LOCALIZE
        e.origin = b.origin
        e.worker = b.worker
        e.ts = b.ts
        e.position = 0
        e.routed = False
        if b.now == 0:
            b.now = self.sink.now()
        e.wanted = b.now
        transfer_append(t, e)
        store_i32(&self.moving, 1)
        unlatch(self.store, key, incoming_word(t))
        if home:
            epoch = directory_epoch(self.directory, key) + 1
            b.w.offsets[i] = epoch
            self.move_owner(key, self.me, epoch)
        return GO

    cdef int pinned_go(self, batch_t* b, Key key, Rank dest) noexcept nogil:
        """GO, with the route pinned at once: the same key further on in this call must not join a queue here in the meantime."""
        if b.caches and not is_home(self.store, key) and not self.faults & FAULT_NO_CACHE_RULE:
            if pin_add(&b.w.pins, key, dest, dest != home_of(self.directory, key)) != 0:
                return ERR_MEMORY
        return GO

    cdef int route(self, batch_t* b, uint32_t* todo, Py_ssize_t m) noexcept nogil:
        """Send, queue or apply the entries todo[0..m) of the batch. `todo` is used up. 0, ERR_MEMORY, ERR_FAILED or NOT_HERE."""
        cdef worker_t* w = b.w
        cdef uint32_t* chain = w.chain
        cdef Py_ssize_t j, left
        cdef int64_t i, following, go, go_last
        cdef int d, num_dests, rc, looks = 0, again = 0
        cdef Rank dest
        cdef Key key
        while m > 0:
            looks += again
            again = 0
            # chain the entries by destination, in the order of the call
            num_dests = 0
            left = 0
            for j in range(m):
                i = todo[j]
                key = b.keys[i]
                self.between()
                dest = self.destination(b, key)
                self.between()
                if not b.to_server:
                    # Joining a local queue, or reaching a row that has come in the meantime, takes the latch only.
                    if (dest == self.me or state_of(self.store, key, slot_word(self.store, key)) != AWAY) and not (
                            b.caches and self.is_pinned(w, key)):
                        rc = self.settle(b, i)
                        if rc < 0:
                            return rc
                        if rc != STILL_AWAY:
                            continue
                        if dest == self.me:             # it left in this instant: look again
                            if looks == MAX_LOOKS:      # the entry changes before the key leaves, so the next look should have told
                                if not b.own:
                                    self.blame(NOT_HERE, key, directory_epoch(self.directory, key))
                                return NOT_HERE
                            again = 1
                            todo[left] = <uint32_t>i
                            left += 1
                            continue
                num_dests = chain_to(w, dest, i, num_dests)
            # one channel after the other
            rc = 0
            for d in range(num_dests):
                dest = w.order[d]
                i = w.heads[dest]
                w.heads[dest] = -1
                if rc < 0:
                    continue
                go = go_last = -1
                self.sink.lock(dest)
                while True:
                    following = -1 if i == w.tails[dest] else <int64_t>chain[i]
                    rc = self.recheck(b, i, dest)
                    if rc == GO:
                        if go < 0:
                            go = i
                        else:
                            chain[go_last] = <uint32_t>i
                        go_last = i
                    elif rc == STILL_AWAY:
                        todo[left] = <uint32_t>i
                        left += 1
                    if rc < 0 or following < 0:
                        break
                    i = following
                if go >= 0 and rc >= 0:
                    chain[go_last] = <uint32_t>go_last          # the last one points to itself
                    rc = self.emit_chain(b, dest, go)
                self.sink.unlock(dest)
            if rc < 0:
                return rc
            m = left
        return 0

    cdef int emit_chain(self, batch_t* b, Rank dest, int64_t head) noexcept nogil:
        """Send the chained entries to `dest`, under its lock. A localize of keys homed here goes straight to the owner, as HAND_OVER."""
        cdef int rc = 0
        if b.kind != OP_LOCALIZE or b.to_server:
            return self.emit(b, dest, b.kind, head, False)
        rc = self.emit(b, dest, LOCALIZE, head, False)
        return rc if rc < 0 else self.emit(b, dest, HAND_OVER, head, True)

    cdef int emit(self, batch_t* b, Rank dest, int kind, int64_t head, bint homed) noexcept nogil:
        """Frames of at most FRAME_BYTES; a localize's frames are cut by the size of the values that will come."""
        cdef store_t* s = self.store
        cdef bint relocates = b.kind == OP_LOCALIZE
        cdef bint carries = kind == PUSH or kind == SET
        cdef int64_t i = head, first, at
        cdef size_t count, size, answer, used
        cdef out_t out
        cdef header_t* h
        cdef Key* keys
        cdef uint32_t* aux
        cdef char* vals
        cdef Key key
        cdef int rc
        while True:
            # how many fit
            first = i
            count = size = 0
            while True:
                key = b.keys[i]
                if not relocates or b.to_server or is_home(s, key) == homed:
                    answer = stored_bytes(s, key) if relocates else visible_bytes(s, key)
                    if count > 0 and frame_bytes(count + 1, size + answer) > FRAME_BYTES:
                        break
                    count += 1
                    size += answer
                if <int64_t>b.w.chain[i] == i:
                    i = -1
                    break
                i = b.w.chain[i]
            if count > 0:
                if self.sink.alloc(&out, frame_bytes(count, size if carries else 0)) != 0:
                    return ERR_MEMORY
                h = <header_t*>out.data
                memset(h, 0, HEADER_BYTES)
                h.type = <uint8_t>kind
                h.hops = <uint8_t>b.hops
                h.origin = <uint32_t>b.origin
                h.worker = b.worker
                h.ts = <uint64_t>b.ts
                h.count = <uint32_t>count
                h.value_bytes = size if carries else 0
                keys = <Key*>(out.data + HEADER_BYTES)
                aux = <uint32_t*>(keys + count)
                vals = <char*>aux + aux_bytes(count)
                if count & 1:
                    aux[count] = 0
                at = first
                used = 0
                while used < count:
                    key = b.keys[at]
                    if not relocates or b.to_server or is_home(s, key) == homed:
                        keys[used] = key
                        if kind == HAND_OVER:
                            # not the directory's: from move_owner on, the entry can change under another channel's lock
                            aux[used] = <uint32_t>b.w.offsets[at]
                        else:
                            aux[used] = b.positions[at] if b.positions != NULL else <uint32_t>at
                        if carries:
                            memcpy(vals, b.vals + entry_offset(b, s, at), visible_bytes(s, key))
                            vals += visible_bytes(s, key)
                        used += 1
                    at = b.w.chain[at]
                rc = self.sink.send(dest, &out)
                if rc != 0:
                    return ERR_FAILED
                if b.counted:
                    tally(&b.w.counters, b.kind, REMOTE, <int64_t>count)
                elif not b.own and not relocates:
                    self.counters_.forwarded += <int64_t>count
            if i < 0:
                return 0

    cdef void move_owner(self, Key key, Rank owner, Epoch epoch) noexcept nogil:
        """Home's directory names another owner, on receipt of the LOCALIZE."""
        cdef int i = self.late_used
        if unlikely(self.faults & FAULT_LATE_DIRECTORY) and i < 64:
            self.late_keys[i] = key
            self.late_owners[i] = owner
            self.late_epochs[i] = epoch
            self.late_due[i] = LATE_MESSAGES
            self.late_used = i + 1
        else:
            set_owner(self.directory, key, owner, epoch)

    cdef void settle_late(self) noexcept nogil:
        """FAULT_LATE_DIRECTORY: the entries whose time has come."""
        cdef int i, left = 0
        for i in range(self.late_used):
            self.late_due[i] -= 1
            if self.late_due[i] <= 0:
                set_owner(self.directory, self.late_keys[i], self.late_owners[i], self.late_epochs[i])
            else:
                self.late_keys[left] = self.late_keys[i]
                self.late_owners[left] = self.late_owners[i]
                self.late_epochs[left] = self.late_epochs[i]
                self.late_due[left] = self.late_due[i]
                left += 1
        self.late_used = left

    # --- messages: server thread only ---------------------------------------------------------------------------------------------

    cdef int blame(self, int violation, Key key, Epoch epoch) noexcept nogil:
        self.bad_key = key
        self.bad_epoch = epoch
        return violation

    cdef op_t* find_op(self, uint32_t worker, Timestamp ts) noexcept nogil:
        """An open operation of a worker of this node, or NULL."""
        cdef worker_t* w
        cdef op_t* op
        if worker >= <uint32_t>self.max_workers:
            return NULL
        w = <worker_t*><uintptr_t>load_u64(<uint64_t*>&self.workers[worker])
        if w == NULL or ts < 0:
            return NULL
        op = w.ops + (ts & w.mask)
        return op if load_i64(&op.remaining) > 0 and load_i64(&op.ts) == ts else NULL

    cdef bint has_place(self, const op_t* op, uint32_t position, Key key) noexcept nogil:
        """Does that position of the call exist, and, where lengths differ, have the length of the key's value?"""
        return position < <size_t>op.n and (self.store.visible == NULL or op.kind == OP_LOCALIZE or
                                            op.offsets[position + 1] - op.offsets[position] == visible_bytes(self.store, key))

    cdef int handle(self, char* data, size_t size, Rank src) noexcept nogil:
        cdef header_t* h = <header_t*>data
        cdef const Key* keys
        cdef const uint32_t* aux
        cdef char* vals
        cdef size_t expected = 0
        cdef Py_ssize_t i, n
        if unlikely(self.late_used != 0):
            self.settle_late()
        # everything is checked before anything changes
        if size < HEADER_BYTES:
            return self.blame(BAD_SIZE, -1, 0)
        n = h.count
        if size < frame_bytes(n, 0) or h.value_bytes != size - frame_bytes(n, 0):
            return self.blame(BAD_SIZE, -1, 0)
        if not PULL <= h.type <= ACK:
            return self.blame(BAD_TYPE, h.type, 0)
        keys = <const Key*>(data + HEADER_BYTES)
        aux = <const uint32_t*>(keys + n)
        vals = <char*>aux + aux_bytes(n)
        i = first_out_of_range(keys, n, self.store.num_keys)
        if i >= 0:
            return self.blame(BAD_KEY, keys[i], 0)
        if LOCALIZE <= h.type <= TRANSFER:
            if self.store.stored == NULL:
                size = n * self.store.uniform_stored
            else:
                size = 0
                for i in range(n):
                    size += stored_bytes(self.store, keys[i])
        else:
            size = batch_bytes(self.store, keys, n)
        if h.type == TRANSFER or h.type == PUSH or h.type == SET or h.type == VALUES:
            expected = size
        if h.value_bytes != expected:
            return self.blame(BAD_SIZE, -1, 0)
        # what it asks for comes in one frame
        if n > 1 and (h.type == PULL or h.type == LOCALIZE or h.type == HAND_OVER) and frame_bytes(n, size) > FRAME_BYTES:
            return self.blame(BAD_SIZE, -1, 0)
        if h.origin >= <uint32_t>self.num_nodes:
            return self.blame(BAD_ORIGIN, -1, 0)
        if h.type <= LOCALIZE and h.hops == 0 and <Rank>h.origin != src:
            return self.blame(BAD_ORIGIN, -1, 0)

        if h.type <= SET or (h.type == LOCALIZE and src == self.me):
            return self.handle_operation(h, keys, aux, vals, src)
        if h.type == LOCALIZE:
            return self.handle_localize(h, keys) if h.hops == 0 else self.blame(BAD_ORIGIN, -1, 0)
        if h.type == HAND_OVER:
            return self.handle_hand_over(h, keys, aux, src)
        if h.type == TRANSFER:
            return self.handle_transfer(h, keys, aux, vals)
        return self.handle_answer(h, keys, aux, vals, src)

    cdef int handle_operation(self, header_t* h, const Key* keys, const uint32_t* aux, char* vals, Rank src) noexcept nogil:
        """Serve the keys that are here, queue at those on their way, forward the rest (a localize comes here only from this node)."""
        cdef worker_t* w = self.server
        cdef Py_ssize_t n = h.count, m
        cdef bint carries = h.type == PUSH or h.type == SET
        cdef batch_t b
        cdef int rc
        if ensure_room(w, n) != 0:
            return self.blame(NO_MEMORY, -1, 0)
        if self.store.visible != NULL and carries:
            value_offsets(self.store, keys, n, w.offsets)
        m = absent_rows(self.store, keys, n, w.misses)
        self.between()
        if h.type == LOCALIZE:
            self.settle_local_localize(h, n - m)
        elif m < n:
            rc = self.serve_here(h, keys, aux, vals, m)
            if rc != FINE:
                return rc
        if m == 0:
            return FINE
        if h.hops >= MAX_HOPS:
            return self.blame(TOO_MANY_HOPS, keys[w.misses[0]], 0)
        if h.hops == LONG_WAY:
            self.counters_.long_ways += m
        memset(&b, 0, sizeof(b))
        b.kind = h.type
        b.origin = <Rank>h.origin
        b.worker = h.worker
        b.ts = <Timestamp>h.ts
        b.hops = 0 if h.type == LOCALIZE else h.hops + 1     # (a localize of this node has not left it yet)
        b.counted = src == self.me and h.hops == 0
        b.w = w
        b.keys = keys
        b.positions = aux
        b.vals = vals if carries else NULL
        b.offsets = w.offsets if self.store.visible != NULL and carries else NULL
        rc = self.route(&b, w.misses, m)
        if rc == NOT_HERE:
            return rc
        if rc != 0:
            return self.blame(NO_MEMORY if rc == ERR_MEMORY else SEND_FAILED, -1, 0)
        if b.done:
            self.complete(self.workers[b.worker], b.ts, b.done)
        return FINE

    cdef void settle_local_localize(self, header_t* h, Py_ssize_t here) noexcept nogil:
        """shared_memory off: this many keys of a localize of this node are here already."""
        if here > 0 and self.find_op(h.worker, <Timestamp>h.ts) != NULL:
            tally(&self.server.counters, OP_LOCALIZE, LOCAL, here)
            self.complete(self.workers[h.worker], <Timestamp>h.ts, here)

    cdef int serve_here(self, header_t* h, const Key* keys, const uint32_t* aux, char* vals, Py_ssize_t m) noexcept nogil:
        """Apply the entries that are here (all but the m of server.misses) and answer their origin."""
        cdef store_t* s = self.store
        cdef worker_t* w = self.server
        cdef worker_t* asker = NULL
        cdef Py_ssize_t n = h.count, i, miss = 0, at = 0
        cdef int kind = h.type
        cdef bint carries = kind != PULL
        cdef size_t bytes = 0
        cdef char* values = NULL
        cdef char* target
        cdef char* row
        cdef Key* answer_keys = NULL
        cdef uint32_t* answer_aux = NULL
        cdef out_t out
        cdef op_t* op = NULL
        cdef uint64_t word
        cdef Key key
        if <Rank>h.origin == self.me:
            op = self.find_op(h.worker, <Timestamp>h.ts)
            if op == NULL or op.kind != kind:
                return self.blame(BAD_ANSWER, keys[0], 0)
            asker = self.workers[h.worker]
            for i in range(n):
                if not self.has_place(op, aux[i], keys[i]):
                    return self.blame(BAD_ANSWER, keys[i], 0)
            if load_i64(&op.remaining) < n - m:
                return self.blame(BAD_ANSWER, keys[0], 0)
            if h.hops == 0:
                tally(&w.counters, kind, LOCAL, n - m)
        else:
            if not carries:
                for i in range(n):
                    if miss < m and <Py_ssize_t>w.misses[miss] == i:
                        miss += 1
                    else:
                        bytes += visible_bytes(s, keys[i])
                miss = 0
            if self.sink.alloc(&out, frame_bytes(n - m, bytes)) != 0:
                return self.blame(NO_MEMORY, -1, 0)
            start_answer(&out, VALUES if kind == PULL else ACK, h.origin, h.worker, h.ts, n - m, bytes)
            answer_keys = <Key*>(out.data + HEADER_BYTES)
            answer_aux = <uint32_t*>(answer_keys + (n - m))
            values = <char*>answer_aux + aux_bytes(n - m)
        if m == 0 and answer_keys != NULL:
            # the common case: everything is here
            memcpy(answer_keys, keys, n * sizeof(Key))
            memcpy(answer_aux, aux, n * sizeof(uint32_t))
            if kind == PULL:
                at = pull_rows(s, keys, n, values, w.chain)
            elif kind == PUSH:
                at = push_rows(s, keys, n, vals, w.chain)
            else:
                at = set_rows(s, keys, n, vals, w.chain)
            if at != 0:
                return self.blame(NO_MEMORY, -1, 0)
        else:
            for i in range(n):
                if miss < m and <Py_ssize_t>w.misses[miss] == i:
                    miss += 1
                    continue
                key = keys[i]
                word = latch(s, key)
                row = row_of(s, key, &word)
                if row == NULL:
                    unlatch(s, key, word)
                    return self.blame(NO_MEMORY, key, 0)
                if kind == PULL:
                    if op != NULL:
                        target = op.vals + (op.offsets[aux[i]] if s.visible != NULL else aux[i] * s.uniform_visible)
                    else:
                        target = values
                        values += visible_bytes(s, key)
                    memcpy(target, row, visible_bytes(s, key))
                else:
                    target = vals + (w.offsets[i] if s.visible != NULL else i * s.uniform_visible)
                    if kind == PUSH:
                        add_values(s, key, row, target)
                    else:
                        memcpy(row, target, visible_bytes(s, key))
                unlatch(s, key, word)
                if op != NULL:
                    if self.directory.cache != NULL and not is_home(s, key):
                        pin_drop(&asker.pins, key)
                else:
                    answer_keys[at] = key
                    answer_aux[at] = aux[i]
                    at += 1
        if op != NULL:
            self.complete(asker, <Timestamp>h.ts, n - m)
            return FINE
        self.counters_.answered += n - m
        return self.send_to(<Rank>h.origin, &out)

    cdef int send_to(self, Rank dest, out_t* out) noexcept nogil:
        cdef int rc
        self.sink.lock(dest)
        rc = self.sink.send(dest, out)
        self.sink.unlock(dest)
        return FINE if rc == 0 else self.blame(SEND_FAILED, -1, 0)

    cdef int handle_localize(self, header_t* h, const Key* keys) noexcept nogil:
        """Home: swap the directory's owner to the requester, and have the previous owner send the keys."""
        cdef worker_t* w = self.server
        cdef Rank requester = <Rank>h.origin, owner, dest
        cdef Py_ssize_t n = h.count, i, j, m = n, left, mine
        cdef int64_t at, following, go, go_last
        cdef int d, num_dests, rc
        cdef Key key
        cdef KeyState state
        cdef batch_t b
        if ensure_room(w, n) != 0:
            return self.blame(NO_MEMORY, -1, 0)
        for i in range(n):
            if i + SLOT_AHEAD < n:
                expect_slot(self.store, keys[i + SLOT_AHEAD])
                expect_owner(self.directory, keys[i + SLOT_AHEAD])
            if not is_home(self.store, keys[i]):
                return self.blame(BAD_HOME, keys[i], 0)
            if owner_of(self.directory, keys[i]) == requester:
                return self.blame(OWNER_ASKS, keys[i], 0)
            w.misses[i] = <uint32_t>i
        memset(&b, 0, sizeof(b))
        b.kind = OP_LOCALIZE
        b.origin = requester
        b.worker = h.worker
        b.ts = <Timestamp>h.ts
        b.w = w
        b.keys = keys
        while m > 0:
            mine = left = num_dests = 0
            for j in range(m):
                i = w.misses[j]
                key = keys[i]
                self.between()
                owner = owner_of(self.directory, key)
                if owner == requester:                      # the same key twice in one message
                    return self.blame(OWNER_ASKS, key, directory_epoch(self.directory, key))
                if owner == self.me:
                    # Only this thread changes an entry that names this node, so no lock is needed to rely on it.
                    state = state_of(self.store, key, slot_word(self.store, key))
                    if state == HERE:
                        w.misses[mine] = <uint32_t>i        # (mine <= j)
                        mine += 1
                        continue
                    if state == AWAY:
                        return self.blame(NOT_HERE, key, 0)
                    rc = self.note_next(key, requester, directory_epoch(self.directory, key) + 1)
                    if rc != FINE:
                        return rc
                    self.move_owner(key, requester, directory_epoch(self.directory, key) + 1)
                    continue
                num_dests = chain_to(w, owner, i, num_dests)
            if mine > 0:
                rc = self.send_transfer(requester, keys, NULL, w.misses, mine)
                if rc != FINE:
                    return rc
            rc = FINE
            for d in range(num_dests):
                dest = w.order[d]
                at = w.heads[dest]
                w.heads[dest] = -1
                go = go_last = -1
                self.sink.lock(dest)
                while True:
                    following = -1 if at == w.tails[dest] else <int64_t>w.chain[at]
                    key = keys[at]
                    self.between()
                    if owner_of(self.directory, key) == dest:
                        w.offsets[at] = <Epoch>(directory_epoch(self.directory, key) + 1)
                        self.move_owner(key, requester, <Epoch>w.offsets[at])
                        if go < 0:
                            go = at
                        else:
                            w.chain[go_last] = <uint32_t>at
                        go_last = at
                    else:                                   # a worker of this node localized it in the meantime
                        w.misses[left] = <uint32_t>at
                        left += 1
                    if following < 0:
                        break
                    at = following
                if go >= 0:
                    w.chain[go_last] = <uint32_t>go_last
                    rc = self.emit(&b, dest, HAND_OVER, go, True)
                self.sink.unlock(dest)
                if rc != 0:
                    return self.blame(SEND_FAILED, -1, 0)
            m = left
        return FINE

    cdef int note_next(self, Key key, Rank next_owner, Epoch epoch) noexcept nogil:
        """The key, which is on its way here, goes on to next_owner."""
        cdef uint64_t word = latch(self.store, key)
        cdef transfer_t* t
        cdef entry_t* e
        cdef int rc = FINE
        if state_of(self.store, key, word) != COMING:
            rc = self.blame(NOT_HERE, key, epoch)
        elif not self.faults & FAULT_NO_NEXT:
            t = <transfer_t*>transfer_of(word)
            if t.next_owner >= 0:
                rc = self.blame(SECOND_NEXT, key, epoch)
            else:
                t.next_owner = next_owner
                t.next_epoch = epoch
                if self.faults & FAULT_DROP_QUEUE:
                    while t.first != NULL:
                        e = t.first
                        t.first = e.next
                        entry_free(e)
                    t.last = NULL
        unlatch(self.store, key, word)
        return rc

    cdef int handle_hand_over(self, header_t* h, const Key* keys, const uint32_t* epochs, Rank src) noexcept nogil:
        """Previous owner: send the keys on, or note who gets those that are still coming."""
        cdef worker_t* w = self.server
        cdef Py_ssize_t n = h.count, i, mine = 0
        cdef KeyState state
        cdef int rc
        if <Rank>h.origin == self.me:
            return self.blame(BAD_ORIGIN, -1, 0)
        if ensure_room(w, n) != 0:
            return self.blame(NO_MEMORY, -1, 0)
        for i in range(n):
            if home_of(self.directory, keys[i]) != src or src == self.me:
                return self.blame(BAD_HOME, keys[i], epochs[i])
            state = state_of(self.store, keys[i], slot_word(self.store, keys[i]))
            if state == AWAY:
                return self.blame(NOT_HERE, keys[i], epochs[i])
            if state == HERE:
                w.misses[mine] = <uint32_t>i
                mine += 1
        for i in range(n):
            if state_of(self.store, keys[i], slot_word(self.store, keys[i])) == COMING:
                rc = self.note_next(keys[i], <Rank>h.origin, epochs[i])
                if rc != FINE:
                    return rc
        return self.send_transfer(<Rank>h.origin, keys, epochs, w.misses, mine) if mine > 0 else FINE

    cdef int send_transfer(self, Rank to, const Key* keys, const uint32_t* epochs, const uint32_t* chosen,
                           Py_ssize_t count) noexcept nogil:
        """Remove the chosen keys, which are here, and send them. epochs NULL: this is their home, which counts the epochs."""
        cdef store_t* s = self.store
        cdef out_t out
        cdef size_t bytes = 0
        cdef Py_ssize_t j
        cdef Key key
        cdef Epoch epoch
        cdef Key* out_keys
        cdef uint32_t* out_epochs
        cdef char* values
        cdef uint64_t word
        cdef int rc = FINE
        for j in range(count):
            bytes += stored_bytes(s, keys[chosen[j]])
        if self.sink.alloc(&out, frame_bytes(count, bytes)) != 0:
            return self.blame(NO_MEMORY, -1, 0)
        start_answer(&out, TRANSFER, <uint32_t>to, 0, 0, count, bytes)
        out_keys = <Key*>(out.data + HEADER_BYTES)
        out_epochs = <uint32_t*>(out_keys + count)
        values = <char*>out_epochs + aux_bytes(count)
        self.sink.lock(to)
        for j in range(count):
            if j + SLOT_AHEAD < count:
                expect_slot(s, keys[chosen[j + SLOT_AHEAD]])
            if j + ROW_AHEAD < count:
                expect_row(s, keys[chosen[j + ROW_AHEAD]])
            key = keys[chosen[j]]
            epoch = epochs[chosen[j]] if epochs != NULL else directory_epoch(self.directory, key) + 1
            word = latch(s, key)
            if state_of(s, key, word) != HERE:              # the same key twice in one message
                rc = self.blame(NOT_HERE, key, epoch)
            elif <Epoch>(epoch_of(s, key, word) + 1) != epoch:
                rc = self.blame(BAD_EPOCH, key, epoch)
            if rc != FINE:
                unlatch(s, key, word)
                break
            if epochs == NULL:
                self.move_owner(key, to, epoch)
            else:
                remember_owner(self.directory, key, to)
            word = remove_row(s, key, word, epoch, values)
            unlatch(s, key, word)
            out_keys[j] = key
            out_epochs[j] = epoch
            if unlikely(self.trace_ != NULL):
                trace_add(self.trace_, self.sink.now(), key, to, epoch, False)
            values += stored_bytes(s, key)
        self.counters_.relocated_out += count
        if rc == FINE and self.sink.send(to, &out) != 0:
            rc = self.blame(SEND_FAILED, -1, 0)
        self.sink.unlock(to)
        return rc

    cdef int handle_transfer(self, header_t* h, const Key* keys, const uint32_t* epochs, const char* vals) noexcept nogil:
        """Requester: apply what waited, keep the keys, or send on those that have a next owner."""
        cdef store_t* s = self.store
        cdef worker_t* w = self.server
        cdef Py_ssize_t n = h.count, i, moving = 0
        cdef uint64_t word
        cdef transfer_t* t
        cdef int rc
        if ensure_room(w, n) != 0:
            return self.blame(NO_MEMORY, -1, 0)
        for i in range(n):
            if i + SLOT_AHEAD < n:
                expect_slot(s, keys[i + SLOT_AHEAD])
            if i + ROW_AHEAD < n:
                t = <transfer_t*>transfer_of(slot_word(s, keys[i + ROW_AHEAD]))
                prefetch_write(t)
                prefetch_write(<const void*>(<size_t>t + sizeof(transfer_t) - 1))      # (a hostile frame's key has none)
            word = slot_word(s, keys[i])
            if state_of(s, keys[i], word) != COMING:
                return self.blame(NOT_COMING, keys[i], epochs[i])
            t = <transfer_t*>transfer_of(word)              # stays: only this thread ends a transfer
            if <int32_t>(epochs[i] - t.last_epoch) <= 0:
                return self.blame(BAD_EPOCH, keys[i], epochs[i])
            if t.next_owner >= 0:
                if t.next_epoch != <Epoch>(epochs[i] + 1):
                    return self.blame(BAD_EPOCH, keys[i], epochs[i])
            elif is_home(s, keys[i]) and not self.faults & ~FINE_STEPS and directory_epoch(self.directory, keys[i]) != epochs[i]:
                return self.blame(BAD_EPOCH, keys[i], epochs[i])
        self.now = self.sink.now()
        for i in range(n):
            self.between()
            word = slot_word(s, keys[i])
            if state_of(s, keys[i], word) != COMING:        # the same key twice in one message
                return self.blame(NOT_COMING, keys[i], epochs[i])
            if (<transfer_t*>transfer_of(word)).next_owner >= 0:
                w.misses[moving] = <uint32_t>i
                w.offsets[moving] = vals - <const char*>h
                moving += 1
            else:
                rc = self.arrive(keys[i], epochs[i], vals)
                if rc != FINE:
                    return rc
            vals += stored_bytes(s, keys[i])
            if unlikely(self.trace_ != NULL):
                trace_add(self.trace_, self.now, keys[i], <Rank>h.src, epochs[i], True)
        self.counters_.relocated_in += n
        rc = self.pass_on(h, keys, epochs, moving) if moving > 0 else FINE
        return rc if rc != FINE else self.flush_answers()

    cdef int arrive(self, Key key, Epoch epoch, const char* vals) noexcept nogil:
        """A key has come to stay."""
        cdef uint64_t word = latch(self.store, key)
        cdef transfer_t* t = <transfer_t*>transfer_of(word)
        cdef uint64_t now_here = insert_row(self.store, key, epoch, vals)
        cdef int rc
        if now_here == 0:
            unlatch(self.store, key, word)
            return self.blame(NO_MEMORY, key, epoch)
        rc = self.apply_queue(t, key, row_of(self.store, key, &now_here))
        unlatch(self.store, key, now_here)
        if self.watch_begin <= key < self.watch_end:
            add_i64(&self.arrivals, 1)          # after the key can be seen: who read the count before looking misses nothing
        transfer_free(t)
        return rc

    cdef int pass_on(self, header_t* h, const Key* keys, const uint32_t* epochs, Py_ssize_t moving) noexcept nogil:
        """Send on the arrived keys server.misses[0..moving), which have a next owner; their values lie at server.offsets in the message."""
        cdef store_t* s = self.store
        cdef worker_t* w = self.server
        cdef Py_ssize_t j, left, count
        cdef Rank to
        cdef size_t bytes
        cdef out_t out
        cdef Key* out_keys
        cdef uint32_t* out_epochs
        cdef char* values
        cdef Key key
        cdef uint64_t word
        cdef transfer_t* t
        cdef int rc = FINE
        while moving > 0:
            to = (<transfer_t*>transfer_of(slot_word(s, keys[w.misses[0]]))).next_owner
            count = 0
            bytes = 0
            for j in range(moving):
                key = keys[w.misses[j]]
                if (<transfer_t*>transfer_of(slot_word(s, key))).next_owner == to:
                    count += 1
                    bytes += stored_bytes(s, key)
            if self.sink.alloc(&out, frame_bytes(count, bytes)) != 0:
                return self.blame(NO_MEMORY, -1, 0)
            start_answer(&out, TRANSFER, <uint32_t>to, 0, 0, count, bytes)
            out_keys = <Key*>(out.data + HEADER_BYTES)
            out_epochs = <uint32_t*>(out_keys + count)
            values = <char*>out_epochs + aux_bytes(count)
            count = left = 0
            self.sink.lock(to)
            for j in range(moving):
                key = keys[w.misses[j]]
                word = latch(s, key)
                if state_of(s, key, word) != COMING:        # the same key twice in one message
                    unlatch(s, key, word)
                    rc = self.blame(NOT_COMING, key, epochs[w.misses[j]])
                    break
                t = <transfer_t*>transfer_of(word)
                if t.next_owner != to:
                    unlatch(s, key, word)
                    w.misses[left] = w.misses[j]
                    w.offsets[left] = w.offsets[j]
                    left += 1
                    continue
                memcpy(values, <const char*>h + w.offsets[j], stored_bytes(s, key))
                rc = self.apply_queue(t, key, values)
                remember_owner(self.directory, key, to)
                unlatch(s, key, gone_word(t.next_epoch))
                out_keys[count] = key
                out_epochs[count] = t.next_epoch
                if unlikely(self.trace_ != NULL):
                    trace_add(self.trace_, self.now, key, to, t.next_epoch, False)
                transfer_free(t)
                values += stored_bytes(s, key)
                count += 1
                if rc != FINE:
                    break
            self.counters_.relocated_out += count
            if rc == FINE and self.sink.send(to, &out) != 0:
                rc = self.blame(SEND_FAILED, -1, 0)
            self.sink.unlock(to)
            if rc != FINE:
                return rc
            moving = left
        return FINE

    cdef int apply_queue(self, transfer_t* t, Key key, char* row) noexcept nogil:
        """Under the latch: apply the queued operations to the arrived row in their order, and note the answers."""
        cdef entry_t* e
        cdef int rc
        while t.first != NULL:
            e = t.first
            if e.kind == OP_PUSH:
                add_values(self.store, key, row, entry_values(e))
            elif e.kind == OP_SET:
                memcpy(row, entry_values(e), e.value_bytes)
            rc = self.answer_entry(e, key, row)
            if rc != FINE:
                return rc
            t.first = e.next
            entry_free(e)
        t.last = NULL
        return FINE

    cdef int answer_entry(self, entry_t* e, Key key, const char* row) noexcept nogil:
        cdef answer_t* a
        cdef op_t* op
        cdef size_t size = visible_bytes(self.store, key)
        cdef int64_t took
        a = self.answer_of(e.origin, e.worker, e.ts, e.kind, size)
        if a == NULL:
            return self.blame(NO_MEMORY, key, 0)
        if e.origin == self.me:
            if e.kind == OP_LOCALIZE:
                if e.wanted:
                    took = self.now - e.wanted
                    if self.counters_.relocation_count == 0 or took < self.counters_.relocation_min:
                        self.counters_.relocation_min = took
                    self.counters_.relocation_max = max(self.counters_.relocation_max, took)
                    self.counters_.relocation_sum += took
                    self.counters_.relocation_count += 1
                    self.counters_.relocation_histogram[relocation_bucket(took)] += 1
            else:
                op = self.find_op(e.worker, e.ts)
                if op == NULL or op.kind != e.kind or not self.has_place(op, e.position, key) or load_i64(&op.remaining) <= a.count:
                    return self.blame(BAD_ANSWER, key, 0)
                if e.kind == OP_PULL:
                    memcpy(op.vals + (op.offsets[e.position] if self.store.visible != NULL else e.position * size), row, size)
                if e.routed and self.directory.cache != NULL and not is_home(self.store, key):
                    pin_drop(&self.workers[e.worker].pins, key)
        else:
            if a.count == a.room and grow_answer(a) != 0:
                return self.blame(NO_MEMORY, key, 0)
            a.keys[a.count] = key
            a.positions[a.count] = e.position
            if e.kind == OP_PULL:
                if append_value(a, row, size) != 0:
                    return self.blame(NO_MEMORY, key, 0)
            self.counters_.answered += 1
        a.count += 1
        return FINE

    cdef answer_t* answer_of(self, Rank origin, uint32_t worker, Timestamp ts, int kind, size_t size) noexcept nogil:
        """The answer to this operation that is being collected, with room in its frame for one more value of `size` bytes.

        It looks back a few only: several answers to one operation are legal.
        """
        cdef int i
        cdef answer_t* a
        cdef answer_t* more
        for i in range(self.answers_used - 1, max(self.answers_used - 17, -1), -1):
            a = self.answers + i
            if a.ts == ts and a.worker == worker and a.origin == origin and a.kind == kind:
                if frame_bytes(a.count + 1, a.value_bytes + size) <= FRAME_BYTES:
                    return a
        if self.answers_used == self.answers_room:
            more = <answer_t*>realloc(self.answers, (2 * self.answers_room + 16) * sizeof(answer_t))
            if more == NULL:
                return NULL
            memset(more + self.answers_room, 0, (self.answers_room + 16) * sizeof(answer_t))
            self.answers = more
            self.answers_room = 2 * self.answers_room + 16
        a = self.answers + self.answers_used
        self.answers_used += 1
        a.origin = origin
        a.worker = worker
        a.ts = ts
        a.kind = kind
        a.count = 0
        a.value_bytes = 0
        return a

    cdef int flush_answers(self) noexcept nogil:
        """Outside all latches: answer and wake."""
        cdef int i, rc = FINE
        cdef answer_t* a
        cdef out_t out
        cdef char* p
        for i in range(self.answers_used):
            a = self.answers + i
            if a.origin == self.me:
                self.complete(self.workers[a.worker], a.ts, a.count)
                continue
            if self.sink.alloc(&out, frame_bytes(a.count, a.value_bytes)) != 0:
                return self.blame(NO_MEMORY, -1, 0)
            start_answer(&out, VALUES if a.kind == OP_PULL else ACK, <uint32_t>a.origin, a.worker, <uint64_t>a.ts, a.count,
                         a.value_bytes)
            p = out.data + HEADER_BYTES
            memcpy(p, a.keys, a.count * sizeof(Key))
            p += a.count * sizeof(Key)
            memcpy(p, a.positions, a.count * sizeof(uint32_t))
            p += aux_bytes(a.count)
            if a.value_bytes:
                memcpy(p, a.values, a.value_bytes)
            rc = self.send_to(a.origin, &out)
            if rc != FINE:
                break
        self.answers_used = 0
        return rc

    cdef int handle_answer(self, header_t* h, const Key* keys, const uint32_t* aux, const char* vals, Rank src) noexcept nogil:
        """VALUES or ACK for an operation of one of this node's workers."""
        cdef store_t* s = self.store
        cdef Py_ssize_t n = h.count, i
        cdef op_t* op = self.find_op(h.worker, <Timestamp>h.ts)
        cdef worker_t* w
        cdef size_t size
        if n == 0 or <Rank>h.origin != self.me or op == NULL or (op.kind == OP_PULL) != (h.type == VALUES) or (
                op.kind == OP_LOCALIZE or load_i64(&op.remaining) < n):
            return self.blame(BAD_ANSWER, keys[0] if n else -1, 0)
        w = self.workers[h.worker]
        for i in range(n):
            if not self.has_place(op, aux[i], keys[i]):
                return self.blame(BAD_ANSWER, keys[i], 0)
        if h.type == VALUES:
            for i in range(n):
                size = visible_bytes(s, keys[i])
                memcpy(op.vals + (op.offsets[aux[i]] if s.visible != NULL else aux[i] * size), vals, size)
                vals += size
        if self.directory.cache != NULL:
            for i in range(n):
                remember_owner(self.directory, keys[i], src)
                if not is_home(s, keys[i]):
                    pin_drop(&w.pins, keys[i])
        self.complete(w, <Timestamp>h.ts, n)
        return FINE

    # --- for Python: statistics, audit -----------------------------------------------------------------------------------------------

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
        cdef protocol_counters_t* c = &self.counters_
        cdef int64_t seen = 0, p99 = 0
        cdef int i
        for i in range(512):
            seen += c.relocation_histogram[i]
            if seen * 100 >= c.relocation_count * 99:
                p99 = bucket_value(i)
                break
        return {
            "workers": [worker_counters(self.workers[i]) for i in range(self.max_workers) if self.workers[i] != NULL],
            "server": worker_counters(self.server),
            "answered": c.answered, "forwarded": c.forwarded, "long_ways": c.long_ways,
            "relocated_in": c.relocated_in, "relocated_out": c.relocated_out,
            "relocation_count": c.relocation_count, "relocation_min_ns": c.relocation_min,
            "relocation_mean_ns": c.relocation_sum // c.relocation_count if c.relocation_count else 0,
            "relocation_p99_ns": p99, "relocation_max_ns": c.relocation_max,
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


cdef void start_answer(out_t* out, int kind, uint32_t origin, uint32_t worker, uint64_t ts, size_t count,
                       size_t value_bytes) noexcept nogil:
    """The header of a message whose keys, positions or epochs, and values follow."""
    cdef header_t* h = <header_t*>out.data
    memset(h, 0, HEADER_BYTES)
    h.type = <uint8_t>kind
    h.origin = origin
    h.worker = worker
    h.ts = ts
    h.count = <uint32_t>count
    h.value_bytes = value_bytes
    if count & 1:
        (<uint32_t*>(out.data + HEADER_BYTES + count * sizeof(Key)))[count] = 0      # the padding


cdef int grow_answer(answer_t* a) noexcept nogil:
    cdef int64_t room = 2 * a.room if a.room else 16
    cdef void* p = realloc(a.keys, room * sizeof(Key))
    if p == NULL:
        return ERR_MEMORY
    a.keys = <Key*>p
    p = realloc(a.positions, room * sizeof(uint32_t))
    if p == NULL:
        return ERR_MEMORY
    a.positions = <uint32_t*>p
    a.room = room
    return 0


cdef int append_value(answer_t* a, const char* row, size_t size) noexcept nogil:
    cdef size_t room
    cdef void* p
    if a.value_bytes + size > a.value_room:
        room = max(2 * a.value_room, a.value_bytes + size)
        p = realloc(a.values, room)
        if p == NULL:
            return ERR_MEMORY
        a.values = <char*>p
        a.value_room = room
    if size:
        memcpy(a.values + a.value_bytes, row, size)
        a.value_bytes += size
    return 0


cdef Py_ssize_t keep_last(const Key* keys, uint32_t* todo, Py_ssize_t* m) noexcept nogil:
    """Of equal keys keep the last position only (its set overwrites the others'); returns how many were dropped, -1: no memory."""
    cdef Py_ssize_t room = 16, j, kept, at
    cdef Key* seen
    while room < 2 * m[0]:
        room *= 2
    seen = <Key*>malloc(room * sizeof(Key))
    if seen == NULL:
        return -1
    memset(seen, 0xff, room * sizeof(Key))
    kept = m[0]
    for j in range(m[0] - 1, -1, -1):
        at = <Py_ssize_t>((<uint64_t>keys[todo[j]] * <uint64_t>0x9E3779B97F4A7C15) >> 32) & (room - 1)
        while seen[at] != -1 and seen[at] != keys[todo[j]]:
            at = (at + 1) & (room - 1)
        if seen[at] == -1:
            seen[at] = keys[todo[j]]
            kept -= 1
            todo[kept] = todo[j]
    free(seen)
    for j in range(m[0] - kept):
        todo[j] = todo[kept + j]
    m[0] -= kept
    return kept


cdef dict worker_counters(worker_t* w):
    cdef int64_t* c = <int64_t*>&w.counters
    counts = {f"{name}_{where}": c[3 * i + j] for i, name in enumerate(("pulled", "pushed", "set", "localized"))
              for j, where in enumerate(("local", "queued", "remote"))}
    return counts | {"sampled": w.counters.sampled, "sample_fallbacks": w.counters.sample_fallbacks,
                     "sample_postponed": w.counters.sample_postponed, "pool_refills": w.counters.pool_refills,
                     "pool_waits": w.counters.pool_waits}
