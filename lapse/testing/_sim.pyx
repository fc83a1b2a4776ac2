"""One schedule: some nodes with the real protocol in one thread, every interleaving decision drawn from a seed. Design: see _world.pyx."""
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from lapse._directory cimport directory_epoch, home_of, owner_of
from lapse._operations cimport ensure_room, op_finished, worker_t
from lapse._protocol cimport (FAULT_CACHE_FORWARD, FAULT_DROP_QUEUE, FAULT_EARLY_ROW, FAULT_LATE_DIRECTORY, FAULT_LOST_UPDATE,
                              FAULT_NO_CACHE_RULE, FAULT_NO_COPY, FAULT_NO_NEXT, FAULT_NO_QUEUE, FAULT_OLD_EPOCH, FAULT_OVERWRITE_NEXT,
                              FAULT_QUEUE_LOST, FAULT_REVERSE_QUEUE, FAULT_SPLIT_ROUTE, FAULT_STALE_HOME, FINE, FINE_STEPS, Protocol)
from lapse._sampling cimport PRELOC, Sampler, Sampling
from lapse._store cimport COMING, HERE, absent_rows, epoch_of, pull_rows, push_rows, set_rows, slot_word, state_of, store_t
from lapse._sync cimport fence, load_i64, load_u32, store_u32
from lapse._types cimport DONE, ERR_MEMORY, OP_LOCALIZE, OP_PULL, OP_PUSH, OP_SET, Key, Rank, Timestamp
from lapse._wire cimport HEADER_BYTES, TRANSFER, header_t
from lapse.testing._world cimport (BEGINS, DIGEST, DIRECTORY, ENDED, EPOCH, FAULT_DUPLICATE, FAULT_GARBLE, FAULT_LOSS, FAULT_NO_SEQUENCE,
                                   FAULT_REORDER, FINISHES, HANGS, IDLE, IN_TRANSFER, ISSUE, LIVELOCK, MAIN, MAX_ACTORS, MAX_CHANNELS,
                                   MAX_KEYS, MAX_POSITIONS, OPEN, PARKED, PLACED, READY, REFUSED, SEQUENCE, SHOWN, SUM, TAKES, SimSink,
                                   State, below, call_t, channel_t, count_transfer, draw, draw_actor, drop, event_t, fail, message_t, mixed,
                                   note_call, note_message, strikes, take, take_first, turn, world_t)

import numpy as np

from lapse.testing.actors import actors_of


cdef class Schedule:
    """Build N nodes, run every worker's program to its end in an order drawn from the seed, and keep what was seen.

    `run` returns the problem's number (0: none); the trace, the history and the figures can be read afterwards.
    """
    cdef:
        world_t world
        list nodes              # Protocol
        object actor_kind       # see actors.py
        list greens             # the actors
        list switch_to          # their switch methods, then that of whoever runs the schedule
        State states[MAX_ACTORS]            # when nobody could go on
        int holders[MAX_CHANNELS]
        worker_t* workers[MAX_ACTORS]       # by actor; borrowed from the nodes
        uint64_t worker_rng[MAX_ACTORS]
        call_t* calls           # owned; ops of them per worker
        int ops
        int issued_calls[MAX_ACTORS]        # step by step
        int keys                # num_keys - registers
        int components          # nodes * workers
        int positions           # of a call, at most
        int waits               # percent of the operations that are waited for at once
        int localizes           # percent of the operations that are localizes
        int drains              # percent of the operations after which a worker waits for all it has begun
        bint shared_memory
        list samplers           # Sampler, by worker; None: no operation samples
        int64_t handles[MAX_ACTORS]         # preloc: the sample that has been localized and not been used up, or -1
        int lengths[MAX_KEYS]   # visible, in numbers
        bint is_register[MAX_KEYS]
        int64_t issued[MAX_KEYS][MAX_ACTORS]
        # the history; see history.py
        int64_t[:, ::1] reads
        int64_t[:, ::1] seen
        int64_t[:, ::1] writes
        int64_t[:, ::1] accesses
        Py_ssize_t reads_used, writes_used, accesses_used
        readonly int64_t operations
        readonly int64_t relocations
        readonly int64_t sampled
        readonly int stuck

    def __cinit__(self):
        memset(&self.world, 0, sizeof(world_t))
        self.calls = NULL

    def __dealloc__(self):
        cdef int i
        if self.calls != NULL:
            for i in range(self.world.nodes * self.world.workers * self.ops):
                free(self.calls[i].vals)
            free(self.calls)
        for i in range(MAX_CHANNELS):
            while self.world.channel[i].first != NULL:
                self.drop_first(&self.world.channel[i])
        free(self.world.events)

    cdef void drop_first(self, channel_t* c) noexcept:
        cdef message_t* m = c.first
        c.first = m.next
        drop(m)

    # --- setting up ---------------------------------------------------------------------------------------------------------

    def __init__(self, uint64_t seed, *, int nodes, int workers, int keys, int registers, int ops, int waits, bint caches,
                 bint shared_memory, bint mixed_lengths, int faults, int network, int64_t max_steps, sampling="none", actors=None,
                 int positions=6, int extra=0):
        cdef world_t* s = &self.world
        cdef int a, k
        self.actor_kind = actors
        s.nodes = nodes
        s.workers = workers
        s.actors = nodes * (workers + 1)
        s.num_keys = keys + registers
        s.rng = mixed(seed + 1)
        s.current = MAIN
        s.max_steps = max_steps
        s.faults = network
        s.fault_rate = 1 + below(&s.rng, 40)
        self.keys = keys
        self.ops = ops
        self.waits = waits
        self.positions = positions
        self.shared_memory = shared_memory
        self.components = nodes * workers
        self.localizes = 10 + below(&s.rng, 40)
        self.drains = below(&s.rng, 15)
        for a in range(registers):          # anywhere among the keys: which key is whose home matters
            k = below(&s.rng, s.num_keys)
            while self.is_register[k]:
                k = (k + 1) % s.num_keys
            self.is_register[k] = True
        for k in range(s.num_keys):
            self.lengths[k] = self.components + 1 + extra + (k % 3 if mixed_lengths else 0)
        self.draw_weights()
        self.calls = <call_t*>calloc(self.components * ops, sizeof(call_t))
        if self.calls == NULL:
            raise MemoryError()
        self.build_nodes(caches, mixed_lengths, faults)
        self.samplers = None if sampling == "none" else self.build_samplers(sampling, seed)
        k = self.components * ops * positions
        self.reads = np.empty((k, 5), np.int64)
        self.seen = np.empty((k, self.components), np.int64)
        self.writes = np.empty((k, 5), np.int64)
        self.accesses = np.empty((k + s.num_keys, 8), np.int64)

    cdef void draw_weights(self) noexcept:
        """Who is fast and who is slow: equal, or far apart, so that some messages lie for long while much else happens."""
        cdef world_t* s = &self.world
        cdef int style = below(&s.rng, 4), a
        cdef int servers = 1 + below(&s.rng, 4)
        for a in range(s.actors):
            s.actor[a].node = a if a < s.nodes else (a - s.nodes) // s.workers
            s.actor[a].worker = -1 if a < s.nodes else (a - s.nodes) % s.workers
            s.actor[a].state = IDLE if a < s.nodes else READY
            s.actor[a].weight = servers if a < s.nodes else 1
            if style > 0:
                s.actor[a].weight <<= 2 * below(&s.rng, style + 1)
            self.worker_rng[a] = draw(&s.rng)
        for a in range(s.nodes * s.nodes):
            s.channel[a].holder = -1
            s.channel[a].weight = 1 if style == 0 else 1 << 2 * below(&s.rng, style + 1)

    cdef int build_nodes(self, bint caches, bint mixed_lengths, int faults) except -1:
        cdef world_t* s = &self.world
        cdef Protocol node
        cdef SimSink sink
        cdef int i, j
        cdef int fine = FINE_STEPS if below(&s.rng, 2) else 0
        cdef int credit = 2 << below(&s.rng, 4)     # few: places in the ring of operations are used again
        visible = stored = self.lengths[0]
        if mixed_lengths:
            visible = np.array([self.lengths[i] for i in range(s.num_keys)], np.uint32)
            stored = visible + np.arange(s.num_keys, dtype=np.uint32) % 2
        self.nodes = []
        for i in range(s.nodes):
            sink = SimSink.__new__(SimSink)
            sink.world = s
            sink.me = i
            node = Protocol(s.num_keys, i, s.nodes, dtype="int64", visible=visible, stored=stored, max_workers=s.workers,
                            location_caches=caches, shared_memory=self.shared_memory, credit_ops=credit)
            node.connect(sink)
            node.faults = faults | fine
            self.nodes.append(node)
            s.stores[i] = node.store
            for j in range(s.workers):
                self.workers[s.nodes + i * s.workers + j] = node.add_worker(j, credit)
                if self.workers[s.nodes + i * s.workers + j] == NULL:
                    raise MemoryError()
        return 0

    cdef list build_samplers(self, scheme, uint64_t seed):
        """What each worker draws with: the production code, in half of the schedules without replacement."""
        cdef list samplers = []
        cdef Protocol node
        cdef Sampler sampler
        cdef int i
        for node in self.nodes:
            sampling = Sampling(node, scheme, seed % 2 == 0, "uniform", 0, self.world.num_keys, seed=seed)
            for i in range(self.world.workers):
                sampler = Sampler(sampling, i)
                sampler.w = node.workers[i]
                samplers.append(sampler)
        for i in range(self.components):
            self.handles[i] = -1
        return samplers

    # --- running -------------------------------------------------------------------------------------------------------------

    def run(self):
        """Run to the end; the number of the problem that was found, 0 for none."""
        cdef world_t* s = &self.world
        cdef int a
        make, current = actors_of(self.actor_kind)
        self.greens = [make(self.serve if i < s.nodes else self.work) for i in range(s.actors)]
        self.switch_to = [green.switch for green in self.greens]
        self.switch_to.append(current().switch)
        s.switches = <void*>self.switch_to
        try:
            a = draw_actor(s)
            while a != MAIN and not s.aborted:      # comes back here when an actor has ended or nobody can go on
                s.current = a
                self.switch_to[a]()
                s.current = MAIN
                a = MAIN if s.aborted else draw_actor(s)
            for a in range(s.actors):
                self.states[a] = s.actor[a].state
                self.holders[s.actor[a].wanted] = s.channel[s.actor[a].wanted].holder
                if s.actor[a].state != ENDED and (s.actor[a].worker >= 0 or s.actor[a].state != IDLE):
                    s.current = a
                    fail(s, HANGS, self.waited_key(a))
            s.current = MAIN
            if not s.aborted:
                self.audit()
        finally:
            self.end_actors()
        return <int>s.problem

    cdef int end_actors(self) except -1:
        """Let every actor run to its end."""
        cdef world_t* s = &self.world
        cdef int a
        s.stopping = True
        for a in range(s.actors):
            if s.actor[a].state != ENDED:
                s.aborted = s.aborted or s.actor[a].state != IDLE
                s.current = a
                self.switch_to[a]()
                s.current = MAIN
                if not self.greens[a].dead:         # for ever in a loop of the core: leave it, its C frame cannot be unwound
                    self.stuck += 1
                    Py_INCREF(self.greens[a])
                    Py_INCREF(self)
                    Py_INCREF(self.switch_to)
        self.greens = None
        self.switch_to = None
        return 0

    cdef int64_t waited_key(self, int a) noexcept:
        """A key that a worker waits for, or -1."""
        cdef world_t* s = &self.world
        cdef int i
        cdef call_t* c
        if s.actor[a].worker >= 0:
            for i in range(self.ops):
                c = self.calls + (a - s.nodes) * self.ops + i
                if c.open:
                    return c.keys[0]
        return -1

    # --- a node's server ---------------------------------------------------------------------------------------------------

    def serve(self):
        cdef world_t* s = &self.world
        cdef int a = s.current, channel = 0
        cdef Rank me = s.actor[a].node
        cdef message_t* m
        while not s.aborted and not s.stopping:
            m = take(s, me, &channel)
            if m == NULL:
                s.actor[a].state = IDLE
                turn(s)
                continue
            s.actor[a].state = READY            # (the very first time it comes here without a turn)
            self.handle(channel, m)
            drop(m)
            turn(s)
        s.actor[a].state = ENDED

    cdef int handle(self, int channel, message_t* m) except -1:
        """A message has come out of a channel: what a node does about it."""
        cdef world_t* s = &self.world
        cdef header_t* h = <header_t*>m.data
        cdef Protocol node = self.nodes[channel % s.nodes]
        cdef int code
        note_message(s, TAKES, channel, m)
        count_transfer(s.flying, m, -1)
        s.channel[channel].received += 1
        if h.seq != s.channel[channel].received and not s.faults & FAULT_NO_SEQUENCE:
            fail(s, SEQUENCE, (<Key*>(m.data + HEADER_BYTES))[0], <int64_t>h.seq, <int64_t>s.channel[channel].received)
            return 0
        count_transfer(s.handled, m, 1)
        self.relocations += h.count if h.type == TRANSFER else 0
        if s.faults & FAULT_GARBLE and strikes(s, FAULT_GARBLE):
            code = self.handle_garbled(node, m, channel // s.nodes)
        else:
            code = node.handle(m.data, m.size, channel // s.nodes)
        count_transfer(s.handled, m, -1)
        if code != FINE:
            fail(s, REFUSED, node.bad_key, code, node.bad_epoch)
        return 0

    cdef int handle_garbled(self, Protocol node, message_t* m, Rank src) except -1:
        """What a node says of a message with a wrong byte: in the header, among keys and positions, or anywhere; half of them are small."""
        cdef uint64_t* rng = &self.world.rng
        cdef int where = below(rng, 4), code
        cdef size_t size = min(m.size, <size_t>(HEADER_BYTES if where < 2 else HEADER_BYTES + 12 * (<header_t*>m.data).count
                                                if where < 3 else m.size))
        cdef char* copy = <char*>malloc(m.size)
        if copy == NULL:
            raise MemoryError()
        memcpy(copy, m.data, m.size)
        if below(rng, 8):
            copy[below(rng, <int>size)] = <char>below(rng, 9 if below(rng, 2) else 256)
            size = m.size
        else:
            size = below(rng, <int>m.size)      # its end is missing
        code = node.handle(copy, size, src)
        free(copy)
        return code

    # --- step by step -----------------------------------------------------------------------------------------------------

    def begin_steps(self):
        """From now on whoever calls decides what happens next, instead of run(); each call below is one step that nothing interrupts."""
        self.world.stepwise = True

    def issue(self, int node, int worker, int kind, keys):
        """A worker issues an operation (OpKind); False if it may not have any more under way."""
        cdef world_t* s = &self.world
        cdef int a = s.nodes + node * s.workers + worker, i
        cdef worker_t* w = self.workers[a]
        cdef call_t* c
        if self.issued_calls[a] == self.ops or (w.next_ts > w.mask and not op_finished(w, w.next_ts - w.mask - 1)):
            return False
        c = self.calls + (a - s.nodes) * self.ops + self.issued_calls[a]
        c.kind = kind
        c.n = len(keys)
        c.order = self.issued_calls[a]
        for i in range(c.n):
            c.keys[i] = keys[i]
            c.offsets[i] = c.numbers
            c.numbers += self.lengths[c.keys[i]]
        self.issued_calls[a] += 1
        s.current = a
        self.begin(a, c)
        s.current = MAIN
        return True

    def deliver(self, int src, int dst):
        """Node dst handles the oldest message from node src; False if there is none."""
        cdef world_t* s = &self.world
        cdef int channel = src * s.nodes + dst
        cdef message_t* m
        if s.channel[channel].first == NULL or s.aborted:
            return False
        m = take_first(&s.channel[channel])
        s.current = dst
        self.handle(channel, m)
        turn(s)
        s.current = MAIN
        drop(m)
        return True

    def collect(self, int node, int worker):
        """A worker looks at what it has under way; how many of its operations have not finished yet."""
        cdef world_t* s = &self.world
        cdef int a = s.nodes + node * s.workers + worker, i, left = 0
        cdef call_t* c
        s.current = a
        for i in range(self.issued_calls[a]):
            c = self.calls + (a - s.nodes) * self.ops + i
            if c.open and (c.ts < 0 or op_finished(self.workers[a], c.ts)):
                self.finish(a, c)
            left += c.open
        turn(s)
        s.current = MAIN
        return left

    def waiting_channels(self):
        """(source, destination) of each channel that has a message."""
        cdef world_t* s = &self.world
        return [divmod(i, s.nodes) for i in range(s.nodes * s.nodes) if s.channel[i].first != NULL]

    def end_steps(self):
        """Deliver everything, let all workers finish, and compare what is left: the problem's number, 0 for none."""
        cdef world_t* s = &self.world
        cdef int i, left
        while not s.aborted and s.steps < s.max_steps:
            channels = self.waiting_channels()
            if not channels:
                break
            for src, dst in channels:
                self.deliver(src, dst)
        for i in range(s.nodes, s.actors):
            left = self.collect(s.actor[i].node, s.actor[i].worker)
            s.current = i
            if left:
                fail(s, HANGS if s.steps < s.max_steps else LIVELOCK, self.waited_key(i), s.steps)
            s.current = MAIN
        if not s.aborted:
            self.audit()
        return <int>s.problem

    def registers(self):
        """The keys that are set, not added to."""
        return [key for key in range(self.world.num_keys) if self.is_register[key]]

    # --- a worker's program --------------------------------------------------------------------------------------------------

    def work(self):
        cdef world_t* s = &self.world
        cdef int a = s.current, i, j
        cdef uint64_t* rng = &self.worker_rng[a]
        cdef call_t* calls = self.calls + (a - s.nodes) * self.ops
        for i in range(self.ops):
            if s.aborted:
                break
            self.draw_call(a, calls + i, i)
            self.begin(a, calls + i)
            if below(rng, 100) < self.waits:
                self.finish(a, calls + i)
            elif below(rng, 100) < self.drains:
                j = below(rng, 2)
                if j:                               # all, or one that is not the last
                    for j in range(i + 1):
                        self.finish(a, calls + j)
                else:
                    self.finish(a, calls + below(rng, i + 1))
        for i in range(self.ops):
            self.finish(a, calls + i)
        s.actor[a].state = ENDED

    cdef int draw_call(self, int a, call_t* c, int order) except -1:
        """What the worker does next."""
        cdef world_t* s = &self.world
        cdef uint64_t* rng = &self.worker_rng[a]
        cdef int i = below(rng, 100), k
        if i < self.localizes:
            c.kind = OP_LOCALIZE
        else:
            c.kind = OP_PULL if below(rng, 2) else OP_PUSH
        if c.kind == OP_PUSH and s.num_keys > self.keys and below(rng, s.num_keys) >= self.keys:
            c.kind = OP_SET
        i = below(rng, 8)
        c.n = 1 if i < 4 else 2 if i < 6 else 2 + below(rng, max(self.positions - 1, 1))
        c.n = min(c.n, self.positions)
        c.order = order
        if self.samplers is not None and below(rng, 2) and self.sample(a - s.nodes, c):
            return 0
        for i in range(c.n):
            k = below(rng, s.num_keys)
            if c.kind == OP_PUSH or c.kind == OP_SET:
                while self.is_register[k] != (c.kind == OP_SET):
                    k = (k + 1) % s.num_keys
            c.keys[i] = k
            c.offsets[i] = c.numbers
            c.numbers += self.lengths[k]

    cdef bint sample(self, int worker, call_t* c) except -1:
        """Let the keys of a pull, or of preloc's localize, be drawn. For the history they are a call's keys like others."""
        cdef Sampler sampler = <Sampler>self.samplers[worker]
        cdef int scheme = sampler.sampling.scheme, i
        cdef Py_ssize_t done = 0
        cdef const Key* keys
        if scheme == PRELOC and c.kind == OP_LOCALIZE:
            sampler.finish(max(self.handles[worker], <int64_t>0))       # or nothing
            c.n = min(c.n, self.world.num_keys)
            self.handles[worker] = sampler.prepare(c.n)
            keys = sampler.prepared(self.handles[worker])
            for i in range(c.n):
                c.keys[i] = keys[i]
        elif c.kind == OP_PULL and (scheme != PRELOC or sampler.left_of(self.handles[worker]) > 0):
            if scheme != PRELOC:
                c.n = min(c.n, self.world.num_keys)
                self.handles[worker] = sampler.prepare(c.n)
            c.n = min(c.n, <int>sampler.left_of(self.handles[worker]))
            if sampler.draw(self.handles[worker], c.keys, c.n, &done) != 0 or done != c.n:
                raise RuntimeError(f"a sample of {c.n} keys was refused")
        else:
            return False
        for i in range(c.n):
            c.offsets[i] = c.numbers
            c.numbers += self.lengths[c.keys[i]]
        self.sampled += c.n if c.kind == OP_PULL else 0
        return True

    cdef int fill(self, int a, call_t* c) except -1:
        """The values: ours + 1, and behind the components their sum; registers get a number that nobody else writes."""
        cdef int i, me = a - self.world.nodes
        cdef int j
        cdef int64_t* row
        c.vals = <int64_t*>malloc((c.numbers + 1) * sizeof(int64_t))
        if c.vals == NULL:
            raise MemoryError()
        for i in range(c.n):
            row = c.vals + c.offsets[i]
            for j in range(self.lengths[c.keys[i]]):
                if c.kind == OP_PULL:
                    row[j] = -1
                elif c.kind == OP_SET:
                    row[j] = (c.order * MAX_POSITIONS + i) * self.components + me + 1
                else:
                    row[j] = j == me or j >= self.components
        return 0

    cdef int begin(self, int a, call_t* c) except -1:
        """Issue an operation the way a production worker does: what is here at once, the rest through the protocol."""
        cdef world_t* s = &self.world
        cdef worker_t* w = self.workers[a]
        cdef Protocol node = self.nodes[s.actor[a].node]
        cdef Py_ssize_t m
        cdef int code
        cdef size_t bytes = c.numbers * sizeof(int64_t)
        turn(s)
        if s.aborted:
            return 0
        self.fill(a, c)
        if ensure_room(w, c.n) != 0:
            raise MemoryError()
        self.operations += 1
        c.begin = s.steps
        c.open = True
        c.ts = DONE
        note_call(s, BEGINS, c)
        self.note_writes(a, c)
        m = self.do_local(a, w, c, w.misses)
        if m < 0:
            fail(s, ISSUE, c.keys[0], ERR_MEMORY)
        if m > 0 and w.next_ts > w.mask:
            self.sleep(a, w, w.next_ts - w.mask - 1)        # credit: the place in the ring must be free
        if m > 0 and not s.aborted:
            turn(s)
            code = node.issue(w, c.kind, c.keys, c.n, c.vals, w.misses, m, bytes, &c.ts)
            if code != 0:
                fail(s, ISSUE, c.keys[0], code)
        if c.kind != OP_PULL:               # push and set copy before they return
            memset(c.vals, 0x7b, bytes)
        return 0

    cdef Py_ssize_t do_local(self, int a, worker_t* w, call_t* c, uint32_t* todo) noexcept:
        """The local fast path; how much is left, in todo, or -1. Half of the time other actors get a turn between two keys."""
        cdef world_t* s = &self.world
        cdef store_t* store = s.stores[s.actor[a].node]
        cdef Py_ssize_t m = 0, i
        cdef uint32_t miss
        cdef Py_ssize_t rc
        if not self.shared_memory or (c.kind != OP_LOCALIZE and load_i64(&w.pins.cached) > 0):
            for i in range(c.n):
                todo[i] = <uint32_t>i
            return c.n
        if below(&self.worker_rng[a], 2):
            return rows(store, c.kind, c.keys, c.n, c.vals, todo)
        for i in range(c.n):
            if c.kind == OP_SET and m > 0:          # none may overtake one that has still to be sent
                miss = 1
            else:
                rc = rows(store, c.kind, c.keys + i, 1, c.vals + c.offsets[i], &miss)
                if rc < 0:
                    return rc
                miss = <uint32_t>rc
            if miss:
                todo[m] = <uint32_t>i
                m += 1
            turn(s)
        return m

    cdef int finish(self, int a, call_t* c) except -1:
        """Wait for an operation, and write down what it saw."""
        cdef world_t* s = &self.world
        cdef worker_t* w = self.workers[a]
        if not c.open:
            return 0
        if c.ts >= 0:
            self.sleep(a, w, c.ts)
        if s.aborted:
            return 0
        c.open = False
        note_call(s, FINISHES, c)
        self.note_end(a, c)
        if c.kind == OP_PULL:
            self.note_reads(a, c)
        free(c.vals)
        c.vals = NULL
        return 0

    cdef void sleep(self, int a, worker_t* w, Timestamp ts) noexcept:
        """Wait as a production worker does: only a wake that comes after `sleeping` was set is sure to come."""
        cdef world_t* s = &self.world
        cdef uint32_t seen
        while not op_finished(w, ts) and not s.aborted:
            seen = load_u32(&w.event)
            store_u32(&w.sleeping, 1)
            fence()
            turn(s)
            if op_finished(w, ts):
                break
            turn(s)
            if load_u32(&w.event) == seen:
                s.actor[a].state = PARKED
                turn(s)
        store_u32(&w.sleeping, 0)

    # --- the history ------------------------------------------------------------------------------------------------------

    cdef void note_writes(self, int a, call_t* c) noexcept:
        """Rows for a push or a set that begins; their ends are filled in by note_end."""
        cdef int i, me = a - self.world.nodes
        cdef int64_t* row
        for i in range(c.n):
            if c.kind == OP_PUSH:
                self.issued[c.keys[i]][me] += 1
                row = &self.writes[self.writes_used, 0]
                self.writes_used += 1
                row[0] = me
                row[1] = c.order
                row[2] = c.keys[i]
                row[3] = c.begin
                row[4] = -1
            elif c.kind == OP_SET:
                self.note_access(me, c, i, True, c.vals[c.offsets[i]], -1)

    cdef void note_end(self, int a, call_t* c) noexcept:
        cdef Py_ssize_t i
        cdef int me = a - self.world.nodes
        if c.kind == OP_PUSH:
            for i in range(self.writes_used):
                if self.writes[i, 0] == me and self.writes[i, 1] == c.order:
                    self.writes[i, 4] = self.world.steps
        elif c.kind == OP_SET:
            for i in range(self.accesses_used):
                if self.accesses[i, 0] == me and self.accesses[i, 1] == c.order:
                    self.accesses[i, 7] = self.world.steps

    cdef void note_access(self, int me, call_t* c, int i, bint is_set, int64_t value, int64_t end) noexcept:
        cdef int64_t* row = &self.accesses[self.accesses_used, 0]
        self.accesses_used += 1
        row[0] = me
        row[1] = c.order
        row[2] = i
        row[3] = c.keys[i]
        row[4] = is_set
        row[5] = value
        row[6] = c.begin
        row[7] = end

    cdef void note_reads(self, int a, call_t* c) noexcept:
        cdef int i, me = a - self.world.nodes
        cdef int64_t* row
        cdef int64_t* value
        for i in range(c.n):
            value = c.vals + c.offsets[i]
            if not self.is_whole(c.keys[i], value):
                fail(&self.world, PLACED, c.keys[i], me, c.order)
                return
            if self.is_register[c.keys[i]]:
                self.note_access(me, c, i, False, value[0], self.world.steps)
                continue
            row = &self.reads[self.reads_used, 0]
            row[0] = me
            row[1] = c.order
            row[2] = c.keys[i]
            row[3] = c.begin
            row[4] = self.world.steps
            memcpy(&self.seen[self.reads_used, 0], value, self.components * sizeof(int64_t))
            self.reads_used += 1

    cdef bint is_whole(self, Key key, const int64_t* value) noexcept:
        """Is the value one that this key can have, in one piece?"""
        cdef int64_t wanted = 0
        cdef int j
        if self.is_register[key]:
            wanted = value[0]
            for j in range(self.lengths[key]):
                if value[j] != wanted:
                    return False
            return True
        for j in range(self.components):
            wanted += value[j]
        for j in range(self.components, self.lengths[key]):
            if value[j] != wanted:
                return False
        return True

    # --- at rest ------------------------------------------------------------------------------------------------------------

    cdef int audit(self) except -1:
        """Nothing is under way any more: does everything agree?"""
        cdef world_t* s = &self.world
        cdef int key, i
        cdef Rank home, holder
        cdef uint64_t word
        cdef Protocol node
        cdef worker_t* w
        for key in range(s.num_keys):
            holder = -1
            for i in range(s.nodes):
                word = slot_word(s.stores[i], key)
                if state_of(s.stores[i], key, word) == COMING:
                    fail(s, IN_TRANSFER, key, i)
                elif state_of(s.stores[i], key, word) == HERE:
                    holder = i
            if s.aborted or holder < 0:             # the other case has failed already
                return 0
            node = self.nodes[0]
            home = home_of(node.directory, key)
            node = self.nodes[home]
            if owner_of(node.directory, key) != holder:
                fail(s, DIRECTORY, key, owner_of(node.directory, key), holder)
            elif directory_epoch(node.directory, key) != epoch_of(s.stores[holder], key, slot_word(s.stores[holder], key)):
                fail(s, EPOCH, key, directory_epoch(node.directory, key),
                     epoch_of(s.stores[holder], key, slot_word(s.stores[holder], key)))
            else:
                self.audit_value(key, holder)
        for i in range(s.nodes, s.actors):
            w = self.workers[i]
            if load_i64(&w.open_ops) != 0 or load_i64(&w.open_bytes) != 0 or load_i64(&w.pins.cached) != 0 or w.pins.used != 0:
                s.current = i
                fail(s, OPEN, -1, load_i64(&w.open_ops), w.pins.used)
                s.current = MAIN
        self.audit_digests()
        return 0

    cdef int audit_digests(self) except -1:
        """What a cluster compares at its end: each home's digests of what a node owns, and that node's of the same."""
        cdef world_t* s = &self.world
        cdef int home, node
        audits = [each.audit() for each in self.nodes]
        for home in range(s.nodes):
            for node in range(s.nodes):
                if audits[home]["directory"][node] != audits[node]["rows"][home]:
                    fail(s, DIGEST, -1, home, node)
        return 0

    cdef int audit_value(self, Key key, Rank holder) except -1:
        """The final value is the sum of all pushes; a register's counts as read by a worker that came after everybody."""
        cdef world_t* s = &self.world
        cdef int64_t* value = <int64_t*>malloc(self.lengths[key] * sizeof(int64_t))
        cdef uint32_t miss = 0
        cdef call_t last
        cdef int j
        if value == NULL:
            raise MemoryError()
        if pull_rows(s.stores[holder], &key, 1, value, &miss) != 0 or not self.is_whole(key, value):
            fail(s, PLACED, key, -1, holder)
        elif self.is_register[key]:
            last.order = 0
            last.begin = s.steps + 1
            last.keys[0] = key
            self.note_access(self.components, &last, 0, False, value[0], s.steps + 1)
        else:
            for j in range(self.components):
                if value[j] != self.issued[key][j]:
                    fail(s, SUM, key, self.issued[key][j], value[j])
        free(value)
        return 0

    # --- what the Python side reads ------------------------------------------------------------------------------------------

    def history(self):
        """Arrays for history.py: reads, what they saw, writes, accesses of registers."""
        return (np.asarray(self.reads)[:self.reads_used], np.asarray(self.seen)[:self.reads_used],
                np.asarray(self.writes)[:self.writes_used], np.asarray(self.accesses)[:self.accesses_used])

    def problem(self):
        """What was wrong: the problem's number, the actor, the key (or -1) and two numbers that depend on the problem."""
        cdef world_t* s = &self.world
        return <int>s.problem, s.problem_actor, s.problem_key, s.problem_a, s.problem_b

    def waiting(self):
        """What each actor waited for when nobody could go on: (actor, State, channel it wants, who has that channel's lock)."""
        cdef world_t* s = &self.world
        cdef int a
        return [(a, <int>self.states[a], s.actor[a].wanted, self.holders[s.actor[a].wanted]) for a in range(s.actors)]

    def figures(self):
        """Turns, switches, messages, and the hash of the trace."""
        return self.world.steps, self.world.changes, self.world.messages, self.world.hash

    def events(self, Py_ssize_t first=0):
        """The trace from the given event on, as tuples."""
        cdef event_t* e
        cdef Py_ssize_t i
        cdef int j
        for i in range(first, self.world.events_used):
            e = self.world.events + i
            shown = min(e.n, SHOWN)
            yield (e.step, e.actor, e.what, e.kind, e.order, e.ts, e.src, e.dst, e.origin, e.worker, e.hops, e.n,
                   tuple([e.keys[j] for j in range(shown)]), tuple([e.aux[j] for j in range(shown)]))


cdef Py_ssize_t rows(store_t* store, int kind, const Key* keys, Py_ssize_t n, int64_t* vals, uint32_t* misses) noexcept nogil:
    if kind == OP_PULL:
        return pull_rows(store, keys, n, vals, misses)
    if kind == OP_PUSH:
        return push_rows(store, keys, n, vals, misses)
    if kind == OP_SET:
        return set_rows(store, keys, n, vals, misses)
    return absent_rows(store, keys, n, misses)


FAULTS = {
    "split_route": FAULT_SPLIT_ROUTE, "no_cache_rule": FAULT_NO_CACHE_RULE, "late_directory": FAULT_LATE_DIRECTORY,
    "no_queue": FAULT_NO_QUEUE, "drop_queue": FAULT_DROP_QUEUE, "no_next": FAULT_NO_NEXT,
    "lost_update": FAULT_LOST_UPDATE, "cache_forward": FAULT_CACHE_FORWARD, "no_copy": FAULT_NO_COPY, "early_row": FAULT_EARLY_ROW,
    "old_epoch": FAULT_OLD_EPOCH, "reverse_queue": FAULT_REVERSE_QUEUE, "stale_home": FAULT_STALE_HOME, "queue_lost": FAULT_QUEUE_LOST,
    "overwrite_next": FAULT_OVERWRITE_NEXT,
    "loss": FAULT_LOSS, "duplicate": FAULT_DUPLICATE, "reorder": FAULT_REORDER, "garble": FAULT_GARBLE, "no_sequence": FAULT_NO_SEQUENCE,
}
