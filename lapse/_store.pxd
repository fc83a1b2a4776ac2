"""The parameters that live on this node: slots, rows, latches.

Design: one 8-byte slot word per key, in memory that is mapped and only touched when a key is. The word is all of a key's
state on this node; whoever changes it, or reads or writes a row, holds its latch bit, except where a line below says otherwise.
Only the server thread removes a key or brings one in, so for that thread a key that is HERE stays HERE without the latch.

    HERE, with a row      pointer to the row | OWNED            the row's header, 8 bytes in front of it, holds the epoch
    HERE, untouched       0, for a key whose home this is       zeros; epoch 0; no row yet
    COMING                pointer to its transfer_t | INCOMING  (in transfer; see _transfers.pxd)
    AWAY                  0, or GONE | epoch << 16              the epoch with which it left
    any of them           | LATCH                               taken by compare-and-swap, held for one row copy

Rows never move while they are owned, and their memory is never given back to the system before the store is freed.
"""
from libc.stdint cimport int32_t, uint32_t, uint64_t
from lapse._sync cimport cas_u64, load_u64, pause, peek_u64, prefetch_write, store_u64, yield_core
from lapse._types cimport Epoch, Key

cdef enum:
    LATCH = 1
    OWNED = 2
    INCOMING = 4

cdef enum:
    SLOT_AHEAD = 24             # positions between the cursor of a batch and the prefetch of a slot word,
    ROW_AHEAD = 12              # and of the row it points to

cdef enum KeyState:
    AWAY
    HERE
    COMING

cdef struct slabs_t             # the rows' memory: size classes, free lists; private to _store.pyx

cdef struct store_t:
    uint64_t* slots             # owned; num_keys words
    Key num_keys
    Key home_begin              # keys whose home is this node: [home_begin, home_end)
    Key home_end
    int dtype                   # ValueType
    int itemsize                # bytes of one number
    size_t uniform_visible      # bytes of every key's visible value; 0: lengths differ per key
    size_t uniform_stored       # bytes of every key's stored row; 0: lengths differ per key
    const uint32_t* visible     # owned; per-key visible lengths in numbers, NULL when uniform
    const uint32_t* stored      # owned; per-key stored lengths in numbers, NULL when uniform
    slabs_t* slabs              # owned


cdef inline size_t visible_bytes(const store_t* s, Key key) noexcept nogil:
    return s.uniform_visible if s.visible == NULL else <size_t>s.visible[key] * s.itemsize


cdef inline size_t stored_bytes(const store_t* s, Key key) noexcept nogil:
    return s.uniform_stored if s.stored == NULL else <size_t>s.stored[key] * s.itemsize


cdef inline uint64_t latch_slot(uint64_t* slot) noexcept nogil:
    """Take the latch of a slot; return its word without the latch bit. Spins briefly, then yields the core."""
    cdef uint64_t word = peek_u64(slot)
    cdef int spins = 0
    while True:
        if not word & LATCH and cas_u64(slot, &word, word | LATCH):
            return word
        pause()
        spins += 1
        if spins > 64:          # threads may outnumber cores: the holder may be waiting for ours
            yield_core()
            spins = 0
        word = peek_u64(slot)


cdef inline uint64_t latch(store_t* s, Key key) noexcept nogil:
    """Take the key's latch, as latch_slot does."""
    return latch_slot(s.slots + key)


cdef inline void unlatch(store_t* s, Key key, uint64_t word) noexcept nogil:
    """Give the latch back, leaving `word` (which has no latch bit) as the key's slot word."""
    store_u64(s.slots + key, word)


cdef inline uint64_t slot_word(const store_t* s, Key key) noexcept nogil:
    """The slot word as it is at this instant, latch bit taken off (acquire; no latch needed)."""
    return load_u64(s.slots + key) & ~<uint64_t>LATCH


cdef inline bint is_home(const store_t* s, Key key) noexcept nogil:
    return s.home_begin <= key < s.home_end


cdef inline KeyState state_of(const store_t* s, Key key, uint64_t word) noexcept nogil:
    """What a slot word (without the latch bit) says of the key."""
    if word & OWNED and not word >> 63:
        return HERE
    if word & INCOMING and not word >> 63:
        return COMING
    if word == 0 and is_home(s, key):
        return HERE
    return AWAY


cdef inline void expect_slot(const store_t* s, Key key) noexcept nogil:
    """Ask the memory for the key's slot word."""
    prefetch_write(s.slots + key)


cdef inline void expect_row(const store_t* s, Key key) noexcept nogil:
    """Ask the memory for the key's row (or its transfer), whose slot word should be there by now. Harmless for any word."""
    cdef size_t at = <size_t>(peek_u64(s.slots + key) & ~<uint64_t>7) - 8          # a number: of 0, no pointer may be made
    cdef size_t end = at + 8 + min(stored_bytes(s, key), <size_t>2048)
    while at < end:
        prefetch_write(<void*>at)
        at += 64
    prefetch_write(<void*>(end - 1))


cdef inline void expect_header(const store_t* s, Key key) noexcept nogil:
    """Ask the memory for the header of the key's row, or for its transfer. Harmless for any word, as expect_row is."""
    prefetch_write(<void*>(<size_t>(peek_u64(s.slots + key) & ~<uint64_t>7) - 8))


cdef inline Epoch away_epoch(uint64_t word) noexcept nogil:
    """The epoch with which an AWAY key left (0: it has never been here)."""
    return <Epoch>(word >> 16)


cdef inline uint64_t incoming_word(void* transfer) noexcept nogil:
    return <uint64_t><size_t>transfer | INCOMING


cdef inline void* transfer_of(uint64_t word) noexcept nogil:
    return <void*><size_t>(word & ~<uint64_t>7)


# --- life -------------------------------------------------------------------------------------------------------------
# NULL when out of memory. The length arrays are copied; visible <= stored for every key; lengths may be 0.
cdef store_t* store_new(Key num_keys, Key home_begin, Key home_end, int dtype, size_t uniform_visible_length,
                        size_t uniform_stored_length, const uint32_t* visible, const uint32_t* stored) noexcept nogil
cdef void store_free(store_t*) noexcept nogil

# --- one key, under its latch: `word` is what latch() returned -----------------------------------------------------------
# The row of a key that is HERE; an untouched key gets a row of zeros first and *word changes. NULL: out of memory.
cdef char* row_of(store_t*, Key key, uint64_t* word) noexcept nogil
# The epoch of a key that is HERE.
cdef Epoch epoch_of(const store_t*, Key key, uint64_t word) noexcept nogil
# Bring a key in with `stored_bytes` of values (NULL: zeros); returns the new slot word, 0 when out of memory.
cdef uint64_t insert_row(store_t*, Key key, Epoch epoch, const void* values) noexcept nogil
# Take a key that is HERE out: its stored values go to `out` (zeros if untouched), its row is freed; returns the new slot
# word, which remembers `epoch`, the one with which the key leaves.
cdef uint64_t remove_row(store_t*, Key key, uint64_t word, Epoch epoch, void* out) noexcept nogil
# The word of a key that passed through without being inserted and left with this epoch.
cdef uint64_t gone_word(Epoch epoch) noexcept nogil
# row[i] += values[i] for the key's visible length.
cdef void add_values(const store_t*, Key key, void* row, const void* values) noexcept nogil

# --- batches: latch each key in turn, prefetching ahead --------------------------------------------------------------------
# Position i of the call has keys[i] and, in `vals`, the i-th run of visible values (runs follow each other without gaps).
# A key that is not HERE is skipped, and its position written to `misses` (room for n). Return the number of misses, or
# -1 when out of memory (push_rows, set_rows: rows for untouched keys).
cdef Py_ssize_t pull_rows(store_t*, const Key* keys, Py_ssize_t n, void* vals, uint32_t* misses) noexcept nogil
cdef Py_ssize_t push_rows(store_t*, const Key* keys, Py_ssize_t n, const void* vals, uint32_t* misses) noexcept nogil
# After its first miss set_rows applies nothing more and reports every later position as missed: among duplicates of one
# call the last one must win, so none may overtake one that has still to be sent.
cdef Py_ssize_t set_rows(store_t*, const Key* keys, Py_ssize_t n, const void* vals, uint32_t* misses) noexcept nogil
# Positions of the keys that are not HERE (for localize); takes no latch.
cdef Py_ssize_t absent_rows(store_t*, const Key* keys, Py_ssize_t n, uint32_t* misses) noexcept nogil

# Sum of the values' bytes (visible) of n keys; used to size messages.
cdef size_t batch_bytes(const store_t*, const Key* keys, Py_ssize_t n) noexcept nogil
# -1 when every key is in [0, num_keys), else the position of the first that is not.
cdef Py_ssize_t first_out_of_range(const Key* keys, Py_ssize_t n, Key num_keys) noexcept nogil

# Digest of the keys that are HERE with epoch > 0, per home node (range partition of `per_home` keys): counts[h] += 1,
# digests[h] ^= mix(key, epoch). For the audit at quiescence. `mix_digest` is the mixing function (64-bit).
cdef void digest_rows(const store_t*, Key per_home, uint64_t* counts, uint64_t* digests) noexcept nogil
cdef uint64_t mix_digest(Key key, Epoch epoch) noexcept nogil
