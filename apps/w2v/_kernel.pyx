# Design: one Trainer per worker thread. Sentences are read into a buffer of tokens, some windows ahead of the one that is trained;
# ahead, too, the vectors of their words are localized and their negatives prepared, chunk by chunk. A window is the C program's: each word
# around the word in the middle is an input vector, trained against the output vectors of the word in the middle and of those drawn for
# this pair alone. Rows that are here change in place. What is not here goes into an errand: pulled while training goes on, trained when it has come,
# and pushed. The output vector of the word in the middle is copied once a window, and what it has changed by is added at its end.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove

from apps.common._random cimport below, draw
from apps.w2v._arithmetic cimport arithmetic, fill_table
from apps.w2v._text cimport (A_NEWLINE, A_WORD, TEXT_END, Vocabulary, close_reader, hash_of, next_word, open_reader, seek_reader)
from lapse cimport DONE, Key, Timestamp, Worker, look, prefetch_row, prefetch_slot

import os

import numpy as np

cdef enum:
    LONGEST_SENTENCE = 1000     # words
    ERRANDS = 64                # of a worker, under way at once
    ERRAND_KEYS = 17
    GROUP = 15                  # output vectors that are trained at once: with the input vector no more than acquire takes
    READING_FAILED = -1000      # a result beside lapse's codes: reader.error says why

cdef int64_t FOREVER = 0x7FFFFFFFFFFFFFFF
cdef uint32_t ALWAYS = 0xFFFFFFFF

MOST_WORDS_OF_A_SENTENCE = LONGEST_SENTENCE
fill_table()


cdef class Trainer:
    """One worker's share of a text: `begin_iteration`, then `train` until it returns True.

    places: int64, 2 per word: the keys of its input and output vector. seed: of windows, subsampling and negatives. share: words of
    the vocabulary to train on in an iteration, None: all of the range. replacement: negatives of a window may be equal, so that those of
    several are one sample. instructions: see `arithmetic`.
    """

    def __cinit__(self, Worker worker, Vocabulary vocabulary, places, *, int dim, bint double_precision, int window, int negative,
                  double subsample, double alpha, uint64_t seed, Py_ssize_t ahead=10, Py_ssize_t peek=0, bint localize=True,
                  bint sync_push=True, bint replacement=True, int instructions=2):
        cdef Key[::1] view = np.ascontiguousarray(places, dtype=np.int64)
        cdef Py_ssize_t i, words = len(vocabulary)
        cdef double threshold, ratio, kept
        if len(view) != 2 * words or dim < 1 or window < 1 or negative < 0 or words < 1:
            raise ValueError("a trainer of no words, or with the wrong number of keys")
        self.worker, self.vocabulary = worker, vocabulary
        self.sees = look(worker, &self.sight)
        self.arith = arithmetic(double_precision, instructions)
        self.dim = dim
        self.bytes = dim * (8 if double_precision else 4)
        self.window, self.negative = window, negative
        self.localize, self.sync_push = localize, sync_push
        self.ahead, self.peek = ahead, peek
        self.chunk = min(max((ahead + 1) // 2, 1), 64) if replacement else 1
        self.starting_alpha = self.alpha = alpha
        self.lowest_alpha = alpha * 1e-4
        self.random = seed
        self.held = np.asarray(view)
        self.places = &view[0]
        self.allocate(words)
        threshold = subsample * vocabulary.total
        for i in range(words):
            if threshold > 0:
                ratio = threshold / vocabulary.counts[i]
                kept = ratio + ratio ** 0.5
            else:
                kept = 1
            self.keep[i] = ALWAYS if kept >= 1 else <uint32_t>(kept * 0xFFFFFFFF)

    def allocate(self, Py_ssize_t words):
        cdef Py_ssize_t i
        self.room = 2 * (self.ahead + self.chunk + self.window + self.peek) + 4 * LONGEST_SENTENCE
        self.tokens = <token_t*>malloc(self.room * sizeof(token_t))
        self.num_chunks = (self.ahead + 1) // self.chunk + 3
        self.chunks = <chunk_t*>malloc(self.num_chunks * sizeof(chunk_t))
        self.wanted = <Key*>malloc(2 * self.room * sizeof(Key))
        self.samples_each = 2 * <Py_ssize_t>self.window * self.negative
        self.samples = <Key*>malloc((2 * self.samples_each + 1) * sizeof(Key))
        self.keep = <uint32_t*>malloc(words * sizeof(uint32_t))
        self.centre = <char*>malloc(2 * self.bytes)
        self.errands = <errand_t*>calloc(ERRANDS, sizeof(errand_t))
        self.errand_values = <char*>malloc(ERRANDS * 2 * ERRAND_KEYS * self.bytes)
        if (self.tokens == NULL or self.chunks == NULL or self.wanted == NULL or self.samples == NULL or self.keep == NULL
                or self.centre == NULL or self.errands == NULL or self.errand_values == NULL or open_reader(&self.reader) < 0):
            raise MemoryError("a worker's tables")
        for i in range(ERRANDS):
            self.errands[i].values = self.errand_values + i * 2 * ERRAND_KEYS * self.bytes

    def __dealloc__(self):
        close_reader(&self.reader)
        free(self.tokens)
        free(self.chunks)
        free(self.wanted)
        free(self.samples)
        free(self.keep)
        free(self.centre)
        free(self.errands)
        free(self.errand_values)

    # --- reading

    def begin_iteration(self, int fd, int64_t begin, int64_t end, double progress, double width, share=None):
        """Start on a range of the text. The learning rate falls as the schedule goes from `progress` to `progress` + `width` of 1."""
        self.range_begin, self.range_end = begin, end
        self.share = FOREVER if share is None else share
        self.progress_begin, self.progress_width = progress, width
        self.words = self.read = self.trained = self.pairs = self.targets = 0
        self.loss = 0
        self.at = self.ready = self.localized = self.filled = self.drawn = 0
        self.first_chunk = self.open_chunks = self.drawn_chunk = 0
        self.at_end = self.share == 0
        seek_reader(&self.reader, fd, begin, end)
        self.set_alpha()

    cdef void set_alpha(self) noexcept nogil:
        """The learning rate of where the reader is: it falls in a straight line, over all iterations."""
        cdef double part = 0
        if self.share != FOREVER:
            part = self.words / <double>max(self.share, 1)
        elif self.range_end > self.range_begin:
            part = (self.reader.offset - self.reader.filled + self.reader.at - self.range_begin) / <double>(
                self.range_end - self.range_begin)
        part = self.starting_alpha * (1 - self.progress_begin - self.progress_width * part)
        self.alpha = max(part, self.lowest_alpha)

    cdef int read_sentence(self) noexcept nogil:
        """Read a sentence, or what is left of one that is too long; there must be room for it."""
        cdef token_t* tokens = self.tokens
        cdef Py_ssize_t begin = self.filled, end = begin, i
        cdef const char* text
        cdef int length, found
        cdef int32_t word
        while end - begin < LONGEST_SENTENCE:
            if self.words >= self.share:
                self.at_end = True
                break
            found = next_word(&self.reader, &text, &length)
            if found == A_WORD:
                self.read += 1
                word = self.vocabulary.find(text, length, hash_of(text, length))
                if word < 0:
                    continue
                self.words += 1
                if self.keep[word] != ALWAYS and <uint32_t>(draw(&self.random) >> 32) > self.keep[word]:
                    continue
                tokens[end].word = word
                end += 1
            elif found == A_NEWLINE:
                break
            elif found == TEXT_END:
                self.at_end = True
                break
            else:
                return READING_FAILED
        self.trained += end - begin
        if end - begin > 1:             # a word alone has no window
            for i in range(begin, end):
                tokens[i].begin, tokens[i].end = <int32_t>begin, <int32_t>end
                tokens[i].reach = 1 + <int32_t>below(&self.random, self.window)
            self.filled = end
        self.set_alpha()
        return 0

    cdef void make_room(self) noexcept nogil:
        """Move what is needed to the front of the buffer."""
        cdef Py_ssize_t base = self.tokens[self.at].begin if self.at < self.filled else self.filled, i
        if base == 0:
            return
        memmove(self.tokens, self.tokens + base, (self.filled - base) * sizeof(token_t))
        self.at -= base
        self.ready -= base
        self.localized -= base
        self.drawn -= base
        self.filled -= base
        for i in range(self.filled):
            self.tokens[i].begin -= <int32_t>base
            self.tokens[i].end -= <int32_t>base
        for i in range(self.open_chunks):
            self.chunks[(self.first_chunk + i) % self.num_chunks].end -= base

    cdef int fill(self) noexcept nogil:
        """Read as far ahead as the next chunks need."""
        cdef int rc
        while not self.at_end and self.filled - self.at <= self.ahead + self.chunk + self.window + self.peek:
            if self.filled + LONGEST_SENTENCE > self.room:
                self.make_room()
            rc = self.read_sentence()
            if rc < 0:
                return rc
        return 0

    # --- ahead

    cdef Py_ssize_t draws_of(self, Py_ssize_t i) noexcept nogil:
        """How many negatives the window of token i takes."""
        cdef const token_t* t = self.tokens + i
        return (min(i + t.reach, <Py_ssize_t>t.end - 1) - max(i - t.reach, <Py_ssize_t>t.begin)) * self.negative

    cdef int prepare_chunk(self) noexcept nogil:
        """Prepare the samples of the next windows, and localize what they need."""
        cdef Py_ssize_t end = min(self.ready + self.chunk, self.filled), i, last = self.localized, n = 0
        cdef const token_t* t
        cdef int64_t draws = 0
        cdef chunk_t* chunk = self.chunks + (self.first_chunk + self.open_chunks) % self.num_chunks
        for i in range(self.ready, end):
            draws += self.draws_of(i)
        chunk.end = end
        chunk.localized = DONE
        chunk.samples = self.worker.prepare_sample(draws) if draws > 0 else 0
        if chunk.samples < 0:
            return <int>chunk.samples
        self.open_chunks += 1
        if self.localize:
            t = self.tokens + end - 1
            last = min(end + self.window, <Py_ssize_t>t.end)
            if self.peek > 0:
                last = max(last, min(<Py_ssize_t>t.end + self.peek, self.filled))
            for i in range(self.localized, last):
                self.wanted[n] = self.places[2 * self.tokens[i].word]
                self.wanted[n + 1] = self.places[2 * self.tokens[i].word + 1]
                n += 2
            self.localized = max(last, self.localized)
            if n > 0:
                chunk.localized = self.worker.localize(self.wanted, n)
                if chunk.localized < DONE:
                    return <int>chunk.localized
        self.ready = end
        return 0

    cdef int draw_window(self) noexcept nogil:
        """Draw the negatives of the next window."""
        cdef chunk_t* chunk = self.chunks + (self.first_chunk + self.drawn_chunk) % self.num_chunks
        cdef Key* to = self.samples + (self.turn if self.drawn == self.at else 1 - self.turn) * self.samples_each
        cdef Py_ssize_t n = self.draws_of(self.drawn), i
        cdef int rc = self.worker.draw_sample(chunk.samples, to, n) if n > 0 else 0
        if rc < 0:
            return rc
        if self.sees:
            for i in range(n):
                prefetch_slot(&self.sight, to[i])
        self.drawn += 1
        if self.drawn == chunk.end:
            self.drawn_chunk += 1
        return 0

    cdef void prefetch(self, const Key* keys, Py_ssize_t n) noexcept nogil:
        cdef Py_ssize_t i
        if self.sees:
            for i in range(n):
                prefetch_row(&self.sight, keys[i], self.bytes)

    # --- training

    cdef int train_window(self) noexcept nogil:
        """Train on the window of token `at`."""
        cdef const token_t* t = self.tokens + self.at
        cdef Py_ssize_t first = max(self.at - t.reach, <Py_ssize_t>t.begin), i
        cdef Py_ssize_t last = min(self.at + t.reach, <Py_ssize_t>t.end - 1)
        cdef Key output = self.places[2 * t.word + 1]
        cdef const Key* draws = self.samples + self.turn * self.samples_each
        cdef void* row
        cdef int rc = self.worker.acquire(&output, 1, &row)
        if rc < 0:
            return rc
        if row != NULL:
            memcpy(self.centre, row, self.bytes)
        self.worker.release(0)
        if row == NULL:
            rc = self.worker.wait(self.worker.pull(&output, 1, self.centre))
            if rc < 0:
                return rc
        memcpy(self.centre + self.bytes, self.centre, self.bytes)
        for i in range(first, last + 1):
            if i != self.at:
                if i < last:
                    self.prefetch(draws + self.negative, self.negative)
                elif self.drawn > self.at + 1:
                    self.prefetch(self.samples + (1 - self.turn) * self.samples_each, self.negative)
                rc = self.train_pair(self.places[2 * self.tokens[i].word], output, draws)
                if rc < 0:
                    return rc
                draws += self.negative
        return self.add_centre(output)

    cdef int add_centre(self, Key output) noexcept nogil:
        """Add what the output vector of the word in the middle has changed by."""
        cdef void* row
        cdef Timestamp ts
        cdef int rc = self.worker.acquire(&output, 1, &row)
        if rc == 1:
            self.arith.shift(row, self.centre, self.centre + self.bytes, self.dim)
            return self.worker.release(1)
        if rc < 0:
            return rc
        self.worker.release(0)
        self.arith.subtract(self.centre, self.centre + self.bytes, self.dim)
        ts = self.worker.push(&output, 1, self.centre)
        if ts < DONE:
            return <int>ts
        return self.worker.wait(ts) if self.sync_push else 0

    cdef int train_pair(self, Key input, Key output, const Key* draws) noexcept nogil:
        """Train an input vector against the output vector of the word in the middle and those drawn, but for the same one."""
        cdef Key[GROUP] keys
        cdef int i, n = 0, rc
        cdef bint positive = True
        for i in range(self.negative):
            if draws[i] != output:
                keys[n] = draws[i]
                n += 1
                if n == GROUP:
                    rc = self.train_group(input, output, keys, n, positive)
                    if rc < 0:
                        return rc
                    n = 0
                    positive = False
        self.pairs += 1
        return self.train_group(input, output, keys, n, positive) if n > 0 or positive else 0

    cdef int train_group(self, Key input, Key output, const Key* draws, int n, bint positive) noexcept nogil:
        cdef Key[ERRAND_KEYS] keys
        cdef void* found[GROUP + 1]
        cdef void* rows[GROUP + 1]
        cdef uint32_t changed = 1
        cdef int i, here, missing = 1, m = 0
        keys[0] = input
        for i in range(n):
            keys[1 + i] = draws[i]
        here = self.worker.acquire(keys, n + 1, found)
        if here < 0:
            return here
        if found[0] == NULL:
            self.worker.release(0)
            if positive:
                keys[1] = output
                for i in range(n):
                    keys[2 + i] = draws[i]
            return self.send_errand(keys, n + 1 + positive, positive)
        rows[0] = self.centre
        m = positive
        for i in range(1, n + 1):
            if found[i] != NULL:
                rows[m] = found[i]
                m += 1
                changed |= <uint32_t>1 << i
            else:
                keys[missing] = keys[i]
                missing += 1
        self.targets += m
        self.loss += self.arith.step(found[0], rows, m, self.dim, self.alpha, positive)
        self.worker.release(changed)
        return self.send_errand(keys, missing, False) if missing > 1 else 0

    # --- what is not here

    cdef int send_errand(self, const Key* keys, int n, bint positive) noexcept nogil:
        """Pull an input vector and the output vectors behind it, to train when they are here."""
        cdef errand_t* errand
        cdef int rc
        if self.open_errands == ERRANDS:
            rc = self.end_errand()
            if rc < 0:
                return rc
        errand = self.errands + (self.first_errand + self.open_errands) % ERRANDS
        memcpy(errand.keys, keys, n * sizeof(Key))
        errand.n, errand.positive, errand.alpha = n, positive, self.alpha
        errand.pulled = self.worker.pull(keys, n, errand.values)
        if errand.pulled < DONE:
            return <int>errand.pulled
        self.open_errands += 1
        return 0

    cdef int end_errand(self) noexcept nogil:
        """Wait for the oldest errand's values, train, push the changes."""
        cdef errand_t* errand = self.errands + self.first_errand
        cdef void* rows[ERRAND_KEYS]
        cdef char* before = errand.values + ERRAND_KEYS * self.bytes
        cdef Timestamp ts
        cdef int i, rc = self.worker.wait(errand.pulled)
        if rc < 0:
            return rc
        self.first_errand = (self.first_errand + 1) % ERRANDS
        self.open_errands -= 1
        memcpy(before, errand.values, errand.n * self.bytes)
        for i in range(1, errand.n):
            rows[i - 1] = errand.values + i * self.bytes
        self.targets += errand.n - 1
        self.loss += self.arith.step(errand.values, rows, errand.n - 1, self.dim, errand.alpha, errand.positive)
        self.arith.subtract(errand.values, before, errand.n * self.dim)
        ts = self.worker.push(errand.keys, errand.n, errand.values)
        if ts < DONE:
            return <int>ts
        return self.worker.wait(ts) if self.sync_push else 0

    cdef int end_errands(self, bint all_) noexcept nogil:
        """End those whose values have come, or all."""
        cdef int rc
        while self.open_errands > 0:
            if not all_:
                rc = self.worker.is_finished(self.errands[self.first_errand].pulled)
                if rc <= 0:
                    return rc
            rc = self.end_errand()
            if rc < 0:
                return rc
        return 0

    cdef int next_window(self) noexcept nogil:
        """Make ready and train the next window. 1, 0 when there is none any more, or what went wrong."""
        cdef chunk_t* chunk
        cdef int rc = self.fill()
        while rc == 0 and self.ready < self.filled and self.ready <= self.at + self.ahead:
            rc = self.prepare_chunk()
        if rc < 0 or self.at == self.filled:
            return rc
        chunk = self.chunks + self.first_chunk
        if chunk.localized >= 0:
            rc = self.worker.wait(chunk.localized)
            chunk.localized = DONE
        while rc == 0 and self.drawn < min(self.at + 2, self.ready):
            rc = self.draw_window()
        if rc == 0:
            rc = self.train_window()
        if rc == 0 and self.open_errands > 0:
            rc = self.end_errands(False)
        if rc < 0:
            return rc
        self.at += 1
        self.turn = 1 - self.turn
        if self.at == chunk.end:
            self.first_chunk = (self.first_chunk + 1) % self.num_chunks
            self.open_chunks -= 1
            self.drawn_chunk -= 1
        return 1

    def train(self, int64_t words):
        """Train until so many more words have been read; 1, or 0 when the range has been trained on, or the code of what went wrong."""
        cdef int64_t until = self.read + words
        cdef int rc = 1
        with nogil:
            while rc == 1 and self.read < until:
                rc = self.next_window()
            if rc == 0:
                rc = self.end_errands(True)
        if rc == READING_FAILED:
            raise OSError(self.reader.error, os.strerror(self.reader.error))
        return rc

    def give_up(self):
        """End the iteration before the end of the range: what is under way still counts. Return as `train` does."""
        cdef int rc
        with nogil:
            rc = self.end_errands(True)
            while rc == 0 and self.drawn_chunk < self.open_chunks and self.negative > 0:
                rc = self.worker.finish_sample(self.chunks[(self.first_chunk + self.drawn_chunk) % self.num_chunks].samples)
                self.drawn_chunk += 1
        return rc

    @property
    def learning_rate(self):
        return self.alpha
