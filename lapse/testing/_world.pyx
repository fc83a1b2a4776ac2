# Design: each worker and each node's server loop is a greenlet, called an actor here. An actor gives its turn away (`turn`) before it takes
# a channel's lock, after it gave one back, before a message is allocated and after one was sent, where the clock is read (in half of the
# schedules the protocol does that more often, for this purpose: FINE_STEPS), and between the steps of a worker's program. Whoever gives
# the turn away draws the next actor among those that can go on, and switches to it directly. Messages lie in one queue per pair of nodes.
# After every turn each key must have one owner or one TRANSFER.
#
# The core is called with the GIL held and never knows: its functions are nogil C calls, and only `change` needs Python. Greenlets
# share one C stack, parts of which are copied away while another one runs: what one actor writes for another to read lies
# on the heap. A key's latch is a real one, never held across a turn (checked).
#
# A schedule that has failed is `aborted`: from then on no hook gives a turn away or keeps a lock, so that each suspended actor
# runs to its end when it is resumed once more, and nothing has to be thrown into a C frame.
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

from lapse._operations cimport worker_t
from lapse._protocol cimport out_t
from lapse._store cimport HERE, LATCH, slot_word, state_of
from lapse._sync cimport add_u32, load_u32, peek_u64
from lapse._types cimport ERR_MEMORY, Key, Rank, Timestamp
from lapse._wire cimport HEADER_BYTES, MAGIC, TRANSFER, VERSION, header_t


# --- the trace ------------------------------------------------------------------------------------------------------------

cdef inline void mix_in(world_t* s, int64_t x) noexcept nogil:
    s.hash = mixed(s.hash ^ <uint64_t>x) + <uint64_t>0x9e3779b97f4a7c15


cdef event_t* new_event(world_t* s, What what, int kind, const Key* keys, Py_ssize_t n) noexcept nogil:
    """An event with step, actor, kind and keys; NULL when out of memory (the hash knows it all the same)."""
    cdef event_t* more
    cdef event_t* e
    cdef Py_ssize_t i
    mix_in(s, s.steps << 16 | what << 8 | kind)
    mix_in(s, s.current)
    for i in range(n):
        mix_in(s, keys[i])
    if s.events_used == s.events_room:
        more = <event_t*>realloc(s.events, (s.events_room * 2 + 512) * sizeof(event_t))
        if more == NULL:
            return NULL
        s.events = more
        s.events_room = s.events_room * 2 + 512
    e = s.events + s.events_used
    s.events_used += 1
    memset(e, 0, sizeof(event_t))
    e.step = s.steps
    e.actor = <int16_t>s.current
    e.what = what
    e.kind = <uint8_t>kind
    e.n = <int32_t>n
    for i in range(min(n, <Py_ssize_t>SHOWN)):
        e.keys[i] = <int32_t>keys[i]
    return e


cdef void note_call(world_t* s, What what, call_t* c) noexcept nogil:
    cdef event_t* e = new_event(s, what, c.kind, c.keys, c.n)
    if e != NULL:
        e.order = c.order
        e.ts = c.ts


cdef void note_message(world_t* s, What what, int channel, message_t* m) noexcept nogil:
    cdef header_t* h = <header_t*>m.data
    cdef uint32_t* aux = <uint32_t*>(m.data + HEADER_BYTES + 8 * <size_t>h.count)
    cdef event_t* e = new_event(s, what, h.type, <Key*>(m.data + HEADER_BYTES), h.count)
    cdef Py_ssize_t i
    mix_in(s, channel)
    mix_in(s, <int64_t>h.ts)
    mix_in(s, h.origin << 16 | h.worker)
    if e == NULL:
        return
    e.order = <int64_t>h.seq
    e.ts = <Timestamp>h.ts
    e.src = <int16_t>(channel // s.nodes)
    e.dst = <int16_t>(channel % s.nodes)
    e.origin = <int16_t>h.origin
    e.worker = <int16_t>h.worker
    e.hops = h.hops
    for i in range(min(<Py_ssize_t>h.count, <Py_ssize_t>SHOWN)):
        e.aux[i] = <int32_t>aux[i]


cdef void fail(world_t* s, Problem problem, int64_t key=-1, int64_t a=0, int64_t b=0) noexcept nogil:
    """End the schedule. The first problem counts."""
    if s.aborted:
        return
    s.aborted = True
    s.problem = problem
    s.problem_actor = s.current
    s.problem_key = key
    s.problem_a = a
    s.problem_b = b


# --- turns ----------------------------------------------------------------------------------------------------------------

cdef inline bint can_run(const world_t* s, int a) noexcept nogil:
    cdef const actor_t* actor = &s.actor[a]
    cdef int src
    if actor.state == READY:
        return True
    if actor.state == WANTS:
        return s.channel[actor.wanted].holder < 0
    if actor.state == IDLE:
        for src in range(s.nodes):
            if s.channel[src * s.nodes + actor.node].first != NULL:
                return True
    return False


cdef int draw_actor(world_t* s) noexcept nogil:
    """Who goes on: by weight among those that can; MAIN when nobody can."""
    cdef uint64_t able = 0
    cdef int total = 0, a
    for a in range(s.actors):
        if can_run(s, a):
            able |= <uint64_t>1 << a
            total += s.actor[a].weight
    if total == 0:
        return MAIN
    cdef int mark = below(&s.rng, total)
    for a in range(s.actors):
        if able >> a & 1:
            mark -= s.actor[a].weight
            if mark < 0:
                return a
    return MAIN


cdef inline bint any_latch(const world_t* s, Rank node) noexcept nogil:
    cdef int key
    for key in range(s.num_keys):
        if peek_u64(s.stores[node].slots + key) & LATCH:
            return True
    return False


cdef void check_owners(world_t* s) noexcept nogil:
    """One owner or one TRANSFER per key. While a node handles a TRANSFER, the key is on neither side for a moment."""
    cdef int key, node
    cdef int64_t found
    for key in range(s.num_keys):
        found = s.flying[key]
        for node in range(s.nodes):
            if state_of(s.stores[node], key, slot_word(s.stores[node], key)) == HERE:
                found += 1
        if found > 1 or (found == 0 and s.handled[key] == 0):
            fail(s, OWNERS, key, found)
            return


cdef void change(world_t* s, int next) noexcept with gil:
    s.changes += 1
    s.current = next
    (<list>s.switches)[next if next != MAIN else s.actors]()


cdef void turn(world_t* s) noexcept nogil:
    """Let somebody else go on; the actor has said in its state what it waits for. Comes back when it is its turn again."""
    cdef int me = s.current
    cdef int next
    if s.aborted and s.stepwise:
        return
    if s.aborted:
        s.actor[me].state = READY
        s.afterlife += 1
        if s.afterlife > AFTERLIFE:         # a loop in the core that only another actor could end: left where it is
            s.afterlife = 0
            change(s, MAIN)
        return
    s.steps += 1
    check_owners(s)
    if s.stepwise:
        return
    if s.steps > s.max_steps:
        fail(s, LIVELOCK, -1, s.steps)
    if not s.aborted:
        next = draw_actor(s)
        if next != me:
            change(s, next)
    s.actor[me].state = READY


# --- the sink: what the protocol sees of all this --------------------------------------------------------------------------

cdef class SimSink(Sink):
    cdef void lock(self, Rank dest) noexcept nogil:
        cdef world_t* s = self.world
        cdef int channel = self.me * s.nodes + dest
        if not s.aborted:
            if any_latch(s, self.me):
                fail(s, LATCHED, -1, dest)
            elif s.channel[channel].holder == s.current:
                fail(s, LOCK_TWICE, -1, dest)
            else:
                s.actor[s.current].state = WANTS
                s.actor[s.current].wanted = channel
        turn(s)
        s.channel[channel].holder = s.current

    cdef void unlock(self, Rank dest) noexcept nogil:
        cdef world_t* s = self.world
        cdef int channel = self.me * s.nodes + dest
        if s.channel[channel].holder != s.current:
            fail(s, NOT_LOCKED, -1, dest)
        s.channel[channel].holder = -1
        if not any_latch(s, self.me):
            turn(s)

    cdef int alloc(self, out_t* out, size_t size) noexcept nogil:
        if not any_latch(self.world, self.me):
            turn(self.world)
        out.data = <char*>malloc(size)
        out.size = size
        return 0 if out.data != NULL else ERR_MEMORY

    cdef int send(self, Rank dest, out_t* out) noexcept nogil:
        cdef world_t* s = self.world
        cdef int channel = self.me * s.nodes + dest
        cdef header_t* h = <header_t*>out.data
        cdef message_t* m
        if s.channel[channel].holder != s.current:
            fail(s, NOT_LOCKED, -1, dest)
        if out.size < HEADER_BYTES or HEADER_BYTES + 12 * <size_t>h.count > out.size:
            fail(s, BAD_MESSAGE, -1, h.type, h.count)
        m = NULL if s.aborted else <message_t*>malloc(sizeof(message_t))
        if m == NULL:
            free(out.data)
            out.data = NULL
            return 0 if s.aborted else ERR_MEMORY
        s.channel[channel].sent += 1
        h.magic = MAGIC
        h.version = VERSION
        h.job = JOB
        h.seq = s.channel[channel].sent
        h.src = <uint32_t>self.me
        m.data = out.data
        m.size = out.size
        out.data = NULL
        post(s, channel, m)
        if not any_latch(s, self.me):
            turn(s)
        return 0

    cdef void discard(self, out_t* out) noexcept nogil:
        free(out.data)
        out.data = NULL

    cdef void wake(self, worker_t* w) noexcept nogil:
        cdef world_t* s = self.world
        cdef int a = s.nodes + self.me * s.workers + <int>w.index
        add_u32(&w.event, 1)
        if load_u32(&w.sleeping) and s.actor[a].state == PARKED:
            s.actor[a].state = READY

    cdef int64_t now(self) noexcept nogil:
        if not any_latch(self.world, self.me):
            turn(self.world)
        return self.world.steps

    cdef void step(self) noexcept nogil:
        self.now()


# --- channels -------------------------------------------------------------------------------------------------------------

cdef void count_transfer(int64_t* counts, message_t* m, int by) noexcept nogil:
    cdef header_t* h = <header_t*>m.data
    cdef Key* keys = <Key*>(m.data + HEADER_BYTES)
    cdef uint32_t i
    if h.type == TRANSFER:
        for i in range(h.count):
            if 0 <= keys[i] < MAX_KEYS:
                counts[keys[i]] += by


cdef void append(channel_t* c, message_t* m) noexcept nogil:
    m.next = NULL
    if c.first == NULL:
        c.first = m
    else:
        c.last.next = m
    c.last = m


cdef void drop(message_t* m) noexcept nogil:
    memset(m.data, 0xab, m.size)        # whoever kept a pointer into a message is to notice
    free(m.data)
    free(m)


cdef bint strikes(world_t* s, int fault) noexcept nogil:
    """This message meets the network's fault: one does per schedule."""
    if s.faults & fault and below(&s.rng, s.fault_rate) == 0:
        s.faults &= ~fault
        return True
    return False


cdef void post(world_t* s, int channel, message_t* m) noexcept nogil:
    """Put a message into its channel."""
    cdef message_t* twin
    s.messages += 1
    note_message(s, SENDS, channel, m)
    if strikes(s, FAULT_LOSS):
        note_message(s, LOSES, channel, m)
        drop(m)
        return
    count_transfer(s.flying, m, 1)
    append(&s.channel[channel], m)
    if strikes(s, FAULT_DUPLICATE):
        twin = <message_t*>malloc(sizeof(message_t))
        if twin == NULL:
            return
        twin.size = m.size
        twin.data = <char*>malloc(m.size)
        if twin.data == NULL:
            free(twin)
            return
        memcpy(twin.data, m.data, m.size)
        note_message(s, DOUBLES, channel, m)
        append(&s.channel[channel], twin)


cdef message_t* take_first(channel_t* c) noexcept nogil:
    cdef message_t* m = c.first
    c.first = m.next
    return m


cdef message_t* take(world_t* s, Rank node, int* channel) noexcept nogil:
    """The next message for a node: of a channel drawn by weight, the oldest. NULL: there is none."""
    cdef int total = 0, src, mark
    cdef channel_t* c = NULL
    cdef message_t* m
    for src in range(s.nodes):
        c = &s.channel[src * s.nodes + node]
        if c.first != NULL:
            total += c.weight
    if total == 0:
        return NULL
    mark = below(&s.rng, total)
    src = 0
    while True:
        c = &s.channel[src * s.nodes + node]
        if c.first != NULL:
            mark -= c.weight
            if mark < 0:
                break
        src += 1
    channel[0] = src * s.nodes + node
    m = c.first
    if m.next != NULL and s.faults & FAULT_REORDER and below(&s.rng, 4) == 0:
        m = m.next                      # the second one overtakes the first
        c.first.next = m.next
        if c.last == m:
            c.last = c.first
    else:
        c.first = m.next
    return m
