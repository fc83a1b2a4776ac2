# Design: one pass, one buffer. A word is a run of bytes without blanks (what bytes.split() takes for blanks); nothing is decoded. The
# buffer ends with a newline that is not of the text, so that the inner loops need no check of the end. A vocabulary is a hash table
# of numbers of words; words, counts and hashes lie in arrays. No lock: counting has its vocabulary to itself, and later it is only read.
from libc.errno cimport EINTR, errno
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove
from posix.types cimport off_t
from posix.unistd cimport pread

import os

import numpy as np

cdef enum:
    BUFFER = 1 << 16            # bytes of text in memory
    SLACK = 16                  # readable bytes behind it
    LONGEST = 1000              # bytes of a word; what is longer counts as its first bytes
    MOST_WORDS = 0x7FFFFFF0     # numbers of words have 31 bits

LONGEST_WORD = LONGEST

cdef unsigned char[256] BLANK   # 1 for a blank, 2 for a newline
BLANK[c' '] = BLANK[c'\t'] = BLANK[c'\r'] = BLANK[c'\v'] = BLANK[c'\f'] = 1
BLANK[c'\n'] = 2


# --- reading ---------------------------------------------------------------------------------------------------------------------------

cdef int open_reader(reader_t* r) noexcept nogil:
    r.buffer = <char*>calloc(BUFFER + SLACK, 1)
    return 0 if r.buffer != NULL else -1


cdef void close_reader(reader_t* r) noexcept nogil:
    free(r.buffer)
    r.buffer = NULL


cdef void seek_reader(reader_t* r, int fd, int64_t begin, int64_t stop) noexcept nogil:
    r.fd, r.offset, r.stop = fd, begin, stop
    r.at = r.filled = 0
    r.buffer[0] = c'\n'
    r.inside = False
    r.error = 0


cdef Py_ssize_t refill(reader_t* r, Py_ssize_t kept) noexcept nogil:
    """Keep buffer[kept:filled] and read more behind it; how many bytes there were, or -1."""
    cdef Py_ssize_t got
    cdef size_t want
    memmove(r.buffer, r.buffer + kept, r.filled - kept)
    r.filled -= kept
    want = <size_t>min(BUFFER - r.filled, r.stop - r.offset)
    got = 0
    while want > 0:
        got = pread(r.fd, r.buffer + r.filled, want, <off_t>r.offset)
        if got >= 0 or errno != EINTR:
            break
    if got < 0:
        r.error = errno
        got = -1
    else:
        r.filled += got
        r.offset += got
    r.buffer[r.filled] = c'\n'
    return got


cdef int next_word(reader_t* r, const char** word, int* length) noexcept nogil:
    cdef const unsigned char* text = <const unsigned char*>r.buffer
    cdef Py_ssize_t p = r.at, q, got
    while True:
        if r.inside:
            while not BLANK[text[p]]:
                p += 1
            r.inside = p == r.filled
        while BLANK[text[p]] == 1:
            p += 1
        if text[p] == c'\n':
            if p < r.filled:
                r.at = p + 1
                return A_NEWLINE
            got = refill(r, r.filled)
            p = r.at = 0
            if got <= 0:
                return TEXT_END if got == 0 else READ_ERROR
            continue
        q = p
        while True:
            while not BLANK[text[q]]:
                q += 1
            if q < r.filled or q - p > LONGEST:
                break
            got = refill(r, p)      # the word may go on
            q -= p
            p = 0
            if got < 0:
                return READ_ERROR
            if got == 0:
                break
        r.inside = q == r.filled and q - p > LONGEST
        r.at = q
        word[0] = r.buffer + p
        length[0] = <int>min(q - p, LONGEST)
        return A_WORD


def begin_of(int fd, int64_t position, int64_t size, int64_t near=1 << 16):
    """Return where a range begins that is wanted to begin at `position` of a text of `size` bytes: behind a newline if there is one
    near, else behind the next blank. The end of one range is the beginning of the next, so each word is in one."""
    if position <= 0:
        return 0
    at = position - 1
    block = os.pread(fd, min(near, size - at), at)
    newline = block.find(b"\n")
    if newline >= 0:
        return at + newline + 1
    while block:
        found = [place for place in map(block.find, (b" ", b"\t", b"\r", b"\v", b"\f", b"\n")) if place >= 0]
        if found:
            return at + min(found) + 1
        at += len(block)
        block = os.pread(fd, max(min(near, size - at), 0), at)
    return size


# --- the vocabulary ----------------------------------------------------------------------------------------------------------------------

cdef uint64_t hash_of(const char* word, int length) noexcept nogil:
    """A hash of the bytes; up to 7 bytes behind the word are read, and do not count."""
    cdef uint64_t h = <uint64_t>length * <uint64_t>0x9E3779B97F4A7C15, part
    while length >= 8:
        memcpy(&part, word, 8)
        h = (h ^ part) * <uint64_t>0xBF58476D1CE4E5B9
        h ^= h >> 32
        word += 8
        length -= 8
    if length > 0:
        part = 0
        memcpy(&part, word, 8)
        part = part & ((<uint64_t>1 << (8 * length)) - 1)
        h = (h ^ part) * <uint64_t>0xBF58476D1CE4E5B9
        h ^= h >> 32
    h *= <uint64_t>0x94D049BB133111EB
    return h ^ (h >> 31)


cdef class Vocabulary:
    """Words and how often they occur. Word 0 is the most frequent one once `keep` has been called."""

    def __cinit__(self):
        self.mask = 1023
        self.table = <uint64_t*>calloc(self.mask + 1, sizeof(uint64_t))
        if self.table == NULL or self.reserve(512, 4096) < 0:
            raise MemoryError("the vocabulary")
        self.offsets[0] = 0

    def __dealloc__(self):
        free(self.counts)
        free(self.hashes)
        free(self.offsets)
        free(self.text)
        free(self.table)

    def __len__(self):
        return self.size

    cdef int reserve(self, Py_ssize_t words, int64_t text) noexcept nogil:
        """Room for so many words and bytes of them; -1: out of memory."""
        cdef void* p
        if words > self.room:
            p = realloc(self.counts, words * sizeof(int64_t))
            if p == NULL:
                return -1
            self.counts = <int64_t*>p
            p = realloc(self.hashes, words * sizeof(uint64_t))
            if p == NULL:
                return -1
            self.hashes = <uint64_t*>p
            p = realloc(self.offsets, (words + 1) * sizeof(int64_t))
            if p == NULL:
                return -1
            self.offsets = <int64_t*>p
            self.room = words
        if text > self.text_room:
            p = realloc(self.text, text + SLACK)
            if p == NULL:
                return -1
            self.text = <char*>p
            self.text_room = text
        return 0

    cdef void enter(self, Py_ssize_t word) noexcept nogil:
        cdef uint64_t h = self.hashes[word], at = h & self.mask
        while self.table[at]:
            at = (at + 1) & self.mask
        self.table[at] = (h >> 32 << 32) | <uint64_t>(word + 1)

    cdef int grow(self) noexcept nogil:
        """Twice as large a table."""
        cdef uint64_t* table = <uint64_t*>calloc(2 * (self.mask + 1), sizeof(uint64_t))
        cdef Py_ssize_t i
        if table == NULL:
            return -1
        free(self.table)
        self.table = table
        self.mask = 2 * self.mask + 1
        for i in range(self.size):
            self.enter(i)
        return 0

    cdef int32_t find(self, const char* word, int length, uint64_t hash_) noexcept nogil:
        cdef uint64_t at = hash_ & self.mask, entry
        cdef int64_t begin
        cdef int32_t number
        while True:
            entry = self.table[at]
            if entry == 0:
                return -1
            if entry >> 32 == hash_ >> 32:
                number = <int32_t><uint32_t>entry - 1
                begin = self.offsets[number]
                if self.offsets[number + 1] - begin == length and memcmp(self.text + begin, word, length) == 0:
                    return number
            at = (at + 1) & self.mask

    cdef int insert(self, const char* word, int length, uint64_t hash_, int64_t count) noexcept nogil:
        """A word that is not there yet; -1: out of memory."""
        cdef int64_t end = self.offsets[self.size]
        if self.size >= MOST_WORDS or (self.size == self.room and self.reserve(2 * self.room, 0) < 0):
            return -1
        if end + length > self.text_room and self.reserve(0, 2 * self.text_room + length) < 0:
            return -1
        memcpy(self.text + end, word, length)
        self.offsets[self.size + 1] = end + length
        self.counts[self.size] = count
        self.hashes[self.size] = hash_
        self.enter(self.size)
        self.size += 1
        return self.grow() if <uint64_t>self.size > self.mask // 2 else 0

    cdef int64_t count_range(self, reader_t* r) noexcept nogil:
        """Count the words of a range; how many, or -1 (out of memory, or reader.error)."""
        cdef const char* word
        cdef int length, found
        cdef int32_t number
        cdef uint64_t h
        cdef int64_t words = 0
        while True:
            found = next_word(r, &word, &length)
            if found == A_WORD:
                h = hash_of(word, length)
                number = self.find(word, length, h)
                if number >= 0:
                    self.counts[number] += 1
                elif self.insert(word, length, h, 1) < 0:
                    return -1
                words += 1
            elif found != A_NEWLINE:
                return words if found == TEXT_END else -1

    def count(self, int fd, int64_t begin, int64_t end):
        """Count the words of a range of an open file; return how many. OSError when it cannot be read."""
        cdef reader_t r
        cdef int64_t words
        r.buffer = NULL
        if open_reader(&r) < 0:
            raise MemoryError("the vocabulary")
        with nogil:
            seek_reader(&r, fd, begin, end)
            words = self.count_range(&r)
            close_reader(&r)
        if words < 0:
            if r.error:
                raise OSError(r.error, os.strerror(r.error))
            raise MemoryError("the vocabulary")
        self.total += words
        return words

    def add(self, bytes word, int64_t count):
        """Add a word; return whether it is new."""
        cdef bytes padded = word + bytes(8)
        cdef const char* text = padded
        cdef int length = <int>min(len(word), LONGEST)
        cdef uint64_t h = hash_of(text, length)
        if self.find(text, length, h) >= 0:
            return False
        if self.insert(text, length, h, count) < 0:
            raise MemoryError("the vocabulary")
        self.total += count
        return True

    def keep(self, int64_t min_count):
        """Return a vocabulary of the words that occur so often, by falling count, and by their bytes where counts are equal."""
        cdef Vocabulary kept = Vocabulary()
        cdef Py_ssize_t i
        cdef list chosen = []
        for i in range(self.size):
            if self.counts[i] >= min_count:
                chosen.append((-self.counts[i], self.word(i)))
        chosen.sort()
        for less, word in chosen:
            kept.add(word, -less)
        return kept

    cpdef bytes word(self, Py_ssize_t number):
        """Return the bytes of a word."""
        if not 0 <= number < self.size:
            raise IndexError(number)
        return self.text[self.offsets[number]:self.offsets[number + 1]]

    def number(self, bytes word):
        """Return the number of a word, or -1."""
        cdef bytes padded = word + bytes(8)
        return self.find(padded, <int>min(len(word), LONGEST), hash_of(padded, <int>min(len(word), LONGEST)))

    def frequencies(self):
        """Return the counts as an array of int64."""
        counts = np.empty(self.size, dtype=np.int64)
        cdef int64_t[::1] view = counts
        cdef Py_ssize_t i
        for i in range(self.size):
            view[i] = self.counts[i]
        return counts
