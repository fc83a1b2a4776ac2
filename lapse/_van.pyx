# Design: one PULL socket, consumed by the server thread alone, and one PUSH socket per node, shared by all threads of this node under the
# channel's mutex, which is the fence that libzmq asks for. A worker sends directly; the server thread answers the same way. High-water marks
# are 0 and sends never wait: what bounds the memory is the workers' credit. The hot path (receive, check, apply, encode, send) holds no
# GIL and makes no Python object.
#
# Locking: a channel's mutex before any latch. The state word is set once, by whoever notices the end first; the server loop leaves when it sees it,
# and a worker returns an error only when the loop has left, since until then the loop may write to the worker's buffers.
import logging

from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport uintptr_t
from libc.stdio cimport snprintf
from libc.stdlib cimport atoi, calloc, free, realloc
from libc.string cimport memcpy, memset, strcmp

from lapse._protocol cimport FINE, NO_MEMORY, SEND_FAILED, Protocol, Sink, out_t, worker_t
from lapse._protocol import VIOLATIONS
from lapse._sync cimport (add_u32, fence, load_i32, load_u32, load_u64, nanoseconds, park, pthread_mutex_destroy, pthread_mutex_init,
                          pthread_mutex_lock, pthread_mutex_unlock, set_once_i32, store_i32, store_u64, unlikely,
                          unpark)
from lapse._types cimport (ERR_FAILED as C_ERR_FAILED, ERR_FORKED as C_ERR_FORKED, ERR_INTERRUPTED as C_ERR_INTERRUPTED, ERR_MEMORY,
                           ERR_STOPPED as C_ERR_STOPPED)
from lapse._wire cimport GOODBYE, HEADER_BYTES, HELLO, MAGIC, MARK, STOP, VERSION, header_t
from lapse._zmq cimport (ZMQ_DONTWAIT, zmq_errno, zmq_msg_close, zmq_msg_data, zmq_msg_gets, zmq_msg_init, zmq_msg_init_size,
                         zmq_msg_recv, zmq_msg_send, zmq_msg_size, zmq_msg_t)

log = logging.getLogger("lapse.cluster")

# The same numbers for Python
ERR_STOPPED = C_ERR_STOPPED
ERR_FAILED = C_ERR_FAILED
ERR_INTERRUPTED = C_ERR_INTERRUPTED
ERR_FORKED = C_ERR_FORKED

cdef enum:
    DROP = -1                   # a stranger's frame
    BAD_HEADER = -200
    BAD_SENDER = -201
    BAD_SEQUENCE = -202
    BAD_GREETING = -203
    RECEIVE_FAILED = -204

BROKEN_CHANNEL = {
    BAD_HEADER: "a frame that is not one of this job's",
    BAD_SENDER: "a frame in the name of another node",
    BAD_SEQUENCE: "a message that was lost, doubled or out of order",
    BAD_GREETING: "a message before HELLO or after GOODBYE",
    RECEIVE_FAILED: "receiving failed",
}


cdef void report_dropped(int64_t so_far, const char* address) noexcept with gil:
    log.warning("dropped a frame from %s: it is not of this job (%d so far)",
                "a local process" if address == NULL else address.decode(errors="replace") or "a local process", so_far)


cdef class Van(Sink):
    """The channels of one node, and its server loop.

    protocol: what handles the messages. pull: the bound PULL socket; from now on only run() may use it. push: one connected PUSH socket per
    node (push[rank] leads to the own pull); from now on only the van may use them. job_id: 64 bits, the same on all nodes.
    authenticated: the transport tells who sent a frame (its User-Id is the rank), and frames that it does not vouch for are refused.
    """

    def __cinit__(self, Protocol protocol not None, pull, push, job_id, bint authenticated):
        cdef int i
        if len(push) != protocol.num_nodes:
            raise ValueError(f"{len(push)} sockets for {protocol.num_nodes} nodes")
        self.protocol = protocol
        self.me = protocol.me
        self.num_nodes = protocol.num_nodes
        self.job = job_id
        self.authenticated = authenticated
        self.sockets = (pull, list(push))
        self.pull = <void*><uintptr_t>pull.underlying
        self.channels = <channel_t*>calloc(self.num_nodes, sizeof(channel_t))
        if self.channels == NULL:
            raise MemoryError()
        for i in range(self.num_nodes):
            pthread_mutex_init(&self.channels[i].mutex, NULL)
            self.channels[i].socket = <void*><uintptr_t>push[i].underlying
            snprintf(self.channels[i].user, sizeof(self.channels[i].user), "%d", i)

    def __init__(self, Protocol protocol, pull, push, job_id, authenticated):
        protocol.connect(self)

    def __dealloc__(self):
        cdef int i
        if self.channels != NULL:
            for i in range(self.num_nodes):
                pthread_mutex_destroy(&self.channels[i].mutex)
        free(self.channels)

    # --- the sink ---------------------------------------------------------------------------------------------------------------

    cdef void lock(self, Rank dest) noexcept nogil:
        pthread_mutex_lock(&self.channels[dest].mutex)

    cdef void unlock(self, Rank dest) noexcept nogil:
        pthread_mutex_unlock(&self.channels[dest].mutex)

    cdef int alloc(self, out_t* out, size_t size) noexcept nogil:
        if zmq_msg_init_size(<zmq_msg_t*>out.storage, size) != 0:
            return ERR_MEMORY
        out.data = <char*>zmq_msg_data(<zmq_msg_t*>out.storage)
        out.size = size
        return 0

    cdef int send(self, Rank dest, out_t* out) noexcept nogil:
        cdef channel_t* channel = self.channels + dest
        if unlikely(channel.socket == NULL):
            zmq_msg_close(<zmq_msg_t*>out.storage)
            return C_ERR_FAILED
        stamp(self, channel, out)
        store_u64(&channel.handed, channel.sent)        # pairs with the load in serve
        if zmq_msg_send(<zmq_msg_t*>out.storage, channel.socket, ZMQ_DONTWAIT) < 0:
            # The connection is gone; the monitor knows why. A message that was not sent leaves a hole, so nothing may follow.
            zmq_msg_close(<zmq_msg_t*>out.storage)
            channel.sent -= 1
            return C_ERR_FAILED
        return 0

    cdef void discard(self, out_t* out) noexcept nogil:
        zmq_msg_close(<zmq_msg_t*>out.storage)

    cdef void wake(self, worker_t* w) noexcept nogil:
        add_u32(&w.event, 1)
        fence()                                 # pairs with the one between `sleeping` and the last look in Worker.block
        if load_u32(&w.sleeping):
            unpark(&w.event)

    cdef int64_t now(self) noexcept nogil:
        return nanoseconds()

    # --- receiving --------------------------------------------------------------------------------------------------------------

    cdef int check_header(self, char* data, size_t size, const char* user) noexcept nogil:
        """The sender's rank, DROP for a stranger's frame, or what is wrong with a member's."""
        cdef header_t* h = <header_t*>data
        cdef channel_t* channel
        cdef bint vouched = self.authenticated and user != NULL
        if size < HEADER_BYTES or h.magic != MAGIC or h.version != VERSION or h.job != self.job:
            return BAD_HEADER if vouched else DROP
        if h.type >= HELLO and (size != HEADER_BYTES or h.count != 0 or h.value_bytes != 0 or h.reserved != 0 or h.hops != 0):
            return BAD_HEADER if vouched else DROP
        if h.src >= <uint32_t>self.num_nodes:
            return BAD_SENDER if vouched else DROP
        channel = self.channels + h.src
        if self.authenticated:
            # Only inproc, which cannot be reached from outside, comes without a User-Id: that is this node itself.
            if user == NULL:
                if h.src != <uint32_t>self.me:
                    return DROP
            elif h.src == <uint32_t>self.me or strcmp(user, channel.user) != 0:
                return BAD_SENDER
        if h.seq != channel.received + 1:
            return BAD_SEQUENCE
        if h.type == MARK:
            if load_i32(&channel.greeted) == 0:
                return BAD_GREETING
        elif load_i32(&channel.greeted) != (0 if h.type == HELLO else 1) and h.type != STOP:
            return BAD_GREETING
        channel.received = h.seq
        return <int>h.src

    cdef void serve(self) noexcept nogil:
        cdef zmq_msg_t msg
        cdef char* data
        cdef char* aligned = NULL
        cdef const char* descriptor
        cdef const char* user
        cdef void* bigger
        cdef size_t size, room = 0
        cdef int src, rc = FINE
        cdef header_t* h
        zmq_msg_init(&msg)
        while load_i32(&self.state) == 0:
            if zmq_msg_recv(&msg, self.pull, 0) < 0:
                if zmq_errno() == EINTR or zmq_errno() == EAGAIN:
                    continue
                self.broken = RECEIVE_FAILED
                self.broken_by = self.me
                break
            load_u64(&self.channels[self.me].handed)    # inproc hands over the sender's own memory
            data = <char*>zmq_msg_data(&msg)
            size = zmq_msg_size(&msg)
            if <uintptr_t>data & 7:
                # libzmq hands out small messages where they lie in its receive buffer
                if size > room:
                    bigger = realloc(aligned, size)
                    if bigger == NULL:
                        self.broken = RECEIVE_FAILED
                        self.broken_by = self.me
                        break
                    aligned = <char*>bigger
                    room = size
                memcpy(aligned, data, size)
                data = aligned
            src = self.check_header(data, size, zmq_msg_gets(&msg, b"User-Id") if self.authenticated else NULL)
            if src == DROP:
                self.dropped += 1
                if self.dropped & (self.dropped - 1) == 0:      # the 1st, 2nd, 4th, 8th, ...: this takes the GIL
                    report_dropped(self.dropped, zmq_msg_gets(&msg, b"Peer-Address"))
                continue
            if src < 0:
                # whom the transport vouches for, not whom the frame names
                user = zmq_msg_gets(&msg, b"User-Id") if self.authenticated else NULL
                self.broken = src
                self.broken_by = atoi(user) if user != NULL else -1
                break
            h = <header_t*>data
            if h.type == MARK:
                continue
            self.received_messages += 1
            self.received_bytes += <int64_t>size
            if h.type < HELLO:
                rc = self.protocol.handle(data, size, src)
                if unlikely(rc != FINE):
                    self.broken = rc
                    self.broken_by = self.me if rc == NO_MEMORY else src
                    break
            elif h.type == STOP and src == self.me:
                break
            elif h.type == HELLO or h.type == GOODBYE:
                if h.type == HELLO:
                    descriptor = zmq_msg_gets(&msg, b"__fd")
                    self.channels[src].descriptor = atoi(descriptor) if descriptor != NULL else -1
                store_i32(&self.channels[src].greeted, 1 if h.type == HELLO else 2)
                add_u32(&self.changed, 1)
                unpark(&self.changed)
            else:
                self.broken = BAD_HEADER
                self.broken_by = src
                break
        zmq_msg_close(&msg)
        free(aligned)
        if self.broken:
            self.enter_state(C_ERR_FAILED)

    cdef void enter_state(self, int32_t code) noexcept nogil:
        """The first code stays. Everybody who waits looks again."""
        cdef int i
        cdef worker_t* w
        set_once_i32(&self.state, code)
        add_u32(&self.changed, 1)
        unpark(&self.changed)
        for i in range(self.protocol.max_workers):
            w = <worker_t*><uintptr_t>load_u64(<uint64_t*>&self.protocol.workers[i])
            if w != NULL:
                add_u32(&w.event, 1)
                unpark(&w.event)

    cdef void abort(self, int32_t code) noexcept nogil:
        """End this node's part in the job: wake everybody, and the server loop too."""
        self.enter_state(code)
        self.control(self.me, STOP)

    cdef int control(self, Rank dest, int kind) noexcept nogil:
        """Send a message without keys: 0, ERR_MEMORY or ERR_FAILED."""
        cdef out_t out
        cdef int rc
        if self.alloc(&out, HEADER_BYTES) != 0:
            return ERR_MEMORY
        memset(out.data, 0, HEADER_BYTES)
        (<header_t*>out.data).type = <unsigned char>kind
        (<header_t*>out.data).origin = <uint32_t>self.me
        self.lock(dest)
        rc = self.send(dest, &out)
        self.unlock(dest)
        return rc

    # --- for node.py --------------------------------------------------------------------------------------------------------------

    def run(self):
        """The server loop: serve messages until stop(), fail() or a violation. Blocking, without the GIL; one thread."""
        store_i32(&self.serving, 1)
        with nogil:
            self.serve()
            store_i32(&self.serving, 0)
            self.enter_state(load_i32(&self.state))

    def greet(self, double timeout=60.0):
        """Send HELLO on every channel. Blocking until the connections take it; returns the ranks that did not in time."""
        return self.say(HELLO, timeout)

    def say_goodbye(self, double timeout=10.0):
        """Send GOODBYE on every channel: nothing follows. Returns the ranks whose connection did not take it in time."""
        return self.say(GOODBYE, timeout)

    cdef list say(self, int kind, double timeout):
        cdef int64_t deadline = nanoseconds() + <int64_t>(timeout * 1e9)
        cdef int rc
        cdef Rank dest
        cdef uint32_t nothing = 0
        failed = []
        for dest in range(self.num_nodes):
            while True:
                with nogil:
                    rc = self.control(dest, kind)
                    if rc != 0 and nanoseconds() < deadline:
                        park(&nothing, 0, 2000000)
                if rc == 0 or nanoseconds() >= deadline or load_i32(&self.state) not in (0, C_ERR_STOPPED):
                    break
            if rc != 0:
                failed.append(dest)
        return failed

    def wait_greetings(self, double timeout):
        """Wait for the HELLO of every node; returns the ranks that are still missing after `timeout` seconds (or at a failure)."""
        return self.await_level(1, timeout)

    def connections(self):
        """{rank: file descriptor} of the connections that the HELLOs of the other nodes came by."""
        return {rank: self.channels[rank].descriptor for rank in range(self.num_nodes)
                if load_i32(&self.channels[rank].greeted) and self.channels[rank].descriptor >= 0}

    def wait_goodbyes(self, double timeout):
        """Wait for the GOODBYE of every node; returns the ranks that are still missing after `timeout` seconds (or at a failure)."""
        return self.await_level(2, timeout)

    cdef list await_level(self, int32_t level, double timeout):
        cdef int64_t deadline = nanoseconds() + <int64_t>(timeout * 1e9)
        cdef int64_t left
        cdef uint32_t seen
        while True:
            seen = load_u32(&self.changed)
            missing = [i for i in range(self.num_nodes) if load_i32(&self.channels[i].greeted) < level]
            left = deadline - nanoseconds()
            if not missing or left <= 0 or load_i32(&self.state) != 0:
                return missing
            with nogil:
                park(&self.changed, seen, min(left, 100000000))

    def send_marks(self, double interval):
        """Send MARK to every other node every `interval` seconds, which misses then what was lost before it: after HELLO, until this node
        does not work any more. Blocking, without the GIL, which somebody may hold who waits for what was lost; one thread.
        """
        cdef int64_t pause = <int64_t>(interval * 1e9)
        cdef int64_t due = nanoseconds() + pause
        cdef int64_t now
        cdef uint32_t seen
        cdef Rank dest
        with nogil:
            while True:
                seen = load_u32(&self.changed)
                if load_i32(&self.state) != 0:
                    break
                now = nanoseconds()
                if now < due:
                    park(&self.changed, seen, due - now)
                    continue
                for dest in range(self.num_nodes):
                    if dest != self.me:
                        self.control(dest, MARK)        # (where a connection is gone, the cluster knows it)
                due = now + pause

    def stop(self):
        """End the server loop after the messages that are already here. Does not block."""
        with nogil:
            self.control(self.me, STOP)

    def close(self):
        """Let go of the sockets, which are about to be closed: whoever still wants to send gets an error. After run()."""
        cdef Rank dest
        for dest in range(self.num_nodes):
            with nogil:
                self.lock(dest)
                self.channels[dest].socket = NULL
                self.unlock(dest)

    def fail(self, int code):
        """Every present and later call of every worker returns this ERR_ code; the server loop ends. Does not block.

        The first code given stays. ERR_FORKED touches no socket and no lock: those are the parent's.
        """
        if code == C_ERR_FORKED:
            self.state = code
            self.serving = 0
            return
        with nogil:
            self.abort(code)

    def last_number(self, Rank dest):
        """The sequence number of the last message to `dest`; one more, if that could not be sent."""
        return load_u64(&self.channels[dest].handed)

    def state_code(self):
        """0 while the node works, else the ERR_ code of every call."""
        return load_i32(&self.state)

    def violation(self):
        """What broke the protocol: None, or (rank of whose fault it is or -1, one sentence).

        None also when only a connection broke: the cluster notices that itself, and knows why.
        """
        if self.broken in (0, SEND_FAILED):
            return None
        if self.broken in BROKEN_CHANNEL:
            return self.broken_by, BROKEN_CHANNEL[self.broken]
        text = VIOLATIONS.get(self.broken, f"violation {self.broken}")
        if self.protocol.bad_key >= 0:
            text += f" (key {self.protocol.bad_key}, epoch {self.protocol.bad_epoch})"
        return self.broken_by, text

    def counters(self):
        """Messages and bytes so far, all kinds but MARK, with the headers; strangers' frames that were dropped."""
        cdef int i
        return {
            "sent_messages": sum([self.channels[i].messages for i in range(self.num_nodes) if i != self.me]),
            "sent_bytes": sum([self.channels[i].bytes for i in range(self.num_nodes) if i != self.me]),
            "received_messages": self.received_messages,
            "received_bytes": self.received_bytes,
            "dropped": self.dropped,
        }
