# Design: see _directory.pxd. Both tables are anonymous mappings: a key that never moves costs no memory here.
from libc.stdlib cimport calloc, free
from lapse._store cimport mix_digest

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void*, size_t, int, int, int, long)
    int munmap(void*, size_t)
    void* MAP_FAILED
    int MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE


cdef void* _map(size_t size) noexcept nogil:
    cdef void* p
    if size == 0:
        size = 1
    p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    return NULL if p == MAP_FAILED else p


cdef void _unmap(void* p, size_t size) noexcept nogil:
    if p != NULL:
        munmap(p, size if size else 1)


cdef directory_t* directory_new(Key num_keys, Rank me, Rank num_nodes, bint caches) noexcept nogil:
    cdef directory_t* d = <directory_t*>calloc(1, sizeof(directory_t))
    if d == NULL:
        return NULL
    d.num_keys = num_keys
    d.me = me
    d.per_home = (num_keys + num_nodes - 1) // num_nodes
    d.home_begin = min(me * d.per_home, num_keys)
    d.home_end = min(d.home_begin + d.per_home, num_keys)
    d.words = <uint64_t*>_map((d.home_end - d.home_begin) * sizeof(uint64_t))
    if caches:
        d.cache = <uint16_t*>_map(num_keys * sizeof(uint16_t))
    if d.words == NULL or (caches and d.cache == NULL):
        directory_free(d)
        return NULL
    return d


cdef void directory_free(directory_t* d) noexcept nogil:
    if d != NULL:
        _unmap(d.words, (d.home_end - d.home_begin) * sizeof(uint64_t))
        _unmap(d.cache, d.num_keys * sizeof(uint16_t))
        free(d)


cdef void digest_directory(const directory_t* d, uint64_t* counts, uint64_t* digests) noexcept nogil:
    cdef Key i
    cdef uint64_t word
    cdef Rank owner
    for i in range(d.home_end - d.home_begin):
        word = load_u64(d.words + i)
        if word != 0 and <Epoch>word != 0:
            owner = <Rank>(word >> 32) - 1
            counts[owner] += 1
            digests[owner] ^= mix_digest(d.home_begin + i, <Epoch>word)
