"""Slots, slabs and the loops over them.

Design: everything a batch needs of a key hangs off its slot word, so a loop prefetches that word first and the row behind it
a little later. Each key is latched on its own, for its own copy: taking the latches of several neighbours back to back, so
that the wait for earlier stores is paid once, was tried and is slower (benchmarks/README.md).

Locking: key latch -> class lock -> arena lock. The class and the arena lock guard a few words and, rarely, an mmap; whoever
holds one takes no latch. A thread holds one latch at a time.

Rows: an 8-byte header (the epoch; in a free row the next free one) and the values, rounded up to 8 bytes. One size class per
distinct row length, so nothing else is rounded. Classes cut runs of rows from an arena of regions that start small and double;
a row that was never used is still zero and costs no memory.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANON, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from lapse._sync cimport (
    peek_u64, prefetch_read, prefetch_write, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_t, pthread_mutex_unlock)
from lapse._types cimport FLOAT32, INT32, Epoch, Key

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>

    #ifndef MAP_NORESERVE
    #define MAP_NORESERVE 0
    #endif
    #if defined(MADV_HUGEPAGE)
    #define lapse_want_huge_pages(p, n) ((void)madvise((p), (n), MADV_HUGEPAGE))
    #else
    #define lapse_want_huge_pages(p, n) ((void)(p), (void)(n))
    #endif

    /* row[i] += values[i]. Integers wrap; values that came in a message need not be aligned. One body, compiled for what the
       processor offers and chosen when a store is made. */
    typedef float lapse_f32 __attribute__((aligned(1), may_alias));
    typedef double lapse_f64 __attribute__((aligned(1), may_alias));
    typedef uint32_t lapse_u32 __attribute__((aligned(1), may_alias));
    typedef uint64_t lapse_u64 __attribute__((aligned(1), may_alias));
    typedef void (*lapse_add_t)(void *, const void *, size_t);

    #define LAPSE_ADD(name, type, target)                                                                  \\
        target static void name(void *row, const void *values, size_t bytes) {                             \\
            type *restrict to = (type *)row;                                                               \\
            const type *restrict from = (const type *)values;                                              \\
            size_t n = bytes / sizeof(type);                                                               \\
            for (size_t i = 0; i < n; i++) to[i] += from[i];                                               \\
        }
    #define LAPSE_ADDS(level, target)                                                                      \\
        LAPSE_ADD(lapse_add_f32_##level, lapse_f32, target)                                                \\
        LAPSE_ADD(lapse_add_f64_##level, lapse_f64, target)                                                \\
        LAPSE_ADD(lapse_add_u32_##level, lapse_u32, target)                                                \\
        LAPSE_ADD(lapse_add_u64_##level, lapse_u64, target)                                                \\
        static const lapse_add_t lapse_adds_##level[4] = {                                                 \\
            lapse_add_f32_##level, lapse_add_f64_##level, lapse_add_u32_##level, lapse_add_u64_##level};

    LAPSE_ADDS(any, )
    #if defined(__x86_64__) && defined(__GNUC__)
    LAPSE_ADDS(avx2, __attribute__((target("avx2"))))
    LAPSE_ADDS(avx512, __attribute__((target("avx512f"))))
    #endif

    static lapse_add_t lapse_adder(int dtype) {
    #if defined(__x86_64__) && defined(__GNUC__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f")) return lapse_adds_avx512[dtype];
        if (__builtin_cpu_supports("avx2")) return lapse_adds_avx2[dtype];
    #endif
        return lapse_adds_any[dtype];
    }
    """
    ctypedef void (*add_t "lapse_add_t")(void*, const void*, size_t) noexcept nogil
    add_t adder "lapse_adder"(int dtype) noexcept nogil
    void want_huge_pages "lapse_want_huge_pages"(void*, size_t) noexcept nogil

cdef enum:
    HEADER = 8                  # bytes in front of a row
    LINE = 64
    NEAR_BYTES = 2048           # of a long row, this much is prefetched; the processor's own prefetcher finds the rest

cdef uint64_t GONE = <uint64_t>1 << 63
cdef uint64_t POINTER = ~<uint64_t>7
cdef size_t HUGE_PAGE = <size_t>1 << 21
cdef size_t HUGE_ENOUGH = <size_t>1 << 23     # huge pages pay from here on; below they would waste memory
cdef size_t FIRST_REGION = <size_t>1 << 16
cdef size_t LAST_REGION = <size_t>1 << 26
cdef size_t FIRST_RUN = <size_t>1 << 12
cdef size_t LAST_RUN = <size_t>1 << 20

cdef struct class_t:            # the rows of one length
    size_t stride               # bytes from row to row, header included; 0: an empty place of the table
    Key rows                    # that can still be asked for: at most one per key of this length
    size_t run                  # bytes of the next run of rows cut from the arena
    pthread_mutex_t lock        # guards what follows, and `rows` and `run`
    char* released              # free rows (their first byte behind the header), linked through their headers
    char* fresh                 # rows never used: [fresh, end)
    char* end

cdef struct region_t:
    region_t* next
    char* base
    size_t bytes

cdef struct slabs_t:
    class_t* classes            # owned; a hash table by stride, classes_mask + 1 places
    size_t classes_mask
    size_t classes_used
    add_t add                   # row[i] += values[i] for the store's type
    pthread_mutex_t lock        # guards what follows: the arena
    region_t* regions           # owned
    char* next                  # unused part of the youngest region: [next, end)
    char* end
    size_t region_bytes         # of the next one


# --- memory -----------------------------------------------------------------------------------------------------------

cdef void* map_zeros(size_t bytes) noexcept nogil:
    """Zeros that cost memory only where they are touched; in huge pages when they are many. NULL: out of memory."""
    cdef size_t slack = HUGE_PAGE if bytes >= HUGE_ENOUGH else 0
    cdef void* base = mmap(NULL, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0)
    cdef size_t head
    if base == MAP_FAILED:
        return NULL
    if slack:                   # aligned, and without what that leaves over on both sides
        head = -<size_t>base & (HUGE_PAGE - 1)
        if head:
            munmap(base, head)
        if slack - head:
            munmap(<char*>base + head + bytes, slack - head)
        base = <char*>base + head
        want_huge_pages(base, bytes)
    return base


cdef inline size_t whole_pages(size_t bytes) noexcept nogil:
    cdef size_t page = HUGE_PAGE if bytes >= HUGE_ENOUGH else FIRST_REGION
    return (bytes + page - 1) & ~(page - 1)


cdef inline size_t stride_of(size_t stored_bytes) noexcept nogil:
    return (stored_bytes + HEADER + 7) & ~<size_t>7


cdef inline class_t* find_class(const slabs_t* slabs, size_t stride) noexcept nogil:
    """The class of that stride, or the empty place where it belongs."""
    cdef size_t at = ((stride >> 3) * <size_t>0x9E3779B97F4A7C15 >> 20) & slabs.classes_mask
    while slabs.classes[at].stride != stride and slabs.classes[at].stride != 0:
        at = (at + 1) & slabs.classes_mask
    return &slabs.classes[at]


cdef bint count_class(slabs_t* slabs, size_t stride, Key rows) noexcept nogil:
    """That many more keys have rows of this stride; doubles the table when it is half full. False: out of memory."""
    cdef class_t* old = slabs.classes
    cdef class_t* place
    cdef size_t old_mask = slabs.classes_mask
    cdef size_t i
    if slabs.classes_used * 2 > slabs.classes_mask:
        slabs.classes_mask = slabs.classes_mask * 2 + 1
        slabs.classes = <class_t*>calloc(slabs.classes_mask + 1, sizeof(class_t))
        if slabs.classes == NULL:
            slabs.classes = old
            slabs.classes_mask = old_mask
            return False
        for i in range(old_mask + 1):
            if old[i].stride:
                find_class(slabs, old[i].stride)[0] = old[i]
        free(old)
    place = find_class(slabs, stride)
    if place.stride == 0:
        place.stride = stride
        slabs.classes_used += 1
    place.rows += rows
    return True


cdef slabs_t* slabs_new(int dtype) noexcept nogil:
    cdef slabs_t* slabs = <slabs_t*>calloc(1, sizeof(slabs_t))
    if slabs == NULL:
        return NULL
    pthread_mutex_init(&slabs.lock, NULL)
    slabs.add = adder(dtype)
    slabs.region_bytes = FIRST_REGION
    slabs.classes_mask = 1
    slabs.classes = <class_t*>calloc(2, sizeof(class_t))
    if slabs.classes == NULL:
        slabs_free(slabs)
        return NULL
    return slabs


cdef void slabs_free(slabs_t* slabs) noexcept nogil:
    cdef region_t* region
    cdef size_t i
    if slabs == NULL:
        return
    while slabs.regions != NULL:
        region = slabs.regions
        slabs.regions = region.next
        munmap(region.base, region.bytes)
        free(region)
    if slabs.classes != NULL:
        for i in range(slabs.classes_mask + 1):
            if slabs.classes[i].run:        # its lock exists
                pthread_mutex_destroy(&slabs.classes[i].lock)
        free(slabs.classes)
    pthread_mutex_destroy(&slabs.lock)
    free(slabs)


cdef bint add_region(slabs_t* slabs, size_t bytes) noexcept nogil:
    """A new region of at least so many bytes; under the arena's lock. False: out of memory."""
    cdef region_t* region = <region_t*>calloc(1, sizeof(region_t))
    if region == NULL:
        return False
    region.bytes = whole_pages(max(bytes, slabs.region_bytes))
    region.base = <char*>map_zeros(region.bytes)
    if region.base == NULL:
        free(region)
        return False
    region.next = slabs.regions
    slabs.regions = region
    slabs.next = region.base
    slabs.end = region.base + region.bytes
    if slabs.region_bytes < LAST_REGION:
        slabs.region_bytes *= 2
    return True


cdef bint refill(slabs_t* slabs, class_t* c) noexcept nogil:
    """Cut a run of fresh rows for a class whose lock is held. False: out of memory."""
    cdef size_t rows = c.run // c.stride
    cdef size_t fitting
    rows = max(<size_t>1, min(rows, <size_t>max(c.rows, 0)))
    pthread_mutex_lock(&slabs.lock)
    fitting = <size_t>(slabs.end - slabs.next) // c.stride
    if fitting == 0:
        if not add_region(slabs, c.stride):
            pthread_mutex_unlock(&slabs.lock)
            return False
        fitting = <size_t>(slabs.end - slabs.next) // c.stride
    rows = min(rows, fitting)
    c.fresh = slabs.next
    c.end = c.fresh + rows * c.stride
    slabs.next = c.end
    pthread_mutex_unlock(&slabs.lock)
    c.rows -= rows
    if c.run < LAST_RUN:
        c.run *= 2
    return True


cdef char* new_row(store_t* s, Key key, bint zeros) noexcept nogil:
    """A row for the key, its values zeros if asked for; epoch 0. NULL: out of memory."""
    cdef size_t bytes = stored_bytes(s, key)
    cdef class_t* c = find_class(s.slabs, stride_of(bytes))
    cdef char* row
    cdef char* following
    cdef size_t at
    pthread_mutex_lock(&c.lock)
    row = c.released
    if row != NULL:
        c.released = (<char**>(row - HEADER))[0]
        following = c.released
        pthread_mutex_unlock(&c.lock)
        at = 0
        while at < min(bytes, <size_t>1024):        # whoever localizes one key localizes many: the next one's row (NULL is harmless)
            prefetch_write(following - HEADER + at)
            at += LINE
        if zeros:
            memset(row, 0, bytes)
    else:
        if c.fresh == c.end and not refill(s.slabs, c):
            pthread_mutex_unlock(&c.lock)
            return NULL
        row = c.fresh + HEADER
        c.fresh += c.stride
        pthread_mutex_unlock(&c.lock)
    (<uint64_t*>(row - HEADER))[0] = 0
    return row


cdef void release_row(store_t* s, Key key, char* row) noexcept nogil:
    cdef class_t* c = find_class(s.slabs, stride_of(stored_bytes(s, key)))
    pthread_mutex_lock(&c.lock)
    (<char**>(row - HEADER))[0] = c.released
    c.released = row
    pthread_mutex_unlock(&c.lock)


# --- life -------------------------------------------------------------------------------------------------------------

cdef bint count_classes(store_t* s) noexcept nogil:
    """Make the size classes and the first region's size known. False: out of memory."""
    cdef slabs_t* slabs = s.slabs
    cdef class_t* c
    cdef Key key
    cdef size_t at_home = 0, i
    if s.stored == NULL:
        if not count_class(slabs, stride_of(s.uniform_stored), s.num_keys):
            return False
        at_home = stride_of(s.uniform_stored) * <size_t>max(s.home_end - s.home_begin, 0)
    else:
        for key in range(s.num_keys):
            if not count_class(slabs, stride_of(stored_bytes(s, key)), 1):
                return False
            if is_home(s, key):
                at_home += stride_of(stored_bytes(s, key))
    if at_home >= HUGE_ENOUGH:              # it will be large: in huge pages from the first row on
        slabs.region_bytes = HUGE_ENOUGH
    for i in range(slabs.classes_mask + 1):
        c = &slabs.classes[i]
        if c.stride:
            c.run = FIRST_RUN if slabs.classes_used > 1 else LAST_RUN
            pthread_mutex_init(&c.lock, NULL)
    return True


cdef const uint32_t* copy_lengths(const uint32_t* lengths, Key num_keys) noexcept nogil:
    cdef void* copy = map_zeros(whole_pages(max(num_keys, 1) * sizeof(uint32_t)))
    if copy != NULL and num_keys > 0:
        memcpy(copy, lengths, num_keys * sizeof(uint32_t))
    return <const uint32_t*>copy


cdef bint same_lengths(const uint32_t* a, const uint32_t* b, Key num_keys) noexcept nogil:
    cdef Key key
    for key in range(num_keys):
        if a[key] != b[key]:
            return False
    return True


cdef store_t* store_new(Key num_keys, Key home_begin, Key home_end, int dtype, size_t uniform_visible_length,
                        size_t uniform_stored_length, const uint32_t* visible, const uint32_t* stored) noexcept nogil:
    cdef store_t* s = <store_t*>calloc(1, sizeof(store_t))
    if s == NULL:
        return NULL
    s.num_keys = num_keys
    s.home_begin = home_begin
    s.home_end = home_end
    s.dtype = dtype
    s.itemsize = 4 if dtype == FLOAT32 or dtype == INT32 else 8
    s.uniform_visible = uniform_visible_length * s.itemsize
    s.uniform_stored = uniform_stored_length * s.itemsize
    s.slots = <uint64_t*>map_zeros(whole_pages(max(num_keys, 1) * sizeof(uint64_t)))
    s.slabs = slabs_new(dtype)
    if s.slots == NULL or s.slabs == NULL:
        store_free(s)
        return NULL
    if visible != NULL:
        s.visible = copy_lengths(visible, num_keys)
        if s.visible == NULL:
            store_free(s)
            return NULL
    if stored != NULL:
        # most stores keep nothing beside the values: one array serves for both
        if visible != NULL and same_lengths(visible, stored, num_keys):
            s.stored = s.visible
        else:
            s.stored = copy_lengths(stored, num_keys)
        if s.stored == NULL:
            store_free(s)
            return NULL
    if not count_classes(s):
        store_free(s)
        return NULL
    return s


cdef void store_free(store_t* s) noexcept nogil:
    cdef size_t lengths
    if s == NULL:
        return
    lengths = whole_pages(max(s.num_keys, 1) * sizeof(uint32_t))
    slabs_free(s.slabs)
    if s.stored != NULL and s.stored != s.visible:
        munmap(<void*>s.stored, lengths)
    if s.visible != NULL:
        munmap(<void*>s.visible, lengths)
    if s.slots != NULL:
        munmap(s.slots, whole_pages(max(s.num_keys, 1) * sizeof(uint64_t)))
    free(s)


# --- one key, under its latch -------------------------------------------------------------------------------------------

cdef inline char* pointer_of(uint64_t word) noexcept nogil:
    return <char*><size_t>(word & POINTER)


cdef char* row_of(store_t* s, Key key, uint64_t* word) noexcept nogil:
    cdef char* row
    if word[0] & OWNED:
        return pointer_of(word[0])
    row = new_row(s, key, True)
    if row != NULL:
        word[0] = <uint64_t><size_t>row | OWNED
    return row


cdef Epoch epoch_of(const store_t* s, Key key, uint64_t word) noexcept nogil:
    return (<Epoch*>(pointer_of(word) - HEADER))[0] if word & OWNED else 0


cdef uint64_t insert_row(store_t* s, Key key, Epoch epoch, const void* values) noexcept nogil:
    cdef char* row = new_row(s, key, values == NULL)
    if row == NULL:
        return 0
    (<Epoch*>(row - HEADER))[0] = epoch
    if values != NULL:
        memcpy(row, values, stored_bytes(s, key))
    return <uint64_t><size_t>row | OWNED


cdef uint64_t remove_row(store_t* s, Key key, uint64_t word, Epoch epoch, void* out) noexcept nogil:
    if word & OWNED:
        memcpy(out, pointer_of(word), stored_bytes(s, key))
        release_row(s, key, pointer_of(word))
    else:
        memset(out, 0, stored_bytes(s, key))
    return gone_word(epoch)


cdef uint64_t gone_word(Epoch epoch) noexcept nogil:
    return GONE | <uint64_t>epoch << 16


cdef void add_values(const store_t* s, Key key, void* row, const void* values) noexcept nogil:
    s.slabs.add(row, values, visible_bytes(s, key))


# --- batches ----------------------------------------------------------------------------------------------------------

cdef inline void copy_row(char* to, const char* source, size_t bytes) noexcept nogil:
    """memcpy, without the call for short rows: two overlapping moves at each size."""
    if bytes > 64:
        memcpy(to, source, bytes)
    elif bytes > 32:
        memcpy(to, source, 32)
        memcpy(to + bytes - 32, source + bytes - 32, 32)
    elif bytes >= 16:
        memcpy(to, source, 16)
        memcpy(to + bytes - 16, source + bytes - 16, 16)
    elif bytes >= 8:
        memcpy(to, source, 8)
        memcpy(to + bytes - 8, source + bytes - 8, 8)
    elif bytes >= 4:            # numbers have 4 or 8 bytes
        memcpy(to, source, 4)


cdef inline void prefetch_row(const char* row, size_t bytes, bint write) noexcept nogil:
    cdef size_t near = min(bytes, <size_t>NEAR_BYTES)
    cdef size_t at = 0
    while at < near:
        if write:
            prefetch_write(row + at)
        else:
            prefetch_read(row + at)
        at += LINE


cdef inline void look_ahead(const store_t* s, const Key* keys, Py_ssize_t i, Py_ssize_t n, bint uniform,
                            bint write) noexcept nogil:
    """Prefetch for the positions that follow i: the slot word far ahead, the row near."""
    cdef Key key
    if i + SLOT_AHEAD < n:
        key = keys[i + SLOT_AHEAD]
        prefetch_write(s.slots + key)
        if not uniform:
            prefetch_read(s.visible + key)
    if i + ROW_AHEAD < n:
        key = keys[i + ROW_AHEAD]
        prefetch_row(pointer_of(peek_u64(s.slots + key)), s.uniform_visible if uniform else visible_bytes(s, key), write)


cdef inline bint pull_one(store_t* s, Key key, char* vals, size_t bytes) noexcept nogil:
    """False: the key is not here."""
    cdef uint64_t word = latch(s, key)
    cdef bint here = True
    if word & OWNED:
        copy_row(vals, pointer_of(word), bytes)
    elif state_of(s, key, word) == HERE:
        memset(vals, 0, bytes)
    else:
        here = False
    unlatch(s, key, word)
    return here


cdef inline int add_one(store_t* s, add_t add, Key key, const char* vals, size_t bytes) noexcept nogil:
    """1: done, 0: the key is not here, -1: out of memory."""
    cdef uint64_t word = latch(s, key)
    cdef char* row
    cdef int done = 1
    if word & OWNED:
        add(pointer_of(word), vals, bytes)
    elif state_of(s, key, word) == HERE:
        row = row_of(s, key, &word)
        if row != NULL:
            add(row, vals, bytes)       # to zeros, not a copy: -0.0 becomes 0.0 as in every other row
        else:
            done = -1
    else:
        done = 0
    unlatch(s, key, word)
    return done


cdef inline int set_one(store_t* s, Key key, const char* vals, size_t bytes) noexcept nogil:
    """1: done, 0: the key is not here, -1: out of memory."""
    cdef uint64_t word = latch(s, key)
    cdef char* row
    cdef int done = 0
    if state_of(s, key, word) == HERE:
        row = row_of(s, key, &word)
        if row != NULL:
            copy_row(row, vals, bytes)
            done = 1
        else:
            done = -1
    unlatch(s, key, word)
    return done


cdef inline Py_ssize_t pull_batch(store_t* s, const Key* keys, Py_ssize_t n, char* vals, uint32_t* misses,
                                  bint uniform) noexcept nogil:
    cdef Py_ssize_t i, missed = 0
    cdef size_t bytes = s.uniform_visible
    for i in range(n):
        look_ahead(s, keys, i, n, uniform, False)
        if not uniform:
            bytes = visible_bytes(s, keys[i])
        if not pull_one(s, keys[i], vals, bytes):
            misses[missed] = <uint32_t>i
            missed += 1
        vals += bytes
    return missed


cdef inline Py_ssize_t push_batch(store_t* s, const Key* keys, Py_ssize_t n, const char* vals, uint32_t* misses,
                                  bint uniform) noexcept nogil:
    cdef Py_ssize_t i, missed = 0
    cdef size_t bytes = s.uniform_visible
    cdef add_t add = s.slabs.add
    cdef int done
    for i in range(n):
        look_ahead(s, keys, i, n, uniform, True)
        if not uniform:
            bytes = visible_bytes(s, keys[i])
        done = add_one(s, add, keys[i], vals, bytes)
        if done <= 0:
            if done < 0:
                return -1
            misses[missed] = <uint32_t>i
            missed += 1
        vals += bytes
    return missed


cdef inline Py_ssize_t set_batch(store_t* s, const Key* keys, Py_ssize_t n, const char* vals, uint32_t* misses,
                                 bint uniform) noexcept nogil:
    cdef Py_ssize_t i, missed = 0
    cdef size_t bytes = s.uniform_visible
    cdef int done = 1
    for i in range(n):
        if done > 0:
            look_ahead(s, keys, i, n, uniform, True)
            if not uniform:
                bytes = visible_bytes(s, keys[i])
            done = set_one(s, keys[i], vals, bytes)
            if done < 0:
                return -1
            vals += bytes
        if done == 0:           # none overtakes the first that has still to be sent
            misses[missed] = <uint32_t>i
            missed += 1
    return missed


cdef Py_ssize_t pull_rows(store_t* s, const Key* keys, Py_ssize_t n, void* vals, uint32_t* misses) noexcept nogil:
    cdef size_t bytes
    if n == 1:                  # nothing to look ahead to: ask for the row's lines before waiting for the latch
        bytes = visible_bytes(s, keys[0])
        prefetch_row(pointer_of(peek_u64(s.slots + keys[0])), bytes, False)
        misses[0] = 0
        return not pull_one(s, keys[0], <char*>vals, bytes)
    if s.visible == NULL:
        return pull_batch(s, keys, n, <char*>vals, misses, True)
    return pull_batch(s, keys, n, <char*>vals, misses, False)


cdef Py_ssize_t push_rows(store_t* s, const Key* keys, Py_ssize_t n, const void* vals, uint32_t* misses) noexcept nogil:
    if s.visible == NULL:
        return push_batch(s, keys, n, <const char*>vals, misses, True)
    return push_batch(s, keys, n, <const char*>vals, misses, False)


cdef Py_ssize_t set_rows(store_t* s, const Key* keys, Py_ssize_t n, const void* vals, uint32_t* misses) noexcept nogil:
    if s.visible == NULL:
        return set_batch(s, keys, n, <const char*>vals, misses, True)
    return set_batch(s, keys, n, <const char*>vals, misses, False)


cdef Py_ssize_t absent_rows(store_t* s, const Key* keys, Py_ssize_t n, uint32_t* misses) noexcept nogil:
    cdef Py_ssize_t i, missed = 0
    for i in range(n):
        if i + SLOT_AHEAD < n:
            prefetch_read(s.slots + keys[i + SLOT_AHEAD])
        if state_of(s, keys[i], slot_word(s, keys[i])) != HERE:
            misses[missed] = <uint32_t>i
            missed += 1
    return missed


cdef size_t batch_bytes(const store_t* s, const Key* keys, Py_ssize_t n) noexcept nogil:
    cdef size_t total = 0
    cdef Py_ssize_t i
    if s.visible == NULL:
        return <size_t>n * s.uniform_visible
    for i in range(n):
        total += s.visible[keys[i]]
    return total * <size_t>s.itemsize


cdef Py_ssize_t first_out_of_range(const Key* keys, Py_ssize_t n, Key num_keys) noexcept nogil:
    # a key is out of range when it or (last - key) is negative: sign bits, collected without a branch over all keys
    cdef uint64_t last = <uint64_t>num_keys - 1
    cdef uint64_t signs = 0
    cdef Py_ssize_t i
    for i in range(n):
        signs |= <uint64_t>keys[i] | (last - <uint64_t>keys[i])
    if not signs >> 63:
        return -1
    for i in range(n):
        if keys[i] < 0 or keys[i] >= num_keys:
            return i
    return -1


# --- audit ------------------------------------------------------------------------------------------------------------

cdef uint64_t mix_digest(Key key, Epoch epoch) noexcept nogil:
    # the finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), once for each
    cdef uint64_t x = <uint64_t>key + <uint64_t>0x9E3779B97F4A7C15
    x = (x ^ x >> 30) * <uint64_t>0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * <uint64_t>0x94D049BB133111EB
    x = (x ^ x >> 31) + <uint64_t>epoch * <uint64_t>0x9E3779B97F4A7C15
    x = (x ^ x >> 30) * <uint64_t>0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * <uint64_t>0x94D049BB133111EB
    return x ^ x >> 31


cdef void digest_rows(const store_t* s, Key per_home, uint64_t* counts, uint64_t* digests) noexcept nogil:
    cdef Key key
    cdef uint64_t word
    cdef Epoch epoch
    for key in range(s.num_keys):
        word = slot_word(s, key)
        if word & OWNED:
            epoch = epoch_of(s, key, word)
            if epoch > 0:
                counts[key // per_home] += 1
                digests[key // per_home] ^= mix_digest(key, epoch)
