# Design: the relocation protocol, and no I/O (the design of Lapse: Renz-Wieland et al., PVLDB 13(11), 2020, section 3; the order of
# asynchronous operations is stronger here, see docs/protocol.md). Messages leave through the sink while the lock is held that makes the step
# atomic.
#
# Threads: any number of workers call issue() (see _routing.pyx), one each; one server thread calls handle(). Locking: channel, then latch, nothing else. What
# makes the order:
#   * only the server thread removes a key from this node or inserts one, so what is HERE stays HERE for that thread, and only a
#     worker's or (shared_memory off) the server's localize makes an AWAY key COMING;
#   * a key homed elsewhere becomes COMING under the lock of the channel to its home, and operations on it take that lock,
#     re-check its state, and send: so none that was routed before can be overtaken by the LOCALIZE or overtake it;
#   * a key homed here changes its owner from O under the lock of the channel to O, and operations take that lock, re-check the entry, and send.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cimport cython
from lapse._answers cimport answer_add, answer_copy, answer_t, answer_to, write_header
from lapse._counters cimport LOCAL, note_relocation, tally
from lapse._directory cimport directory_epoch, expect_owner, home_of, owner_of, remember_owner
from lapse._operations cimport chain_to, end_way, ensure_room, first_repeated
from lapse._pins cimport pin_drop
from lapse._store cimport (AWAY, COMING, HERE, ROW_AHEAD, SLOT_AHEAD, KeyState, absent_rows, add_values, batch_bytes, epoch_of,
                           expect_header, expect_row, expect_slot, first_out_of_range, gone_word, insert_row, is_home, latch, pull_rows,
                           push_rows, remove_row, row_of, set_rows, slot_word, state_of, store_t, stored_bytes, transfer_of, unlatch,
                           visible_bytes)
from lapse._sync cimport load_i64, load_u64, prefetch_write, store_i64, store_u8, unlikely
from lapse._trace cimport trace_add
from lapse._transfers cimport entry_free, entry_values, transfer_free
from lapse._types cimport ERR_MEMORY, OP_LOCALIZE, OP_PULL, OP_PUSH, OP_SET
from lapse._wire cimport (ACK, FRAME_BYTES, HAND_OVER, HEADER_BYTES, LOCALIZE, PULL, PUSH, SET, TRANSFER, VALUES, aux_bytes, frame_bytes)

cdef enum:
    LONG_WAY = 8                # hops after which an operation is counted as astray
    MAX_HOPS = 64               # hops after which the job is aborted

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
    BAD_FIELD: "a header field that this kind of message does not have",
    TWICE: "a key that is twice in one relocation message",
}


@cython.final
cdef class Protocol(Router):
    """One node: what it does about a message. See NodeState for the arguments."""

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

    cdef bint unpin(self, worker_t* w, Key key) noexcept nogil:
        """One position that went its way has been answered. False: no pin says that one was under way, so the cache rule did not hold.

        Only a simulation is told: a message that names another key than was asked for would be refused when half of it is done.
        """
        if self.directory.cache == NULL or is_home(self.store, key) or pin_drop(&w.pins, key) == 0:
            return True
        return not self.faults & FINE_STEPS or self.faults & FAULT_NO_CACHE_RULE != 0

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
        if n == 0 or size < frame_bytes(n, 0) or h.value_bytes != size - frame_bytes(n, 0):
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
        if h.reserved != 0 or (h.hops != 0 and h.type > SET):
            return self.blame(BAD_FIELD, -1, 0)
        if LOCALIZE <= h.type <= TRANSFER and src != self.me:
            # A call's localize may name a key twice, a message to another node may not: the second would find what the first left.
            i = first_repeated(self.server, keys, n)
            if i >= 0 or i == ERR_MEMORY:
                return self.blame(TWICE, keys[i], aux[i]) if i >= 0 else self.blame(NO_MEMORY, -1, 0)

        if h.type <= SET or (h.type == LOCALIZE and src == self.me):
            return self.handle_operation(h, keys, aux, vals, src)
        if h.type == LOCALIZE:
            return self.handle_localize(h, keys)
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
        if <Rank>h.origin == self.me:
            rc = self.check_own(h, keys, aux)
            if rc != FINE:
                return rc
        if self.store.visible != NULL and carries:
            value_offsets(self.store, keys, n, w.offsets)
        m = absent_rows(self.store, keys, n, w.misses)
        if m > 0 and h.hops >= MAX_HOPS:
            return self.blame(TOO_MANY_HOPS, keys[w.misses[0]], 0)
        self.between()
        if h.type == LOCALIZE:
            self.settle_local_localize(h, n - m)
        elif m < n:
            rc = self.serve_here(h, keys, aux, vals, m)
            if rc != FINE:
                return rc
        if m == 0:
            return FINE
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

    cdef int check_own(self, header_t* h, const Key* keys, const uint32_t* aux) noexcept nogil:
        """An operation of this node that comes back to it: is it open, with a place for each value?"""
        cdef op_t* op = self.find_op(h.worker, <Timestamp>h.ts)
        cdef Py_ssize_t n = h.count, i
        if op == NULL or op.kind != h.type:
            return self.blame(BAD_ANSWER, keys[0], 0)
        for i in range(n):
            if not self.has_place(op, aux[i], keys[i]):
                return self.blame(BAD_ANSWER, keys[i], 0)
        if h.type != LOCALIZE:
            if not end_way(op, aux, n):
                return self.blame(BAD_ANSWER, keys[0], 0)
            for i in range(n):
                store_u8(op.under_way + aux[i], 1)      # until it is served or waits; it may go on
        return FINE

    cdef void settle_local_localize(self, header_t* h, Py_ssize_t here) noexcept nogil:
        """shared_memory off: this many keys of a localize of this node are here already."""
        if here > 0:
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
            op = self.find_op(h.worker, <Timestamp>h.ts)        # it is open: check_own
            asker = self.workers[h.worker]
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
            write_header(out.data, VALUES if kind == PULL else ACK, h.origin, h.worker, h.ts, n - m, bytes)
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
                self.sink.discard(&out)
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
                    if op == NULL:
                        self.sink.discard(&out)
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
                    store_u8(op.under_way + aux[i], 0)
                    if not self.unpin(asker, key):
                        return self.blame(BAD_ANSWER, key, 0)
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
                owner = owner_of(self.directory, key)       # (never the requester: its keys all differ)
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
            if t.next_owner >= 0 and not self.faults & FAULT_OVERWRITE_NEXT:
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
        cdef uint64_t word
        cdef KeyState state
        cdef int rc
        if <Rank>h.origin == self.me:
            return self.blame(BAD_ORIGIN, -1, 0)
        if ensure_room(w, n) != 0:
            return self.blame(NO_MEMORY, -1, 0)
        for i in range(n):
            if home_of(self.directory, keys[i]) != src or src == self.me:
                return self.blame(BAD_HOME, keys[i], epochs[i])
            if i + SLOT_AHEAD < n:
                expect_slot(self.store, keys[i + SLOT_AHEAD])
            if i + ROW_AHEAD < n:
                expect_header(self.store, keys[i + ROW_AHEAD])
            word = slot_word(self.store, keys[i])
            state = state_of(self.store, keys[i], word)
            if state == AWAY:
                return self.blame(NOT_HERE, keys[i], epochs[i])
            if state == COMING and (<transfer_t*>transfer_of(word)).next_owner >= 0 and not self.faults & FAULT_OVERWRITE_NEXT:
                return self.blame(SECOND_NEXT, keys[i], epochs[i])
            if state == HERE and <Epoch>(epoch_of(self.store, keys[i], word) + 1) != epochs[i]:
                return self.blame(BAD_EPOCH, keys[i], epochs[i])
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
        cdef char* early
        cdef uint64_t word
        cdef int rc = FINE
        for j in range(count):
            bytes += stored_bytes(s, keys[chosen[j]])
        if self.sink.alloc(&out, frame_bytes(count, bytes)) != 0:
            return self.blame(NO_MEMORY, -1, 0)
        write_header(out.data, TRANSFER, <uint32_t>to, 0, 0, count, bytes)
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
            early = self.copy_early(key) if unlikely(self.faults & FAULT_LOST_UPDATE) and j == 0 else NULL
            word = latch(s, key)
            if state_of(s, key, word) != HERE:              # this and the next: only if home contradicts itself
                rc = self.blame(NOT_HERE, key, epoch)
            elif <Epoch>(epoch_of(s, key, word) + 1) != epoch:
                rc = self.blame(BAD_EPOCH, key, epoch)
            if rc != FINE:
                unlatch(s, key, word)
                free(early)
                break
            if epochs == NULL:
                self.move_owner(key, to, epoch)
            else:
                remember_owner(self.directory, key, to)
            word = remove_row(s, key, word, epoch, values)
            unlatch(s, key, word)
            if unlikely(early != NULL):
                memcpy(values, early, stored_bytes(s, key))
                free(early)
            out_keys[j] = key
            out_epochs[j] = epoch
            if unlikely(self.trace_ != NULL):
                trace_add(self.trace_, self.sink.now(), key, to, epoch, False)
            values += stored_bytes(s, key)
        if rc != FINE:
            self.sink.discard(&out)
        elif self.sink.send(to, &out) != 0:
            rc = self.blame(SEND_FAILED, -1, 0)
        self.sink.unlock(to)
        self.counters_.relocated_out += count
        return rc

    cdef char* copy_early(self, Key key) noexcept nogil:
        """FAULT_LOST_UPDATE: a copy of the row as it is now, before others get a turn; NULL if the key is not here."""
        cdef uint64_t word = latch(self.store, key)
        cdef char* row = row_of(self.store, key, &word) if state_of(self.store, key, word) == HERE else NULL
        cdef char* copy = <char*>malloc(stored_bytes(self.store, key)) if row != NULL else NULL
        if copy != NULL:
            memcpy(copy, row, stored_bytes(self.store, key))
        unlatch(self.store, key, word)
        self.between()
        return copy

    cdef int handle_transfer(self, header_t* h, const Key* keys, const uint32_t* epochs, const char* vals) noexcept nogil:
        """Requester: apply what waited, keep the keys, or send on those that have a next owner."""
        cdef store_t* s = self.store
        cdef worker_t* w = self.server
        cdef Py_ssize_t n = h.count, i, moving = 0
        cdef uint64_t word
        cdef transfer_t* t
        cdef int rc
        if <Rank>h.origin != self.me:
            return self.blame(BAD_ORIGIN, -1, 0)
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
        if unlikely(self.faults & FAULT_EARLY_ROW):
            unlatch(self.store, key, now_here)
            self.between()
            now_here = latch(self.store, key)
        rc = self.apply_queue(t, key, row_of(self.store, key, &now_here))
        unlatch(self.store, key, now_here)
        if self.watch_begin <= key < self.watch_end:
            store_i64(self.arrived + (self.arrivals & self.arrived_mask), key)
            store_i64(&self.arrivals, self.arrivals + 1)        # after the key can be seen: see _here.pxd
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
            write_header(out.data, TRANSFER, <uint32_t>to, 0, 0, count, bytes)
            out_keys = <Key*>(out.data + HEADER_BYTES)
            out_epochs = <uint32_t*>(out_keys + count)
            values = <char*>out_epochs + aux_bytes(count)
            count = left = 0
            self.sink.lock(to)
            for j in range(moving):
                key = keys[w.misses[j]]
                word = latch(s, key)
                t = <transfer_t*>transfer_of(word)
                if t.next_owner != to:
                    unlatch(s, key, word)
                    w.misses[left] = w.misses[j]
                    w.offsets[left] = w.offsets[j]
                    left += 1
                    continue
                memcpy(values, <const char*>h + w.offsets[j], stored_bytes(s, key))
                rc = self.apply_queue(t, key, values)
                if unlikely(self.faults & FAULT_QUEUE_LOST):
                    memcpy(values, <const char*>h + w.offsets[j], stored_bytes(s, key))
                remember_owner(self.directory, key, to)
                unlatch(s, key, gone_word(t.next_epoch))
                out_keys[count] = key
                out_epochs[count] = epochs[w.misses[j]] if unlikely(self.faults & FAULT_OLD_EPOCH) else t.next_epoch
                if unlikely(self.trace_ != NULL):
                    trace_add(self.trace_, self.now, key, to, t.next_epoch, False)
                transfer_free(t)
                values += stored_bytes(s, key)
                count += 1
                if rc != FINE:
                    break
            self.counters_.relocated_out += count
            if rc != FINE:
                self.sink.discard(&out)
            elif self.sink.send(to, &out) != 0:
                rc = self.blame(SEND_FAILED, -1, 0)
            self.sink.unlock(to)
            if rc != FINE:
                return rc
            moving = left
        return FINE

    cdef int apply_queue(self, transfer_t* t, Key key, char* row) noexcept nogil:
        """Under the latch: apply the queued operations to the arrived row in their order, and note the answers."""
        cdef entry_t* e
        cdef op_t* op
        cdef int rc
        while t.first != NULL:
            e = t.first
            if unlikely(self.faults & FAULT_NO_COPY) and not e.routed and e.kind != OP_LOCALIZE and e.value_bytes:
                op = self.find_op(e.worker, e.ts)
                if op != NULL:
                    memcpy(entry_values(e), op.vals + (op.offsets[e.position] if self.store.visible != NULL
                                                       else e.position * e.value_bytes), e.value_bytes)
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
        a = answer_to(&self.answers, e.origin, e.worker, e.ts, e.kind, size)
        if a == NULL:
            return self.blame(NO_MEMORY, key, 0)
        if e.origin == self.me:
            if e.kind == OP_LOCALIZE:
                if e.wanted:
                    note_relocation(&self.counters_, self.now - e.wanted)
            else:
                op = self.find_op(e.worker, e.ts)
                if op == NULL or op.kind != e.kind:             # (it stays open as long as something of it is queued)
                    return self.blame(BAD_ANSWER, key, 0)
                if e.kind == OP_PULL:
                    memcpy(op.vals + (op.offsets[e.position] if self.store.visible != NULL else e.position * size), row, size)
                if e.routed and not self.unpin(self.workers[e.worker], key):
                    return self.blame(BAD_ANSWER, key, 0)
        else:
            if answer_add(a, key, e.position, row if e.kind == OP_PULL else NULL, size) != 0:
                return self.blame(NO_MEMORY, key, 0)
            self.counters_.answered += 1
        a.count += 1
        return FINE

    cdef int flush_answers(self) noexcept nogil:
        """Outside all latches: answer and wake."""
        cdef int i, rc = FINE
        cdef answer_t* a
        cdef out_t out
        for i in range(self.answers.used):
            a = self.answers.list + i
            if a.origin == self.me:
                self.complete(self.workers[a.worker], a.ts, a.count)
                continue
            if self.sink.alloc(&out, frame_bytes(a.count, a.value_bytes)) != 0:
                return self.blame(NO_MEMORY, -1, 0)
            write_header(out.data, VALUES if a.kind == OP_PULL else ACK, <uint32_t>a.origin, a.worker, <uint64_t>a.ts, a.count,
                         a.value_bytes)
            answer_copy(a, out.data + HEADER_BYTES)
            rc = self.send_to(a.origin, &out)
            if rc != FINE:
                break
        self.answers.used = 0
        return rc

    cdef int handle_answer(self, header_t* h, const Key* keys, const uint32_t* aux, const char* vals, Rank src) noexcept nogil:
        """VALUES or ACK for an operation of one of this node's workers."""
        cdef store_t* s = self.store
        cdef Py_ssize_t n = h.count, i
        cdef op_t* op = self.find_op(h.worker, <Timestamp>h.ts)
        cdef worker_t* w
        cdef size_t size
        if <Rank>h.origin != self.me or op == NULL or op.kind == OP_LOCALIZE or (op.kind == OP_PULL) != (h.type == VALUES):
            return self.blame(BAD_ANSWER, keys[0], 0)
        w = self.workers[h.worker]
        for i in range(n):
            if not self.has_place(op, aux[i], keys[i]):
                return self.blame(BAD_ANSWER, keys[i], 0)
        if not end_way(op, aux, n):
            return self.blame(BAD_ANSWER, keys[0], 0)
        if h.type == VALUES:
            for i in range(n):
                size = visible_bytes(s, keys[i])
                memcpy(op.vals + (op.offsets[aux[i]] if s.visible != NULL else aux[i] * size), vals, size)
                vals += size
        if self.directory.cache != NULL:
            for i in range(n):
                remember_owner(self.directory, keys[i], src)
                if not self.unpin(w, keys[i]):
                    return self.blame(BAD_ANSWER, keys[i], 0)
        self.complete(w, <Timestamp>h.ts, n)
        return FINE
