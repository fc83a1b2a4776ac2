"""The simulated world: nodes' channels, who may go on, the trace. Design: see _world.pyx."""
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t

from lapse._protocol cimport Sink
from lapse._store cimport store_t
from lapse._types cimport Key, Rank, Timestamp

cdef enum:
    MAX_ACTORS = 64
    MAX_SIM_NODES = 8
    MAX_CHANNELS = 64           # MAX_SIM_NODES squared
    MAX_KEYS = 64
    MAX_POSITIONS = 80          # of one call
    SHOWN = 4                   # keys of an event
    JOB = 0x5eed
    MAIN = -1                   # the greenlet that runs the schedule
    AFTERLIFE = 100000          # turns asked for after the end of a schedule, until an actor counts as stuck

cdef enum State:
    READY
    WANTS                       # the lock of channel `wanted`
    IDLE                        # a server without a message
    PARKED                      # a worker that sleeps until Sink.wake
    ENDED

# What can be wrong. The texts are in simulation.py.
cdef enum Problem:
    NONE
    OWNERS                      # a key with no owner or several
    HANGS                       # nobody can go on, but something is unfinished
    LIVELOCK                    # too many turns
    REFUSED                     # handle() found a violation
    SEQUENCE                    # a message out of order, lost or doubled
    LATCHED                     # a turn wanted under a key's latch where that is a mistake
    LOCK_TWICE                  # an actor waits for a lock it has
    NOT_LOCKED                  # a message or an unlock without the lock
    BAD_MESSAGE                 # a message whose header cannot be right
    ISSUE                       # issue() said no
    PLACED                      # a value that is not the sum of its parts: misplaced or torn
    IN_TRANSFER                 # a key still in transfer at rest
    DIRECTORY                   # home names another owner at rest
    EPOCH                       # home and owner differ in the epoch at rest
    SUM                         # a final value that is not the sum of the pushes
    OPEN                        # an operation, its credit or its pins left at rest
    DIGEST                      # home and owner, at rest: the audit of a real cluster
    HISTORY                     # found later, by the checker

cdef enum What:
    BEGINS
    FINISHES
    SENDS
    TAKES
    LOSES
    DOUBLES

# Faults of the network, next to those of the protocol.
cdef enum:
    FAULT_LOSS = 65536
    FAULT_DUPLICATE = 131072
    FAULT_REORDER = 262144
    FAULT_GARBLE = 1048576      # one byte of a message is another one when a node gets it
    FAULT_NO_SEQUENCE = 524288  # sequence numbers are not compared: what the other checks find alone


cdef struct message_t:
    message_t* next
    char* data                  # owned
    size_t size


cdef struct channel_t:
    message_t* first            # owned
    message_t* last
    uint64_t sent
    uint64_t received
    int holder                  # the actor that has the lock, or -1
    int weight


cdef struct actor_t:
    State state
    int wanted
    int weight
    Rank node
    int worker                  # -1: the server


cdef struct event_t:
    int64_t step
    int64_t order               # of a call in its worker's program; sequence number of a message
    int64_t ts
    int16_t actor
    int16_t src
    int16_t dst
    int16_t origin
    int16_t worker
    uint8_t what
    uint8_t kind                # OpKind or MessageType
    uint8_t hops
    int32_t n
    int32_t keys[SHOWN]
    int32_t aux[SHOWN]


cdef struct call_t:             # one operation of a worker's program
    int kind
    int n
    bint open
    int64_t order
    int64_t begin
    Timestamp ts
    Key keys[MAX_POSITIONS]
    size_t offsets[MAX_POSITIONS]   # in numbers
    int64_t* vals               # owned, while open
    size_t numbers


cdef struct world_t:
    void* switches              # borrowed from the Schedule: a list of what switches to each actor, and to MAIN
    int nodes
    int workers
    int actors
    int num_keys
    uint64_t rng
    int current
    bint aborted
    bint stopping
    bint stepwise               # nobody gives a turn away: see Schedule.issue
    int64_t steps
    int64_t max_steps
    int64_t changes             # of actor
    int64_t messages
    int64_t afterlife
    int faults
    int fault_rate              # of messages, one in this many
    actor_t actor[MAX_ACTORS]
    channel_t channel[MAX_CHANNELS]
    store_t* stores[MAX_SIM_NODES]      # borrowed from the nodes
    int64_t flying[MAX_KEYS]    # TRANSFERs in channels
    int64_t handled[MAX_KEYS]   # TRANSFERs that a node is busy with
    # what went wrong
    Problem problem
    int problem_actor
    int64_t problem_key
    int64_t problem_a
    int64_t problem_b
    # the trace
    event_t* events             # owned
    Py_ssize_t events_used
    Py_ssize_t events_room
    uint64_t hash


cdef class SimSink(Sink):
    cdef:
        world_t* world          # borrowed from the Schedule, which outlives the nodes
        Rank me


# --- random numbers: the same on every platform ----------------------------------------------------------------------------

cdef inline uint64_t mixed(uint64_t x) noexcept nogil:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> 30)) * <uint64_t>0xbf58476d1ce4e5b9
    x = (x ^ (x >> 27)) * <uint64_t>0x94d049bb133111eb
    return x ^ (x >> 31)


cdef inline uint64_t draw(uint64_t* rng) noexcept nogil:
    rng[0] += <uint64_t>0x9e3779b97f4a7c15
    return mixed(rng[0])


cdef inline int below(uint64_t* rng, int n) noexcept nogil:
    return <int>(((draw(rng) >> 32) * <uint64_t>n) >> 32)


# --- functions -------------------------------------------------------------------------------------------------------------

# End the schedule. The first problem counts.
cdef void fail(world_t* s, Problem problem, int64_t key=*, int64_t a=*, int64_t b=*) noexcept nogil
# Let somebody else go on; the actor has said in its state what it waits for. Comes back when it is its turn again.
cdef void turn(world_t* s) noexcept nogil
# Who goes on: by weight among those that can; MAIN when nobody can.
cdef int draw_actor(world_t* s) noexcept nogil
# Add to the trace.
cdef void note_call(world_t* s, What what, call_t* c) noexcept nogil
cdef void note_message(world_t* s, What what, int channel, message_t* m) noexcept nogil
# The next message for a node: of a channel drawn by weight, the oldest. NULL: there is none.
cdef message_t* take(world_t* s, Rank node, int* channel) noexcept nogil
cdef void drop(message_t* m) noexcept nogil
# Does this message meet the network's fault? One does per schedule.
cdef bint strikes(world_t* s, int fault) noexcept nogil
# The oldest message of a channel that has some, out of it.
cdef message_t* take_first(channel_t* c) noexcept nogil
# counts[key] += by for each key of a TRANSFER.
cdef void count_transfer(int64_t* counts, message_t* m, int by) noexcept nogil
