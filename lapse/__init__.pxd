"""What other Cython code may cimport: `from lapse cimport Worker, Key, Timestamp`."""
from lapse._types cimport (ACQUIRE_MAX, DONE, ERR_DRAW, ERR_FAILED, ERR_FORKED, ERR_HELD, ERR_INTERRUPTED, ERR_KEY_RANGE, ERR_MEMORY,
                           ERR_NO_SAMPLING, ERR_SAMPLE, ERR_SAMPLE_COUNT, ERR_STOPPED, ERR_TIMEOUT, ERR_TIMESTAMP, ERR_TOO_MANY, Key,
                           Rank, Timestamp)
from lapse._worker cimport (Worker, acquire_two, count_pairs, look, prefetch_row, prefetch_slot, release_two, sight_t,
                            two_rows_t)
