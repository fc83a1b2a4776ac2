# distutils: extra_compile_args = -fno-math-errno
# Design: one Trainer per worker thread. It runs through the worker's triples without the GIL. Of a triple it works on copies of subject,
# relation and object (a relation of RESCAL stays where it is), and in place on the entities that take the place of the subject or the
# object, a few at a time; then it adds the changes of the copies to the parameters. What is not local is pulled, worked on in a copy, and
# its change pushed. Nothing is held while it waits.
#
# ComplEx: the true triple first, then groups of corrupted ones, subjects and objects in turn; each group is a step of AdaGrad for all
# that take part. With groups of one, that is what a program that trains on one score after the other does. RESCAL: one step per triple
# for subject, relation and object, with the gradients of all scores added up, since a step costs dim * dim.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from apps.kge._arithmetic cimport CHUNK, arithmetic, arithmetic_t, step_t
from lapse cimport DONE, Key, Timestamp, Worker, look, prefetch_row, prefetch_slot, sight_t

cdef enum:
    LOOK = 16                   # triples between two looks at the clock
    WORK = 8
    HELD = 2048                 # numbers of one kind that are worked on between acquire and release: some microseconds

cdef int64_t FOREVER = 0x7FFFFFFFFFFFFFFF


cdef inline int64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec


cdef class Trainer:
    """What one worker does with its triples. One thread.

    dim: numbers of an entity. parts, lines: a relation is so many parameters, of so many lines of its matrix each (ComplEx: 1 and 1).
    places: where the parameter of each key is; the entities' keys are first, then the relations'.
    """

    cdef:
        Worker worker
        const arithmetic_t* arith
        bint rescal, async_push, localize_relations
        size_t dim, item, row           # row: bytes of an entity's parameter
        int parts, lines, negatives, chunk, group, ahead
        int together, ring              # triples that are prepared together; such lots under way, at most
        Key relation_key                # of relation 0
        const Key* places
        sight_t sight                   # of the node's rows, for hints to the processor
        bint sees
        step_t step, step_of_all        # with the regularization of one score, and of those of a triple
        char* memory                    # owned; everything below points into it
        char* before                    # copies of subject, object, relation
        char* three                     # the same, as they are worked on
        char* work                      # gradients and the like: WORK times half a row
        char* far                       # entities that are not here
        char* far_after                 # the same, as they are worked on
        char* relation                  # a relation that is not here, and a part of it as it is worked on
        Key* drawn                      # of this triple and the next: groups of keys in place of the subject, and of the object
        Key* far_keys
        int* far_sides                  # 1: in place of the subject
        Key* ahead_keys                 # of the triples that are prepared together
        int64_t* handles                # of the samples under way
        bint* copied                    # which parts of the relation lie in `relation`
        int64_t deadline, budget
        readonly int64_t trained        # triples of this epoch
        readonly double loss            # their summed loss, in this epoch
        readonly bint out_of_time
        object held                     # what pointers point into

    def __cinit__(self, Worker worker not None, *, bint rescal, bint double_precision, int dim, Key num_entities, int negatives,
                  double eta, double gamma_entity, double gamma_relation, int group=1, int parts=1, int lines=1, places=None,
                  int ahead=0, int together=1, bint async_push=False, bint localize_relations=True, int instructions=2):
        """negatives: corrupted triples per side. group: how many of a side are one step. ahead: triples ahead of which parameters
        are localized and samples prepared, for so many `together`. localize_relations: that includes relations. instructions: 0 for those that any
        processor has."""
        cdef const Key[::1] view
        cdef size_t size, rows = 2 * <size_t>negatives, part
        self.worker, self.arith, self.rescal = worker, arithmetic(double_precision, instructions), rescal
        self.dim, self.item, self.parts, self.lines, self.negatives = dim, 8 if double_precision else 4, parts, lines, negatives
        self.row = 2 * self.dim * self.item
        self.step.eta = self.step_of_all.eta = eta
        self.step.gamma_entity, self.step.gamma_relation = gamma_entity, gamma_relation
        self.step_of_all.gamma_entity, self.step_of_all.gamma_relation = (1 + negatives) * gamma_entity, (1 + 2 * negatives) * gamma_relation
        self.relation_key, self.ahead, self.async_push, self.localize_relations = num_entities, ahead, async_push, localize_relations
        self.together, self.ring = max(1, together), max(ahead, 1) // max(1, together) + 2
        self.chunk = max(1, min(<int>CHUNK, HELD // dim))
        self.group = max(1, min(negatives, self.chunk if rescal else min(group, self.chunk)))
        self.deadline = self.budget = FOREVER
        if places is not None:
            view = self.held = places
            self.places = &view[0]
        part = 2 * self.dim * lines * self.item if rescal else 0
        size = (6 + WORK // 2 + 2 * rows) * self.row + part * (parts + 1)
        size += (3 * rows + (2 + parts) * self.together) * sizeof(Key) + self.ring * sizeof(int64_t) + parts * sizeof(bint) + rows * sizeof(int)
        self.memory = <char*>calloc(size, 1)
        if self.memory == NULL:
            raise MemoryError("a worker's tables")
        self.drawn = <Key*>self.memory
        self.far_keys = self.drawn + 2 * rows
        self.ahead_keys = self.far_keys + rows
        self.handles = <int64_t*>(self.ahead_keys + (2 + parts) * self.together)
        self.before = <char*>(self.handles + self.ring)
        self.three = self.before + 3 * self.row
        self.work = self.three + 3 * self.row
        self.far = self.work + WORK // 2 * self.row
        self.far_after = self.far + rows * self.row
        self.relation = self.far_after + rows * self.row
        self.copied = <bint*>(self.relation + part * (parts + 1))
        self.far_sides = <int*>(self.copied + parts)

    def __dealloc__(self):
        free(self.memory)

    cdef inline Key key(self, Key key) noexcept nogil:
        return self.places[key] if self.places != NULL else key

    # --- one triple -----------------------------------------------------------------------------------------------------------------

    cdef inline void call_back(self, const Key* keys, int n) noexcept nogil:
        """Where parameters are localized ahead: localize again those that another node has taken in between. The pull that comes next
        waits for them, and what follows finds them here."""
        if self.ahead:
            self.worker.localize(keys, n)       # what goes wrong, the next call says

    cdef int fetch(self, const Key* keys, int n) noexcept nogil:
        """Copy up to three rows to `before` and `three`; 0 or what went wrong."""
        cdef void* rows[3]
        cdef Timestamp under_way[3]
        cdef int i, rc = self.worker.acquire(keys, n, rows)
        if rc < 0:
            return rc
        for i in range(n):
            if rows[i] != NULL:
                memcpy(self.before + i * self.row, rows[i], self.row)
        self.worker.release(0)
        if rc < n:
            for i in range(n):
                if rows[i] == NULL:
                    self.call_back(keys + i, 1)
            for i in range(n):
                under_way[i] = self.worker.pull(keys + i, 1, self.before + i * self.row) if rows[i] == NULL else DONE
            for i in range(n):
                rc = self.worker.wait(under_way[i])
                if rc < 0:
                    return rc
        memcpy(self.three, self.before, n * self.row)
        return 0

    cdef int give_back(self, const Key* keys, int n) noexcept nogil:
        """Add what has become of the copies to the parameters; 0 or what went wrong."""
        cdef void* rows[3]
        cdef int i, rc = self.worker.acquire(keys, n, rows)
        cdef uint32_t changed = 0
        if rc < 0:
            return rc
        for i in range(n):
            if rows[i] != NULL:
                self.arith.add_change(rows[i], self.before + i * self.row, self.three + i * self.row, 2 * self.dim)
                changed |= <uint32_t>1 << i
        self.worker.release(changed)
        if rc < n:
            for i in range(n):
                if rows[i] == NULL:
                    rc = self.push_change(keys + i, 1, self.before + i * self.row, self.three + i * self.row, 2 * self.dim)
                    if rc < 0:
                        return rc
        return 0

    cdef int push_change(self, const Key* keys, int n, char* from_, const char* to, size_t numbers) noexcept nogil:
        """Push to - from of n keys of so many numbers together; writes over `from`. Waits, where that is asked for."""
        cdef Timestamp ts
        self.arith.less(from_, to, numbers)
        ts = self.worker.push(keys, n, from_)
        if ts < DONE:
            return <int>ts
        return 0 if self.async_push else self.worker.wait(ts)

    cdef double train_group(self, void** rows, int n, double truth, int subject) noexcept nogil:
        """Train on triples with these entities in the place of the subject, or of the object; their loss."""
        cdef char* s = self.three
        cdef size_t half = self.row // 2
        if not self.rescal:
            return self.arith.complex_(rows, n, truth, subject, s, s + 2 * self.row, s + self.row, self.work, self.dim, &self.step)
        # work: q, p, their gradients, those of subject and object
        return self.arith.entities(rows, n, truth, self.work + subject * half, self.work + (2 + subject) * half, self.dim, &self.step)

    cdef int corrupt(self, const Key* keys, const Key* coming) noexcept nogil:
        """Train on the corrupted triples: first with the entities that are here, then with the others."""
        cdef void* rows[CHUNK]
        cdef int at = 0, all_ = 2 * self.negatives, far = 0, n, i, m, rc, turn = 0
        cdef uint32_t changed
        while at < all_:
            n = 0
            for i in range(2 * all_):               # as many whole groups as can be held
                m = self.size_of(turn + i)
                if n + m > self.chunk or at + n == all_:
                    break
                n += m
            if coming != NULL and self.sees:
                for i in range(n):
                    prefetch_row(&self.sight, coming[at + i], self.row)
            rc = self.worker.acquire(keys + at, n, rows)
            if rc < 0:
                return rc
            changed, i = 0, 0
            while i < n:
                m = self.size_of(turn)
                self.loss += self.train_group(rows + i, m, 0, 1 - (turn & 1))
                for i in range(i, i + m):
                    if rows[i] != NULL:
                        changed |= <uint32_t>1 << i
                    else:
                        self.far_keys[far] = keys[at + i]
                        self.far_sides[far] = 1 - (turn & 1)
                        far += 1
                i += 1
                turn += 1
            self.worker.release(changed)
            at += n
        if far == 0:
            return 0
        self.call_back(self.far_keys, far)
        rc = self.worker.wait(self.worker.pull(self.far_keys, far, self.far))
        if rc < 0:
            return rc
        memcpy(self.far_after, self.far, far * self.row)
        for i in range(far):
            rows[0] = self.far_after + i * self.row
            self.loss += self.train_group(rows, 1, 0, self.far_sides[i])
        return self.push_change(self.far_keys, far, self.far, self.far_after, 2 * self.dim * far)

    cdef inline int size_of(self, int turn) noexcept nogil:
        """How many corrupted triples make up a group; groups 2 k and 2 k + 1 are the same number of both sides."""
        return min(self.group, self.negatives - turn // 2 * self.group)

    cdef int rescal_forward(self, Key first) noexcept nogil:
        """q and p out of the parts of a relation."""
        cdef char* q = self.work
        cdef char* p = q + self.row // 2
        cdef const char* s = self.before
        cdef const char* o = s + self.row
        cdef size_t part = 2 * self.dim * self.lines * self.item
        cdef void* row
        cdef Key key
        cdef int i, rc
        memset(q, 0, WORK // 2 * self.row)
        for i in range(self.parts):
            key = self.key(first + i)
            rc = self.worker.acquire(&key, 1, &row)
            if rc < 0:
                return rc
            if rc:
                self.arith.rescal_forward(row, i * self.lines, self.lines, s, o, q, p, self.dim)
            self.worker.release(0)
            self.copied[i] = rc == 0
            if rc == 0:
                row = self.relation + i * part
                self.call_back(&key, 1)
                rc = self.worker.wait(self.worker.pull(&key, 1, row))
                if rc < 0:
                    return rc
                self.arith.rescal_forward(row, i * self.lines, self.lines, s, o, q, p, self.dim)
        return 0

    cdef int rescal_backward(self, Key first) noexcept nogil:
        """Update the parts of a relation, and the copies of subject and object."""
        cdef size_t half = self.row // 2
        cdef char* gq = self.work + 2 * half
        cdef char* gp = gq + half
        cdef char* ds = gp + half
        cdef char* d_o = ds + half
        cdef const char* s = self.before
        cdef const char* o = s + self.row
        cdef size_t part = 2 * self.dim * self.lines * self.item
        cdef char* after = self.relation + self.parts * part
        cdef char* before
        cdef void* row
        cdef Key key
        cdef int i, rc
        for i in range(self.parts):
            key = self.key(first + i)
            rc = self.worker.acquire(&key, 1, &row)
            if rc < 0:
                return rc
            if rc:
                self.arith.rescal_backward(row, i * self.lines, self.lines, s, o, gq, gp, ds, d_o, self.dim, &self.step_of_all)
            self.worker.release(rc)
            if rc == 0:
                before = self.relation + i * part
                if not self.copied[i]:          # it was here when the triple began
                    rc = self.worker.wait(self.worker.pull(&key, 1, before))
                    if rc < 0:
                        return rc
                memcpy(after, before, part)
                self.arith.rescal_backward(after, i * self.lines, self.lines, s, o, gq, gp, ds, d_o, self.dim, &self.step_of_all)
                rc = self.push_change(&key, 1, before, after, 2 * self.dim * self.lines)
                if rc < 0:
                    return rc
        self.arith.adagrad(self.three, ds, self.dim, self.step.eta, self.step_of_all.gamma_entity)
        self.arith.adagrad(self.three + self.row, d_o, self.dim, self.step.eta, self.step_of_all.gamma_entity)
        return 0

    cdef int train_triple(self, const int32_t* triple, const Key* drawn, const Key* coming) noexcept nogil:
        """Train on a triple (subject, relation, object) and the corrupted ones; 0 or what went wrong. coming: the keys that come next."""
        cdef Key first = self.relation_key + <Key>triple[1] * self.parts
        cdef Key keys[3]
        cdef void* object_
        cdef int rc, count = 2 if self.rescal else 3
        keys[0], keys[1], keys[2] = self.key(triple[0]), self.key(triple[2]), self.key(first)
        rc = self.fetch(keys, count)
        if rc == 0 and self.rescal:
            rc = self.rescal_forward(first)
        if rc < 0:
            return rc
        object_ = self.three + self.row
        self.loss += self.train_group(&object_, 1, 1, 0)
        if self.negatives:
            rc = self.corrupt(drawn, coming)
        if rc == 0 and self.rescal:
            rc = self.rescal_backward(first)
        return self.give_back(keys, count) if rc == 0 else rc

    # --- an epoch ---------------------------------------------------------------------------------------------------------------------

    def begin_epoch(self, int64_t points=-1, seconds=None):
        """Set when an epoch ends before its time: after so many triples (below 0: all), at so many seconds from now."""
        self.budget = points if points >= 0 else FOREVER
        self.trained, self.loss = 0, 0
        self.deadline = FOREVER if seconds is None else now() + <int64_t>(seconds * 1e9)

    cdef int64_t prepare(self, const int32_t* triples, int count) noexcept nogil:
        """Localize what some triples need, and prepare their samples; a handle or what went wrong."""
        cdef int n = 0, i, part
        cdef Timestamp ts
        if self.ahead:
            for i in range(count):
                self.ahead_keys[n], self.ahead_keys[n + 1] = self.key(triples[3 * i]), self.key(triples[3 * i + 2])
                n += 2
                if self.localize_relations:
                    for part in range(self.parts):
                        self.ahead_keys[n] = self.key(self.relation_key + <Key>triples[3 * i + 1] * self.parts + part)
                        n += 1
            ts = self.worker.localize(self.ahead_keys, n)
            if ts < DONE:
                return ts
        return self.worker.prepare_sample(2 * <int64_t>self.negatives * count) if self.negatives else 0

    cdef int draw(self, int64_t handle, Key* keys) noexcept nogil:
        cdef int i, rc
        if self.negatives == 0:
            return 0
        rc = self.worker.draw_sample(handle, keys, 2 * self.negatives)
        if rc == 0 and self.sees:
            for i in range(2 * self.negatives):
                prefetch_slot(&self.sight, keys[i])
        return rc

    def skip_draws(self, int64_t triples):
        """Draw what so many triples need, for nothing; 0 or the code of what went wrong."""
        cdef int64_t handle = 0
        cdef int rc = 0
        with nogil:
            while triples > 0 and self.negatives > 0 and rc == 0:
                handle = self.worker.prepare_sample(2 * self.negatives)
                rc = <int>handle if handle < 0 else self.worker.draw_sample(handle, self.drawn, 2 * self.negatives)
                if rc == 0:
                    self.worker.finish_sample(handle)
                triples -= 1
        return rc

    def train(self, const int32_t[:, ::1] triples):
        """Train on these triples in this order, or as many as the epoch has room for; 0, or the code of what went wrong."""
        cdef Py_ssize_t n = min(<int64_t>len(triples), self.budget), i, coming = 0, before = self.trained
        cdef int together = self.together, least = max(self.ahead, 1), ring = self.ring, rc = 0
        cdef int64_t handle = 0
        cdef Key* drawn = self.drawn
        cdef Key* next_ = self.drawn + 2 * self.negatives
        cdef Key* kept
        with nogil:
            self.sees = look(self.worker, &self.sight)
            for i in range(n):
                if self.deadline != FOREVER and i % LOOK == 0 and now() >= self.deadline:
                    self.out_of_time = True
                    break
                while coming < n and coming <= i + least:       # together * k triples have been prepared, in k samples
                    handle = self.prepare(&triples[coming, 0], min(together, n - coming))
                    if handle < 0:
                        break
                    self.handles[coming // together % ring] = handle
                    coming += together
                if handle < 0:
                    rc = <int>handle
                    break
                if i == 0:
                    rc = self.draw(self.handles[0], drawn)
                if rc == 0 and i + 1 < n:
                    rc = self.draw(self.handles[(i + 1) // together % ring], next_)
                if rc == 0:
                    rc = self.train_triple(&triples[i, 0], drawn, next_ if i + 1 < n else NULL)
                if rc < 0:
                    break
                if self.negatives and ((i + 1) % together == 0 or i + 1 == n):
                    self.worker.finish_sample(self.handles[i // together % ring])
                kept = drawn
                drawn = next_
                next_ = kept
                self.trained += 1
            if self.negatives:                          # nobody wants these any more
                i = (self.trained - before) // together * together
                while i < coming and self.trained - before < n:
                    self.worker.finish_sample(self.handles[i // together % ring])
                    i += together
        self.budget -= self.trained - before
        return rc
