"""Who owns the keys whose home is this node, and (optional) a guess at the owner of all others.

Design: one 8-byte word per key homed here, mapped lazily; 0 is a key that has never moved: owned by this node, epoch 0. Words are read
without a lock and re-checked under the lock of the channel to the owner they name; only whoever holds that lock, or (when the
owner named is this node) the server thread, changes them. The location cache is one 2-byte word per key of the key space, used by workers
only, relaxed: a guess may be stale, the protocol makes that harmless.
"""
from libc.stdint cimport uint16_t, uint64_t
from lapse._sync cimport load_u64, peek_u16, poke_u16, prefetch_write, store_u64
from lapse._types cimport Epoch, Key, Rank

cdef struct directory_t:
    uint64_t* words             # owned; one per key homed here: (owner + 1) << 32 | epoch, or 0
    uint16_t* cache             # owned; one per key: rank + 1, 0 = no guess; NULL when location caches are off
    Key num_keys
    Key per_home                # ceil(num_keys / num_nodes): key's home is key // per_home
    Key home_begin, home_end    # keys homed here
    Rank me


cdef inline Rank home_of(const directory_t* d, Key key) noexcept nogil:
    return <Rank>(key // d.per_home)


cdef inline Rank owner_of(const directory_t* d, Key key) noexcept nogil:
    """The owner of a key homed here."""
    cdef uint64_t word = load_u64(d.words + (key - d.home_begin))
    return d.me if word == 0 else <Rank>(word >> 32) - 1


cdef inline void expect_owner(const directory_t* d, Key key) noexcept nogil:
    """Ask the memory for the key's entry (harmless for a key homed elsewhere)."""
    prefetch_write(d.words + (key - d.home_begin))


cdef inline Epoch directory_epoch(const directory_t* d, Key key) noexcept nogil:
    return <Epoch>load_u64(d.words + (key - d.home_begin))


cdef inline void set_owner(directory_t* d, Key key, Rank owner, Epoch epoch) noexcept nogil:
    store_u64(d.words + (key - d.home_begin), (<uint64_t>(owner + 1) << 32) | epoch)


cdef inline Rank cached_owner(const directory_t* d, Key key) noexcept nogil:
    """A guess, or -1."""
    return -1 if d.cache == NULL else <Rank>peek_u16(d.cache + key) - 1


cdef inline void remember_owner(directory_t* d, Key key, Rank owner) noexcept nogil:
    """Note a guess (never this node itself, never for keys homed here: their directory is exact)."""
    if d.cache != NULL and not d.home_begin <= key < d.home_end:
        poke_u16(d.cache + key, 0 if owner == d.me else <uint16_t>(owner + 1))


cdef directory_t* directory_new(Key num_keys, Rank me, Rank num_nodes, bint caches) noexcept nogil   # NULL: out of memory
cdef void directory_free(directory_t*) noexcept nogil
# Per owner: how many of the keys homed here it has by the directory (epoch > 0), and the xor of their mixed key and epoch.
cdef void digest_directory(const directory_t*, uint64_t* counts, uint64_t* digests) noexcept nogil
