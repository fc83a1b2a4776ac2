"""The training loop of one worker: what lies in memory between the text and the parameters."""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from apps.w2v._arithmetic cimport arithmetic_t
from apps.w2v._text cimport Vocabulary, reader_t
from lapse cimport Key, Timestamp, Worker, sight_t

# A word of a sentence, and its window: the words around it at a distance of up to `reach`.
cdef struct token_t:
    int32_t word
    int32_t reach
    int32_t begin, end          # its sentence is tokens[begin:end]

# Windows that are made ready together
cdef struct chunk_t:
    Py_ssize_t end              # behind the last token
    Timestamp localized
    int64_t samples             # handle

# Output vectors for one input vector that are not all here: pulled, trained against, and what they change by is pushed.
cdef struct errand_t:
    Timestamp pulled
    int n                       # of keys: that of the input vector, those of the output vectors
    bint positive
    double alpha
    Key[17] keys
    char* values                # n rows, and behind 17 of them what they change by


cdef class Trainer:
    cdef:
        Worker worker
        sight_t sight           # of its node's rows, for hints to the processor
        bint sees
        Vocabulary vocabulary
        const arithmetic_t* arith
        size_t dim, bytes       # numbers and bytes of a vector
        int window, negative
        bint localize, sync_push
        Py_ssize_t ahead, peek, chunk
        double starting_alpha, alpha
        public double lowest_alpha      # the learning rate falls no further
        const Key* places       # where the input vector of a word is, and its output vector
        uint32_t* keep          # owned; per word: it stays in its sentence if 32 random bits are not above
        reader_t reader
        uint64_t random
        int64_t range_begin, range_end, share           # of the text; words of an iteration at most
        double progress_begin, progress_width           # of the job's schedule: this iteration's part
        # tokens[at:ready] have their windows' samples, tokens[:localized] have been asked for, tokens[:filled] are read
        token_t* tokens         # owned
        Py_ssize_t room, at, ready, localized, filled
        bint at_end             # nothing more to read
        chunk_t* chunks         # owned; a ring
        Py_ssize_t num_chunks, first_chunk, open_chunks, drawn_chunk
        Key* wanted             # owned; keys to localize
        Key* samples            # owned; two windows' draws, in turn
        Py_ssize_t samples_each
        Py_ssize_t drawn        # windows of tokens[:drawn] have their draws
        int turn                # the draws of the window at `at`: samples + turn * samples_each
        char* centre            # owned; the output vector of the window's word: as it is now, and behind it as it was
        errand_t* errands       # owned; a ring
        char* errand_values     # owned
        Py_ssize_t first_errand, open_errands
        object held             # what pointers point into
        readonly int64_t words          # of the vocabulary that were read in this iteration
        readonly int64_t read           # words that were read in this iteration
        readonly int64_t trained        # that were left by subsampling
        readonly int64_t pairs
        readonly int64_t targets        # output vectors of all pairs
        readonly double loss            # sum over them
    cdef void set_alpha(self) noexcept nogil
    cdef int read_sentence(self) noexcept nogil
    cdef void make_room(self) noexcept nogil
    cdef int fill(self) noexcept nogil
    cdef Py_ssize_t draws_of(self, Py_ssize_t i) noexcept nogil
    cdef int prepare_chunk(self) noexcept nogil
    cdef int draw_window(self) noexcept nogil
    cdef void prefetch(self, const Key* keys, Py_ssize_t n) noexcept nogil
    cdef int train_window(self) noexcept nogil
    cdef int train_pair(self, Key input, Key output, const Key* draws) noexcept nogil
    cdef int train_group(self, Key input, Key output, const Key* draws, int n, bint positive) noexcept nogil
    cdef int send_errand(self, const Key* keys, int n, bint positive) noexcept nogil
    cdef int end_errand(self) noexcept nogil
    cdef int end_errands(self, bint all_) noexcept nogil
    cdef int add_centre(self, Key output) noexcept nogil
    cdef int next_window(self) noexcept nogil
