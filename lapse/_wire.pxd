"""The message layout. One message is one frame; integers are little-endian.

    header (64 bytes) | key int64 x count | aux uint32 x count, padded to 8 bytes | values

aux is, per key, the position in the caller's arrays (operations and their answers) or the epoch (HAND_OVER, TRANSFER).
values are there for PUSH, SET, VALUES (visible length per key) and TRANSFER (stored length per key). Every size follows from
the keys, and a message whose size is not the computed one is a protocol violation. So are a message without keys, `hops` in other messages
than operations, and a key that is twice in LOCALIZE, HAND_OVER or TRANSFER.

| type      | from -> to                    | origin, worker, ts     | means                                                    |
|-----------|-------------------------------|------------------------|----------------------------------------------------------|
| PULL      | worker's node -> ... -> owner | who asked              | send VALUES to origin                                    |
| PUSH, SET | worker's node -> ... -> owner | who asked              | add, overwrite; send ACK to origin                       |
| LOCALIZE  | requester -> home             | origin = the requester | relocate these keys to origin                            |
| HAND_OVER | home -> previous owner        | origin = the requester | send TRANSFER to origin; aux = the new epochs            |
| TRANSFER  | previous owner -> requester   | -                      | the keys are yours; aux = the new epochs                 |
| VALUES    | owner -> origin               | as asked               | the answer to PULL                                       |
| ACK       | owner -> origin               | as asked               | these positions of a PUSH or SET have been applied       |
| HELLO     | every node -> every other     | -                      | the channel stands (first message)                       |
| GOODBYE   | every node -> every other     | -                      | nothing follows on this channel                          |
| STOP      | a node -> itself              | -                      | the server loop ends                                     |
| MARK      | every node -> every other     | -                      | nothing; its `seq` shows whether a message was lost      |
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef LAPSE_WIRE_H
    #define LAPSE_WIRE_H
    #include <stdint.h>
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "Lapse's wire format is written for little-endian machines"
    #endif
    typedef struct {
        uint32_t magic;       /* LAPSE_MAGIC */
        uint16_t version;     /* LAPSE_VERSION */
        uint8_t type;
        uint8_t hops;         /* how often an operation has been forwarded */
        uint64_t job;         /* random, one per job */
        uint64_t seq;         /* of the channel: 1, 2, 3, ... */
        uint32_t src;         /* rank of the node that sends this frame */
        uint32_t origin;      /* rank of the node that asked */
        uint32_t worker;      /* the worker of origin that asked */
        uint32_t count;       /* keys in this message */
        uint64_t ts;          /* the worker's timestamp */
        uint64_t value_bytes; /* size of the values */
        uint64_t reserved;    /* 0 */
    } lapse_header;
    #define LAPSE_MAGIC 0x4553504cu      /* "LPSE" */
    #define LAPSE_VERSION 1
    #endif
    """
    ctypedef struct header_t "lapse_header":
        uint32_t magic
        uint16_t version
        uint8_t type
        uint8_t hops
        uint64_t job
        uint64_t seq
        uint32_t src
        uint32_t origin
        uint32_t worker
        uint32_t count
        uint64_t ts
        uint64_t value_bytes
        uint64_t reserved
    const uint32_t MAGIC "LAPSE_MAGIC"
    const uint16_t VERSION "LAPSE_VERSION"

cdef enum MessageType:
    PULL = 1
    PUSH = 2
    SET = 3
    LOCALIZE = 4
    HAND_OVER = 5
    TRANSFER = 6
    VALUES = 7
    ACK = 8
    HELLO = 16
    GOODBYE = 17
    STOP = 18
    MARK = 19

cdef enum:
    HEADER_BYTES = 64
    FRAME_BYTES = 16777216      # operations are split into frames of at most this, unless one value alone is longer


cdef inline size_t aux_bytes(size_t count) noexcept nogil:
    return (count * 4 + 7) & ~<size_t>7


cdef inline size_t frame_bytes(size_t count, size_t value_bytes) noexcept nogil:
    return HEADER_BYTES + count * 8 + aux_bytes(count) + value_bytes
