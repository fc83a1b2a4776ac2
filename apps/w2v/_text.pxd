"""Words out of a text as it streams by, and the vocabulary that knows them."""
from libc.stdint cimport int32_t, int64_t, uint64_t

# What next_word has found
cdef enum:
    TEXT_END = 0
    A_WORD = 1
    A_NEWLINE = 2
    READ_ERROR = -1             # errno is in reader.error

cdef struct reader_t:
    int fd                      # borrowed
    char* buffer                # owned
    Py_ssize_t at, filled       # what has still to be looked at: buffer[at:filled]
    int64_t offset              # of the file, behind what is in the buffer
    int64_t stop                # offset at which the range ends
    bint inside                 # of a word that was too long, and has been given out already
    int error

cdef int open_reader(reader_t* r) noexcept nogil            # 0, or -1: out of memory. `buffer` must be NULL
cdef void close_reader(reader_t* r) noexcept nogil
# Begin a range of the file, which must begin and end between words.
cdef void seek_reader(reader_t* r, int fd, int64_t begin, int64_t stop) noexcept nogil
# The next word or newline. A word is valid until the next call; some bytes behind it may be read.
cdef int next_word(reader_t* r, const char** word, int* length) noexcept nogil


cdef class Vocabulary:
    cdef:
        Py_ssize_t size, room
        int64_t* counts         # owned; per word
        uint64_t* hashes        # owned; per word
        int64_t* offsets        # owned; of each word in `text`, and behind the last
        char* text              # owned; the words, one behind the other
        int64_t text_room
        uint64_t* table         # owned; open addressing: 32 bits of the hash, number of the word + 1 below them; 0: free
        uint64_t mask
        readonly int64_t total  # words of the text, each as often as it occurs; `keep` leaves those of the words kept
    cdef int32_t find(self, const char* word, int length, uint64_t hash_) noexcept nogil       # -1: it is not there
    cdef int insert(self, const char* word, int length, uint64_t hash_, int64_t count) noexcept nogil
    cdef int grow(self) noexcept nogil
    cdef void enter(self, Py_ssize_t word) noexcept nogil
    cdef int64_t count_range(self, reader_t* r) noexcept nogil
    cdef int reserve(self, Py_ssize_t words, int64_t text) noexcept nogil
    cpdef bytes word(self, Py_ssize_t number)


cdef uint64_t hash_of(const char* word, int length) noexcept nogil
