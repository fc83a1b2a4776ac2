"""Atomics, the spin pause, prefetching, mutexes and parking: the few words of C below everything.

Design: GCC's and clang's __atomic builtins, which ThreadSanitizer understands; a pthread mutex where a lock may be held for
long; a futex (polling where there is none) where a thread sleeps. Nothing here allocates or raises.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef LAPSE_SYNC_H
    #define LAPSE_SYNC_H
    #include <errno.h>
    #include <pthread.h>
    #include <sched.h>
    #include <stdint.h>
    #include <time.h>
    #if defined(__linux__)
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #endif

    #define lapse_likely(x) __builtin_expect(!!(x), 1)
    #define lapse_unlikely(x) __builtin_expect(!!(x), 0)
    #define lapse_load_u64(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define lapse_peek_u64(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define lapse_store_u64(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define lapse_load_i64(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define lapse_store_i64(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define lapse_add_i64(p, v) __atomic_add_fetch((p), (v), __ATOMIC_ACQ_REL)
    #define lapse_load_u32(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define lapse_store_u32(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define lapse_add_u32(p, v) __atomic_add_fetch((p), (v), __ATOMIC_ACQ_REL)
    #define lapse_load_i32(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define lapse_store_i32(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define lapse_peek_u16(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define lapse_poke_u16(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define lapse_load_u8(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define lapse_store_u8(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define lapse_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)

    static inline int lapse_cas_u64(uint64_t *p, uint64_t *expected, uint64_t desired) {
        return __atomic_compare_exchange_n(p, expected, desired, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
    }
    static inline int lapse_set_once_i32(int32_t *p, int32_t v) {           /* only if it is still 0 */
        int32_t zero = 0;
        return __atomic_compare_exchange_n(p, &zero, v, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }
    static inline int lapse_swap_i32(int32_t *p, int32_t v) { return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL); }

    static inline void lapse_pause(void) {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ __volatile__("yield");
    #endif
    }
    #define lapse_prefetch_read(p) __builtin_prefetch((p), 0, 3)
    #define lapse_prefetch_write(p) __builtin_prefetch((p), 1, 3)
    static inline void lapse_yield(void) { sched_yield(); }

    static inline int64_t lapse_nanoseconds(void) {         /* a clock that never goes back */
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    }

    /* Sleep while *word == seen, for at most `nanoseconds`; 1 when a signal ended it, else 0. Spurious returns are legal. */
    static inline int lapse_park(uint32_t *word, uint32_t seen, int64_t nanoseconds) {
        struct timespec t;
    #if defined(__linux__)
        t.tv_sec = nanoseconds / 1000000000; t.tv_nsec = nanoseconds % 1000000000;
        return syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, &t, NULL, 0) != 0 && errno == EINTR;
    #else
        if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != seen) return 0;
        if (nanoseconds > 50000) nanoseconds = 50000;
        t.tv_sec = 0; t.tv_nsec = nanoseconds;
        return nanosleep(&t, NULL) != 0 && errno == EINTR;
    #endif
    }
    static inline void lapse_unpark(uint32_t *word) {
    #if defined(__linux__)
        syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    #else
        (void)word;
    #endif
    }
    #endif
    """
    bint likely "lapse_likely"(bint) noexcept nogil
    bint unlikely "lapse_unlikely"(bint) noexcept nogil
    uint64_t load_u64 "lapse_load_u64"(const uint64_t*) noexcept nogil         # acquire
    uint64_t peek_u64 "lapse_peek_u64"(const uint64_t*) noexcept nogil         # relaxed
    void store_u64 "lapse_store_u64"(uint64_t*, uint64_t) noexcept nogil       # release
    int64_t load_i64 "lapse_load_i64"(const int64_t*) noexcept nogil
    void store_i64 "lapse_store_i64"(int64_t*, int64_t) noexcept nogil
    int64_t add_i64 "lapse_add_i64"(int64_t*, int64_t) noexcept nogil          # returns the new value
    uint32_t load_u32 "lapse_load_u32"(const uint32_t*) noexcept nogil
    void store_u32 "lapse_store_u32"(uint32_t*, uint32_t) noexcept nogil
    uint32_t add_u32 "lapse_add_u32"(uint32_t*, uint32_t) noexcept nogil
    int32_t load_i32 "lapse_load_i32"(const int32_t*) noexcept nogil
    void store_i32 "lapse_store_i32"(int32_t*, int32_t) noexcept nogil
    int32_t swap_i32 "lapse_swap_i32"(int32_t*, int32_t) noexcept nogil        # returns the old value
    bint set_once_i32 "lapse_set_once_i32"(int32_t*, int32_t) noexcept nogil      # 1: it was 0 and is set now
    uint16_t peek_u16 "lapse_peek_u16"(const uint16_t*) noexcept nogil         # relaxed
    void poke_u16 "lapse_poke_u16"(uint16_t*, uint16_t) noexcept nogil         # relaxed
    uint8_t load_u8 "lapse_load_u8"(const uint8_t*) noexcept nogil
    void store_u8 "lapse_store_u8"(uint8_t*, uint8_t) noexcept nogil
    void fence "lapse_fence"() noexcept nogil
    bint cas_u64 "lapse_cas_u64"(uint64_t*, uint64_t* expected, uint64_t desired) noexcept nogil
    void pause "lapse_pause"() noexcept nogil
    void prefetch_read "lapse_prefetch_read"(const void*) noexcept nogil
    void prefetch_write "lapse_prefetch_write"(const void*) noexcept nogil
    void yield_core "lapse_yield"() noexcept nogil
    int64_t nanoseconds "lapse_nanoseconds"() noexcept nogil
    bint park "lapse_park"(uint32_t* word, uint32_t seen, int64_t nanoseconds) noexcept nogil
    void unpark "lapse_unpark"(uint32_t* word) noexcept nogil

    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t*, void*) noexcept nogil
    int pthread_mutex_destroy(pthread_mutex_t*) noexcept nogil
    int pthread_mutex_lock(pthread_mutex_t*) noexcept nogil
    int pthread_mutex_unlock(pthread_mutex_t*) noexcept nogil
