# Design: one Trainer per worker thread. It runs through the worker's triples without the GIL. Of a triple it copies subject, relation and
# object (a relation of RESCAL stays where it is), and works in place on the entities that take the place of the subject or the object,
# a few at a time; then it updates the three. What is not local is pulled and pushed instead. Nothing is held while it waits.
#
# Each parameter makes one step of AdaGrad per triple and role: the gradients of all 1 + 2 negatives scores in which the subject, the
# relation or the object takes part are added up first.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from apps.kge._arithmetic cimport CHUNK, arithmetic, arithmetic_t, logistic
from lapse cimport DONE, Key, Timestamp, Worker, prefetch_row, prefetch_slot

cdef enum:
    LOOK = 16                   # triples between two looks at the clock
    HELD = 4096                 # numbers of one kind that are worked on between acquire and release: some microseconds

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
        int parts, lines, negatives, chunk, ahead
        Key relation_key                # of relation 0
        const Key* places
        double eta, gamma_entity, gamma_relation
        char* memory                    # owned; everything below points into it
        char* three                     # copies of subject, relation, object
        char* adds                      # what has to be added to these
        char* q                         # also p, and the gradients of q, p, s, r, o
        char* far                       # entities that are not here
        char* far_adds
        char* relation                  # a part of a relation that is not here, and what has to be added
        Key* drawn                      # of this triple and the next: the keys in place of the subject, those in place of the object
        Key* far_keys
        Key* ahead_keys                 # of one triple
        int64_t* handles                # of the samples under way
        bint* copied                    # which parts of the relation lie in `relation`
        int64_t deadline, budget
        readonly int64_t trained        # triples of this epoch
        readonly double loss            # their summed loss, in this epoch
        readonly bint out_of_time
        object held                     # what pointers point into

    def __cinit__(self, Worker worker not None, *, bint rescal, bint double_precision, int dim, Key num_entities, int negatives,
                  double eta, double gamma_entity, double gamma_relation, int parts=1, int lines=1, places=None, int ahead=0,
                  bint async_push=False, bint localize_relations=True, int instructions=2):
        """negatives: corrupted triples per side. ahead: triples ahead of which parameters are localized and samples prepared.
        localize_relations: that includes relations. instructions: 0 for those that any processor has."""
        cdef const Key[::1] view
        cdef size_t size, rows, part
        self.worker, self.arith, self.rescal = worker, arithmetic(double_precision, instructions), rescal
        self.dim, self.item, self.parts, self.lines, self.negatives = dim, 8 if double_precision else 4, parts, lines, negatives
        self.row = 2 * self.dim * self.item
        self.eta, self.gamma_entity, self.gamma_relation = eta, gamma_entity, gamma_relation
        self.relation_key, self.ahead, self.async_push, self.localize_relations = num_entities, ahead, async_push, localize_relations
        self.chunk = max(1, min(<int>CHUNK, HELD // dim))
        self.deadline = self.budget = FOREVER
        if places is not None:
            view = self.held = places
            self.places = &view[0]
        rows = 2 * <size_t>negatives
        part = 2 * self.dim * lines * self.item if rescal else 0
        size = 6 * self.row + 7 * self.row // 2 + 2 * rows * self.row + part * parts + part
        size += (4 * rows + 2 + parts) * sizeof(Key) + (ahead + 2) * sizeof(int64_t) + parts * sizeof(bint)
        self.memory = <char*>calloc(size + 64, 1)
        if self.memory == NULL:
            raise MemoryError("a worker's tables")
        self.drawn = <Key*>self.memory
        self.far_keys = self.drawn + 2 * rows
        self.ahead_keys = self.far_keys + rows
        self.handles = <int64_t*>(self.ahead_keys + 2 + parts)
        self.three = <char*>(self.handles + ahead + 2)
        self.adds = self.three + 3 * self.row
        self.q = self.adds + 3 * self.row
        self.far = self.q + 7 * self.row // 2
        self.far_adds = self.far + rows * self.row
        self.relation = self.far_adds + rows * self.row
        self.copied = <bint*>(self.relation + part * parts + part)

    def __dealloc__(self):
        free(self.memory)

    cdef inline Key key(self, Key key) noexcept nogil:
        return self.places[key] if self.places != NULL else key

    # --- one triple -----------------------------------------------------------------------------------------------------------------

    cdef int fetch(self, const Key* keys, int n) noexcept nogil:
        """Copy up to three rows to `three`; 0 or what went wrong."""
        cdef void* rows[3]
        cdef Timestamp under_way[3]
        cdef int i, rc = self.worker.acquire(keys, n, rows)
        if rc < 0:
            return rc
        for i in range(n):
            if rows[i] != NULL:
                memcpy(self.three + i * self.row, rows[i], self.row)
        self.worker.release(0)
        if rc == n:
            return 0
        for i in range(n):
            under_way[i] = self.worker.pull(keys + i, 1, self.three + i * self.row) if rows[i] == NULL else DONE
        rc = 0
        for i in range(n):
            if rc == 0:
                rc = self.worker.wait(under_way[i])
        return rc

    cdef int update(self, const Key* keys, int n, const char* gradients) noexcept nogil:
        """One step of AdaGrad for up to three rows, of which `three` has copies."""
        cdef void* rows[3]
        cdef int i, rc = self.worker.acquire(keys, n, rows)
        cdef uint32_t changed = 0
        cdef Timestamp ts
        if rc < 0:
            return rc
        for i in range(n):
            if rows[i] != NULL:
                self.arith.adagrad(rows[i], gradients + i * self.row // 2, self.dim, self.eta,
                                   self.gamma_relation if i == 2 else self.gamma_entity)
                changed |= <uint32_t>1 << i
        self.worker.release(changed)
        if rc == n:
            return 0
        for i in range(n):
            if rows[i] == NULL:
                self.arith.adagrad_far(self.three + i * self.row, self.adds + i * self.row, gradients + i * self.row // 2, self.dim,
                                       self.eta, self.gamma_relation if i == 2 else self.gamma_entity)
                ts = self.worker.push(keys + i, 1, self.adds + i * self.row)
                rc = self.pushed(ts)
                if rc < 0:
                    return rc
        return 0

    cdef inline int pushed(self, Timestamp ts) noexcept nogil:
        """Wait for a push, where that is asked for."""
        if ts < DONE:
            return <int>ts
        return 0 if self.async_push else self.worker.wait(ts)

    cdef int corrupt(self, const Key* keys, const Key* coming, char* q, char* g, int* far) noexcept nogil:
        """Train on one side's corrupted triples with entities that are here; add the keys of the others to far_keys."""
        cdef void* rows[CHUNK]
        cdef int at = 0, n, i, rc
        cdef uint32_t changed
        while at < self.negatives:
            n = min(self.chunk, self.negatives - at)
            if coming != NULL:
                for i in range(n):
                    prefetch_row(self.worker, coming[at + i], self.row)
            rc = self.worker.acquire(keys + at, n, rows)
            if rc < 0:
                return rc
            changed = 0
            for i in range(n):
                if rows[i] != NULL:
                    changed |= <uint32_t>1 << i
                else:
                    self.far_keys[far[0]] = keys[at + i]
                    far[0] += 1
            self.loss += self.arith.corrupt(rows, n, q, g, self.dim, self.eta, self.gamma_entity)
            self.worker.release(changed)
            at += n
        return 0

    cdef int corrupt_far(self, int subjects, int all_, char* q, char* p, char* gq, char* gp) noexcept nogil:
        """Train on the corrupted triples with entities that are not here; the first so many take the subject's place."""
        cdef int at = 0, n, rc = self.worker.wait(self.worker.pull(self.far_keys, all_, self.far))
        cdef bint subject
        if rc < 0:
            return rc
        while at < all_:
            subject = at < subjects
            n = min(<int>CHUNK, (subjects if subject else all_) - at)
            self.loss += self.arith.corrupt_far(self.far + at * self.row, self.far_adds + at * self.row, n, p if subject else q,
                                                gp if subject else gq, self.dim, self.eta, self.gamma_entity)
            at += n
        return self.pushed(self.worker.push(self.far_keys, all_, self.far_adds))

    cdef int rescal_forward(self, Key first, char* q, char* p) noexcept nogil:
        """q and p out of the parts of a relation."""
        cdef const char* s = self.three
        cdef const char* o = self.three + self.row
        cdef size_t part = 2 * self.dim * self.lines * self.item
        cdef void* row
        cdef Key key
        cdef int i, lines, rc
        for i in range(self.parts):
            key = self.key(first + i)
            lines = min(self.lines, <int>self.dim - i * self.lines)
            rc = self.worker.acquire(&key, 1, &row)
            if rc < 0:
                return rc
            if rc:
                self.arith.rescal_forward(row, i * self.lines, lines, s, o, q, p, self.dim)
            self.worker.release(0)
            self.copied[i] = rc == 0
            if rc == 0:
                row = self.relation + i * part
                rc = self.worker.wait(self.worker.pull(&key, 1, row))
                if rc < 0:
                    return rc
                self.arith.rescal_forward(row, i * self.lines, lines, s, o, q, p, self.dim)
        return 0

    cdef int rescal_backward(self, Key first, const char* gq, const char* gp, char* ds, char* d_o) noexcept nogil:
        """Update the parts of a relation; add to the gradients of subject and object."""
        cdef const char* s = self.three
        cdef const char* o = self.three + self.row
        cdef size_t part = 2 * self.dim * self.lines * self.item
        cdef char* add = self.relation + self.parts * part
        cdef void* row
        cdef Key key
        cdef int i, lines, rc
        for i in range(self.parts):
            key = self.key(first + i)
            lines = min(self.lines, <int>self.dim - i * self.lines)
            rc = self.worker.acquire(&key, 1, &row)
            if rc < 0:
                return rc
            if rc:
                self.arith.rescal_backward(row, NULL, i * self.lines, lines, s, o, gq, gp, ds, d_o, self.dim, self.eta,
                                           self.gamma_relation)
            self.worker.release(rc)
            if rc == 0:
                row = self.relation + i * part
                if not self.copied[i]:          # it was here when the triple began
                    rc = self.worker.wait(self.worker.pull(&key, 1, row))
                    if rc < 0:
                        return rc
                self.arith.rescal_backward(row, add, i * self.lines, lines, s, o, gq, gp, ds, d_o, self.dim, self.eta,
                                           self.gamma_relation)
                rc = self.pushed(self.worker.push(&key, 1, add))
                if rc < 0:
                    return rc
        return 0

    cdef int train_triple(self, const int32_t* triple, const Key* drawn, const Key* coming) noexcept nogil:
        """Train on a triple (subject, relation, object) and the corrupted ones; 0 or what went wrong. coming: the keys that come next."""
        cdef size_t half = self.row // 2
        cdef char* q = self.q
        cdef char* p = q + half
        cdef char* gq = p + half
        cdef char* gp = gq + half
        cdef char* ds = gp + half
        cdef char* d_o = ds + half
        cdef char* dr = d_o + half
        cdef char* s = self.three
        cdef char* o = s + self.row
        cdef char* r = o + self.row
        cdef Key first = self.relation_key + <Key>triple[1] * self.parts
        cdef Key keys[3]
        cdef int far = 0, subjects, rc, count = 2 if self.rescal else 3
        cdef double x, f
        keys[0], keys[1], keys[2] = self.key(triple[0]), self.key(triple[2]), self.key(first)
        rc = self.fetch(keys, count)
        if rc < 0:
            return rc
        if self.rescal:
            memset(q, 0, half)
            rc = self.rescal_forward(first, q, p)
            if rc < 0:
                return rc
        else:
            self.arith.complex_forward(s, r, o, q, p, self.dim)
        x = -self.arith.dot(q, o, self.dim)
        self.loss += logistic(&x, &f, 1)
        memset(gq, 0, 4 * half)
        self.arith.axpy(-f, o, gq, self.dim)
        if self.negatives:
            rc = self.corrupt(drawn, coming, p, gp, &far)
            subjects = far
            if rc == 0:
                rc = self.corrupt(drawn + self.negatives, coming + self.negatives if coming != NULL else NULL, q, gq, &far)
            if rc == 0 and far:
                rc = self.corrupt_far(subjects, far, q, p, gq, gp)
            if rc < 0:
                return rc
        if self.rescal:
            rc = self.rescal_backward(first, gq, gp, ds, d_o)
            if rc < 0:
                return rc
        else:
            self.arith.complex_backward(s, r, o, gq, gp, ds, dr, d_o, self.dim)
        self.arith.axpy(-f, q, d_o, self.dim)
        return self.update(keys, count, ds)

    # --- an epoch ---------------------------------------------------------------------------------------------------------------------

    def begin_epoch(self, int64_t points=-1, seconds=None):
        """Set when an epoch ends before its time: after so many triples (below 0: all), at so many seconds from now."""
        self.budget = points if points >= 0 else FOREVER
        self.trained, self.loss = 0, 0
        self.deadline = FOREVER if seconds is None else now() + <int64_t>(seconds * 1e9)

    cdef int64_t prepare(self, const int32_t* triple) noexcept nogil:
        """Localize what a triple needs, and prepare its samples; a handle or what went wrong."""
        cdef int n = 2, i
        cdef Timestamp ts
        if self.ahead:
            self.ahead_keys[0], self.ahead_keys[1] = self.key(triple[0]), self.key(triple[2])
            if self.localize_relations:
                for i in range(self.parts):
                    self.ahead_keys[n] = self.key(self.relation_key + <Key>triple[1] * self.parts + i)
                    n += 1
            ts = self.worker.localize(self.ahead_keys, n)
            if ts < DONE:
                return ts
        return self.worker.prepare_sample(2 * self.negatives) if self.negatives else 0

    cdef int draw(self, int64_t handle, Key* keys) noexcept nogil:
        cdef int i, rc
        if self.negatives == 0:
            return 0
        rc = self.worker.draw_sample(handle, keys, 2 * self.negatives)
        if rc == 0:
            for i in range(2 * self.negatives):
                prefetch_slot(self.worker, keys[i])
        return rc

    def train(self, const int32_t[:, ::1] triples):
        """Train on these triples in this order, or as many as the epoch has room for; 0, or the code of what went wrong."""
        cdef Py_ssize_t n = min(<int64_t>len(triples), self.budget), i, coming = 0
        cdef int ring = max(self.ahead, 1) + 1
        cdef int rc = 0
        cdef int64_t handle = 0
        cdef Key* drawn = self.drawn
        cdef Key* next_ = self.drawn + 2 * self.negatives
        cdef Key* kept
        with nogil:
            for i in range(n):
                if self.deadline != FOREVER and i % LOOK == 0 and now() >= self.deadline:
                    self.out_of_time = True
                    break
                while coming < n and coming < i + ring:
                    handle = self.prepare(&triples[coming, 0])
                    if handle < 0:
                        break
                    self.handles[coming % ring] = handle
                    coming += 1
                if handle < 0:
                    rc = <int>handle
                    break
                if i == 0:
                    rc = self.draw(self.handles[0], drawn)
                if rc == 0 and i + 1 < n:
                    rc = self.draw(self.handles[(i + 1) % ring], next_)
                if rc == 0:
                    rc = self.train_triple(&triples[i, 0], drawn, next_ if i + 1 < n else NULL)
                if rc < 0:
                    break
                if self.negatives:
                    self.worker.finish_sample(self.handles[i % ring])
                kept = drawn
                drawn = next_
                next_ = kept
                self.trained += 1
            if self.negatives:
                for i in range(self.trained, coming):       # nobody wants these any more
                    self.worker.finish_sample(self.handles[i % ring])
        self.budget -= self.trained
        return rc


def losses(double[::1] x):
    """Return log(1 + exp(x)) and its derivative of up to 16 numbers, as the training computes them: for tests."""
    import numpy as np
    cdef double[::1] loss = np.empty(len(x)), derivative = np.empty(len(x))
    cdef Py_ssize_t i
    for i in range(len(x)):
        loss[i] = logistic(&x[i], &derivative[i], 1)
    return np.asarray(loss), np.asarray(derivative)
