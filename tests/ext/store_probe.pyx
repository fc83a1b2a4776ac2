"""Python's view of lapse._store, for tests: one store, every function."""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from lapse._store cimport (
    AWAY, COMING, HERE, absent_rows, add_values, away_epoch, batch_bytes, digest_rows, epoch_of, first_out_of_range, gone_word,
    incoming_word, insert_row, latch, mix_digest, pull_rows, push_rows, remove_row, row_of, set_rows, slot_word, state_of,
    store_free, store_new, store_t, stored_bytes, transfer_of, unlatch, visible_bytes)
from lapse._sync cimport add_i64, load_i64, store_i64
from lapse._types cimport Key

STATES = {<int>AWAY: "away", <int>HERE: "here", <int>COMING: "coming"}


cdef class Probe:
    cdef store_t* store         # owned
    cdef int64_t stop           # atomic
    cdef int64_t pulls          # atomic; batches of pull_until_stopped
    cdef int64_t moves          # atomic; keys of relocate_until_stopped

    def __cinit__(self, Key num_keys, Key home_begin, Key home_end, int dtype, visible, stored):
        cdef const uint32_t[::1] v
        cdef const uint32_t[::1] w
        if isinstance(visible, int):
            self.store = store_new(num_keys, home_begin, home_end, dtype, visible, stored, NULL, NULL)
        else:
            v = visible
            w = stored
            assert v.shape[0] == num_keys and w.shape[0] == num_keys
            self.store = store_new(num_keys, home_begin, home_end, dtype, 0, 0, &v[0], &w[0])
        if self.store == NULL:
            raise MemoryError

    def __dealloc__(self):
        store_free(self.store)

    # one key

    def sizes(self, Key key):
        return visible_bytes(self.store, key), stored_bytes(self.store, key)

    def state(self, Key key):
        return STATES[<int>state_of(self.store, key, slot_word(self.store, key))]

    def epoch(self, Key key):
        """Of a key that is here, or with which it left."""
        cdef uint64_t word = slot_word(self.store, key)
        return epoch_of(self.store, key, word) if state_of(self.store, key, word) == HERE else away_epoch(word)

    def address(self, Key key):
        """Where the row is; makes it if there is none."""
        cdef uint64_t word = latch(self.store, key)
        cdef char* row = row_of(self.store, key, &word)
        unlatch(self.store, key, word)
        return <size_t>row

    def insert(self, Key key, uint32_t epoch, values):
        cdef bytes held = values
        latch(self.store, key)
        cdef uint64_t word = insert_row(self.store, key, epoch, NULL if values is None else <char*>held)
        unlatch(self.store, key, word)

    def remove(self, Key key, uint32_t epoch):
        cdef uint64_t word = latch(self.store, key)
        cdef bytes out = bytes(stored_bytes(self.store, key) or 1)
        word = remove_row(self.store, key, word, epoch, <char*>out)
        unlatch(self.store, key, word)
        return out[:stored_bytes(self.store, key)]

    def expect(self, Key key, size_t transfer):
        latch(self.store, key)
        unlatch(self.store, key, incoming_word(<void*>transfer))
        return <size_t>transfer_of(slot_word(self.store, key))

    def pass_on(self, Key key, uint32_t epoch):
        latch(self.store, key)
        unlatch(self.store, key, gone_word(epoch))

    def add(self, Key key, bytes values):
        cdef uint64_t word = latch(self.store, key)
        add_values(self.store, key, row_of(self.store, key, &word), <const char*>values)
        unlatch(self.store, key, word)

    def take_latch(self, Key key):
        return latch(self.store, key)

    def give_latch(self, Key key, uint64_t word):
        unlatch(self.store, key, word)

    # batches; values as bytes (an array's .view(uint8)); return the missed positions

    def batch(self, str what, const Key[::1] keys, unsigned char[::1] vals):
        cdef Py_ssize_t n = keys.shape[0], missed = 0
        cdef const Key* first = &keys[0] if n else NULL
        cdef unsigned char* at = &vals[0] if vals.shape[0] else NULL
        cdef uint32_t* misses = <uint32_t*>malloc((n + 1) * sizeof(uint32_t))
        try:
            if what == "pull":
                with nogil:
                    missed = pull_rows(self.store, first, n, at, misses)
            elif what == "push":
                with nogil:
                    missed = push_rows(self.store, first, n, at, misses)
            elif what == "set":
                with nogil:
                    missed = set_rows(self.store, first, n, at, misses)
            else:
                with nogil:
                    missed = absent_rows(self.store, first, n, misses)
            if missed < 0:
                raise MemoryError
            return [misses[i] for i in range(missed)]
        finally:
            free(misses)

    def bytes_of(self, const Key[::1] keys):
        return batch_bytes(self.store, &keys[0] if keys.shape[0] else NULL, keys.shape[0])

    def touch(self, Key begin, Key end):
        """A row for every key of the range."""
        cdef Key key
        cdef uint64_t word
        with nogil:
            for key in range(begin, end):
                word = latch(self.store, key)
                row_of(self.store, key, &word)
                unlatch(self.store, key, word)

    def digest(self, Key per_home, int homes):
        cdef uint64_t counts[64]
        cdef uint64_t digests[64]
        cdef int i
        for i in range(64):
            counts[i] = digests[i] = 0
        digest_rows(self.store, per_home, counts, digests)
        return [(counts[i], digests[i]) for i in range(homes)]

    # threads: loops that hold no GIL

    def push_often(self, const Key[::1] keys, unsigned char[::1] vals, int rounds, int64_t pulls, int64_t moves):
        """At least so many rounds, and until the other threads have done so much; returns rounds and positions served."""
        cdef Py_ssize_t n = keys.shape[0], missed = 0, done = 0
        cdef uint32_t* misses = <uint32_t*>malloc(n * sizeof(uint32_t))
        with nogil:
            while done < rounds or load_i64(&self.pulls) < pulls or load_i64(&self.moves) < moves:
                missed += push_rows(self.store, &keys[0], n, &vals[0], misses)
                done += 1
        free(misses)
        return done, done * n - missed

    def set_often(self, const Key[::1] keys, unsigned char[::1] vals, int64_t pulls):
        cdef Py_ssize_t n = keys.shape[0]
        cdef uint32_t* misses = <uint32_t*>malloc(n * sizeof(uint32_t))
        with nogil:
            while load_i64(&self.pulls) < pulls:
                set_rows(self.store, &keys[0], n, &vals[0], misses)
        free(misses)

    def pull_until_stopped(self, const Key[::1] keys, size_t length):
        """Pull int64 rows until stop(); count those whose numbers are not all equal (half of a push was seen)."""
        cdef Py_ssize_t n = keys.shape[0], i, torn = 0
        cdef size_t j
        cdef uint32_t* misses = <uint32_t*>malloc(n * sizeof(uint32_t))
        cdef int64_t* vals = <int64_t*>malloc(n * length * sizeof(int64_t))
        with nogil:
            for i in range(n * <Py_ssize_t>length):
                vals[i] = 0
            while not load_i64(&self.stop):
                pull_rows(self.store, &keys[0], n, vals, misses)    # a missed position keeps an older whole row
                add_i64(&self.pulls, 1)
                for i in range(n):
                    for j in range(1, length):
                        if vals[i * <Py_ssize_t>length + <Py_ssize_t>j] != vals[i * <Py_ssize_t>length]:
                            torn += 1
                            break
        free(misses)
        free(vals)
        return torn

    def relocate_until_stopped(self, const Key[::1] keys):
        """Take the keys out and bring them back, again and again, as a server thread would; all are here in the end."""
        cdef Py_ssize_t i
        cdef uint64_t word
        cdef char* values = <char*>malloc(1 << 16)
        with nogil:
            while not load_i64(&self.stop):
                for i in range(keys.shape[0]):
                    word = latch(self.store, keys[i])
                    word = remove_row(self.store, keys[i], word, epoch_of(self.store, keys[i], word) + 1, values)
                    unlatch(self.store, keys[i], word)
                    word = latch(self.store, keys[i])
                    word = insert_row(self.store, keys[i], away_epoch(word), values)
                    unlatch(self.store, keys[i], word)
                    add_i64(&self.moves, 1)
        free(values)
        return self.moves

    def halt(self):
        store_i64(&self.stop, 1)


def out_of_range(const Key[::1] keys, Key num_keys):
    return first_out_of_range(&keys[0] if keys.shape[0] else NULL, keys.shape[0], num_keys)


def mix(Key key, uint32_t epoch):
    return mix_digest(key, epoch)
