# Design: how an operation leaves the thread that has it. The first look at a key is free of locks; what it says is checked again under the
# lock of the channel that it names, and there the key becomes incoming, or its operation is sent. See _protocol.pyx for why that is right.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from lapse._answers cimport write_header
from lapse._counters cimport IN_TRANSFER, LOCAL, REMOTE, tally
from lapse._directory cimport cached_owner, directory_epoch, home_of, owner_of, set_owner
from lapse._operations cimport chain_to, ensure_offsets, ensure_under_way, op_t, seen_before, seen_clear
from lapse._pins cimport pin_add, pin_find, pin_t
from lapse._sink cimport out_t
from lapse._store cimport (AWAY, COMING, HERE, KeyState, add_values, away_epoch, incoming_word, is_home, latch, row_of, slot_word, state_of,
                           store_t, stored_bytes, transfer_of, unlatch, visible_bytes)
from lapse._sync cimport add_i64, load_i64, store_i32, store_i64, store_u8, unlikely
from lapse._transfers cimport entry_new, entry_t, entry_values, transfer_append, transfer_new, transfer_prepend, transfer_t
from lapse._types cimport ERR_FAILED, ERR_MEMORY, OP_LOCALIZE, OP_PULL, OP_PUSH, OP_SET
from lapse._wire cimport FRAME_BYTES, HAND_OVER, HEADER_BYTES, LOCALIZE, PUSH, SET, aux_bytes, frame_bytes, header_t

cdef enum:
    # what became of a position
    STILL_AWAY = 0
    SETTLED = 1                 # done on the spot
    QUEUED = 2                  # waits for the key
    GO = 3                      # goes into the message
    MAX_LOOKS = 1000            # at a key that has neither arrived nor an owner elsewhere, until home counts as contradicting itself
    LATE_MESSAGES = 3           # FAULT_LATE_DIRECTORY: how many messages late


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


cdef class Router(NodeState):
    """Issues the operations of this node's workers, and routes those that come from elsewhere."""

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
            b.done = keep_last(w, keys, todo, &m)
            if b.done < 0:
                return ERR_MEMORY
        if kind != OP_LOCALIZE and ensure_under_way(op, n) != 0:
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

    cdef int blame(self, int violation, Key key, Epoch epoch) noexcept nogil:
        self.bad_key = key
        self.bad_epoch = epoch
        return violation

    # --- routing -----------------------------------------------------------------------------------------------------------------------

    cdef Rank destination(self, batch_t* b, Key key) noexcept nogil:
        """Where a position goes if its key is not here: a first look, re-checked under the channel's lock."""
        cdef pin_t pin
        cdef Rank guess
        if b.to_server:
            return self.me
        if is_home(self.store, key):
            return owner_of(self.directory, key)
        if (b.caches or (unlikely(self.faults & FAULT_CACHE_FORWARD) and not b.own)) and b.kind != OP_LOCALIZE:
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
        cdef worker_t* asker
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
                if unlikely(self.faults & FAULT_REVERSE_QUEUE):
                    transfer_prepend(<transfer_t*>transfer_of(word), e)
                else:
                    transfer_append(<transfer_t*>transfer_of(word), e)
        unlatch(self.store, key, word)
        if result == SETTLED:
            b.done += 1
        if result > 0 and b.origin == self.me and not b.own and b.kind != OP_LOCALIZE:      # no message carries it any more
            asker = self.workers[b.worker]
            store_u8(asker.ops[b.ts & asker.mask].under_way + b.positions[i], 0)
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
        if home and owner_of(self.directory, key) != dest and not self.faults & FAULT_STALE_HOME:
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
                        if b.own and b.kind != OP_LOCALIZE:
                            store_u8(b.op.under_way + i, 1)
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
                write_header(out.data, kind, <uint32_t>b.origin, b.worker, <uint64_t>b.ts, count, size if carries else 0)
                (<header_t*>out.data).hops = <uint8_t>b.hops
                keys = <Key*>(out.data + HEADER_BYTES)
                aux = <uint32_t*>(keys + count)
                vals = <char*>aux + aux_bytes(count)
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
        if unlikely(self.faults & (FAULT_LATE_DIRECTORY | FAULT_OVERWRITE_NEXT)) and i < 64:
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


cdef Py_ssize_t keep_last(worker_t* w, const Key* keys, uint32_t* todo, Py_ssize_t* m) noexcept nogil:
    """Of equal keys keep the last position only (its set overwrites the others'); returns how many were dropped, -1: no memory."""
    cdef Py_ssize_t j, kept = m[0]
    if seen_clear(w, m[0]) != 0:
        return -1
    for j in range(m[0] - 1, -1, -1):
        if not seen_before(w, keys[todo[j]]):
            kept -= 1
            todo[kept] = todo[j]
    for j in range(m[0] - kept):
        todo[j] = todo[kept + j]
    m[0] -= kept
    return kept
