from libc.stdint cimport int64_t, uint64_t

from lapse._operations cimport counters_t


cdef int bucket_of(int64_t ns) noexcept nogil:
    """Eight buckets per power of two: 12 % wide."""
    cdef int power = 0
    cdef uint64_t x = <uint64_t>max(ns, 1)
    while x >> (power + 1):
        power += 1
    if power < 3:
        return <int>x
    return min(power * 8 + <int>((x >> (power - 3)) & 7), 511)


cdef int64_t bucket_value(int bucket) noexcept nogil:
    cdef int power = bucket // 8
    if bucket < 8:
        return bucket
    return (<int64_t>(8 + bucket % 8)) << (power - 3)


cdef void note_relocation(protocol_counters_t* c, int64_t took) noexcept nogil:
    if c.relocation_count == 0 or took < c.relocation_min:
        c.relocation_min = took
    c.relocation_max = max(c.relocation_max, took)
    c.relocation_sum += took
    c.relocation_count += 1
    c.relocation_histogram[bucket_of(took)] += 1


cdef dict worker_dict(const counters_t* counters):
    cdef const int64_t* c = <const int64_t*>counters
    positions = {f"{name}_{where}": c[3 * i + j] for i, name in enumerate(("pulled", "pushed", "set", "localized"))
                 for j, where in enumerate(("local", "queued", "remote"))}
    return positions | {"sampled": counters.sampled, "sample_fallbacks": counters.sample_fallbacks,
                        "sample_postponed": counters.sample_postponed, "pool_refills": counters.pool_refills,
                        "pool_waits": counters.pool_waits}


cdef dict relocations_dict(const protocol_counters_t* c):
    cdef int64_t seen = 0, p99 = 0
    cdef int i
    for i in range(512):
        seen += c.relocation_histogram[i]
        if seen * 100 >= c.relocation_count * 99:
            p99 = bucket_value(i)
            break
    return {
        "answered": c.answered, "forwarded": c.forwarded, "long_ways": c.long_ways,
        "relocated_in": c.relocated_in, "relocated_out": c.relocated_out,
        "relocation_count": c.relocation_count, "relocation_min_ns": c.relocation_min,
        "relocation_mean_ns": c.relocation_sum // c.relocation_count if c.relocation_count else 0,
        "relocation_p99_ns": p99, "relocation_max_ns": c.relocation_max,
    }
