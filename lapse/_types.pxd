"""The vocabulary: one name and one width for each thing that crosses a module's border."""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

ctypedef int64_t Key            # in [0, num_keys)
ctypedef int32_t Rank           # of a node, in [0, num_nodes)
ctypedef int64_t Timestamp      # the number of an operation of one worker; also a result code, see below
ctypedef uint32_t Epoch         # how often a key has relocated, counted by its home; compared modulo 2**32

cdef enum ValueType:
    FLOAT32
    FLOAT64
    INT32
    INT64

# What a worker asks for. The numbers are those of the message types (see _wire.pxd).
cdef enum OpKind:
    OP_PULL = 1
    OP_PUSH = 2
    OP_SET = 3
    OP_LOCALIZE = 4

# Results of nogil calls: >= 0 a timestamp, DONE finished already, and below that what went wrong; nothing was sent then.
cdef enum:
    DONE = -1
    ERR_STOPPED = -2            # operation after shutdown
    ERR_FAILED = -3             # the job failed: a node died, went silent, or broke the protocol
    ERR_INTERRUPTED = -4        # Ctrl-C
    ERR_KEY_RANGE = -5          # a key below 0 or from num_keys on
    ERR_TIMEOUT = -6            # timeout given and passed; the operation is still under way
    ERR_MEMORY = -7             # out of memory
    ERR_TIMESTAMP = -8          # a timestamp that this worker never gave
    ERR_HELD = -9               # a call between acquire and release
    ERR_TOO_MANY = -10          # acquire of more keys than ACQUIRE_MAX; more than 2**32 - 1 keys in a call
    ERR_FORKED = -11            # a Lapse object of the parent, used in a forked child
    ERR_NO_SAMPLING = -12       # enable_sampling_support has not been called
    ERR_SAMPLE = -13            # a sample that this worker never prepared
    ERR_SAMPLE_COUNT = -14      # more draws than were prepared, or left; more different ones than there are keys
    ERR_DRAW = -15              # the distribution's callable failed, or gave something else than keys of the range

cdef enum:
    ACQUIRE_MAX = 16            # keys of one in-place access
    MAX_NODES = 65534
