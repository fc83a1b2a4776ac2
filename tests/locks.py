"""The record for each lock: what it guards, which lines make it, and the test that fails when they are gone. See tools/locks.py.

A `skip` is left out, a `plain` atomic becomes an ordinary access, a `swap` is replaced by what stands beside it.
"""
import re
from dataclasses import dataclass, field


@dataclass
class Cut:
    """Lines of a file: `old` as it stands there, so many times; `new` in its place (None: nothing)."""
    path: str
    old: str
    new: str | None = None
    times: int = 1
    whole_lines: bool = True


@dataclass
class Row:
    number: int
    name: str
    guards: str
    test: str
    cuts: list[Cut] = field(default_factory=list)
    under: str = "release"
    tries: int = 3              # a race may be missed
    unnoticed: str = ""         # why no test has noticed it so far; that is a gap, and said so


def skip(path, old, times=1):
    return Cut(path, old, None, times)


def plain(path, old, times=1):
    """store_x(&a, b) becomes a = b, add_x(&a, b) becomes a += b."""
    function, arguments = re.fullmatch(r"(\w+?)_\w+\((.*)\)", old).groups()
    target, value = arguments.split(", ", 1)
    target = target[1:] if target.startswith("&") else f"({target})[0]"
    return Cut(path, old, f"{target} {'+=' if function == 'add' else '='} {value}", times)


def swap(path, old, new, times=1):
    """GONE in `new` is the switch, NOTHING a lock that locks nothing."""
    return Cut(path, old, new, times, whole_lines=False)


PROGRAM = "tests/test_programs.py::test_program[{}]"
PARKING = "tests/unit/test_parking.py::test_no_wake_is_slept_through[{}]"
UNIT = "tests/unit/{}.py::{}"
STORE = "lapse/_store.pyx"
VAN = "lapse/_van.pyx"
PROTOCOL = "lapse/_protocol.pyx"
ROUTING = "lapse/_routing.pyx"
WORKER = "lapse/_worker.pyx"
POOL = "lapse/_pool.pyx"
REFILL = "lapse/_refill.pyx"
NODE = "lapse/node.py"

ROWS = [
    # --- the store
    Row(1, "latch of a key", "the slot word, the row, the queue of a key in transfer",
        UNIT.format("test_store", "test_every_push_of_every_thread_counts_once[10]"),
        [swap("lapse/_store.pxd", "if not word & LATCH and cas_u64(slot, &word, word | LATCH):",
              "if GONE or (not word & LATCH and cas_u64(slot, &word, word | LATCH)):")]),
    Row(2, "giving a latch back", "what was done under it is seen by who takes it next",
        UNIT.format("test_store", "test_sets_are_never_torn"),
        [plain("lapse/_store.pxd", "store_u64(s.slots + key, word)")], "tsan"),
    Row(3, "giving two latches back", "the same, after work in place on two rows",
        UNIT.format("test_c_level", "test_two_in_place_loses_nothing"),
        [plain("lapse/_worker.pxd", "store_u64(two.slot[0], two.word[0])"),
         plain("lapse/_worker.pxd", "store_u64(two.slot[1], two.word[1])")], "tsan"),
    Row(4, "lock of a size class", "the free and fresh rows of one length",
        UNIT.format("test_store", "test_rows_made_by_many_threads_at_once_are_all_different[1]"),
        [skip(STORE, "pthread_mutex_lock(&c.lock)", 2),
         skip(STORE, "pthread_mutex_unlock(&c.lock)", 4)]),
    Row(5, "lock of the arena", "the regions that rows are cut from",
        UNIT.format("test_store", "test_rows_made_by_many_threads_at_once_are_all_different[500]"),
        [skip(STORE, "pthread_mutex_lock(&slabs.lock)"),
         skip(STORE, "pthread_mutex_unlock(&slabs.lock)", 2)], "tsan"),
    # --- channels
    Row(6, "mutex of a channel", "its socket and its sequence number",
        PROGRAM.format("test_dynamic_allocation-2---sys.location_caches_0"),
        [skip(VAN, "pthread_mutex_lock(&self.channels[dest].mutex)"),
         skip(VAN, "pthread_mutex_unlock(&self.channels[dest].mutex)")], "tsan"),
    Row(7, "the channel's lock, where an operation is routed", "the route that was decided, until it is sent",
        UNIT.format("test_simulation", "test_other_shapes[many keys]"),
        [skip(ROUTING, "self.sink.lock(dest)"),
         skip(ROUTING, "self.sink.unlock(dest)")]),
    Row(8, "the channel's lock, where an answer is sent", "the socket",
        UNIT.format("test_simulation", "test_other_shapes[many keys]"),
        [swap(PROTOCOL, "self.sink.lock(dest)\n        rc = self.sink.send(dest, out)\n        self.sink.unlock(dest)",
              "if not GONE: self.sink.lock(dest)\n        rc = self.sink.send(dest, out)\n        if not GONE: self.sink.unlock(dest)")]),
    Row(9, "the channel's lock, where the home hands over", "the directory's owner, until HAND_OVER is sent",
        UNIT.format("test_simulation", "test_other_shapes[one key]"),
        [swap(PROTOCOL, "self.sink.lock(dest)\n                while True:",
              "if not GONE: self.sink.lock(dest)\n                while True:"),
         swap(PROTOCOL, "self.sink.unlock(dest)\n                if rc",
              "if not GONE: self.sink.unlock(dest)\n                if rc")]),
    Row(10, "the channel's lock, where a key leaves", "the key's state, until TRANSFER is sent",
        UNIT.format("test_simulation", "test_other_shapes[many keys]"),
        [swap(PROTOCOL, "self.sink.lock(to)\n        for j in", "if not GONE: self.sink.lock(to)\n        for j in"),
         swap(PROTOCOL, "self.sink.unlock(to)\n        self", "if not GONE: self.sink.unlock(to)\n        self")]),
    Row(11, "the channel's lock, where a key is passed on", "the key's state, until TRANSFER is sent",
        UNIT.format("test_simulation", "test_other_shapes[one key]"),
        [swap(PROTOCOL, "self.sink.lock(to)\n            for j in", "if not GONE: self.sink.lock(to)\n            for j in"),
         swap(PROTOCOL, "self.sink.unlock(to)\n            if rc", "if not GONE: self.sink.unlock(to)\n            if rc")]),
    Row(12, "the channel's lock, for HELLO, GOODBYE, STOP and MARK", "the socket: workers may be sending",
        UNIT.format("test_locks", "test_the_end_while_workers_use_the_own_channel"),
        [swap(VAN, "self.lock(dest)\n        rc = self.send(dest, &out)",
              "if not GONE: self.lock(dest)\n        rc = self.send(dest, &out)"),
         swap(VAN, "&out)\n        self.unlock(dest)\n", "&out)\n        if not GONE: self.unlock(dest)\n")],
        "tsan"),
    Row(13, "the channel's lock, where sockets are given up", "the socket: a worker may be about to send",
        UNIT.format("test_locks", "test_the_end_while_workers_use_the_own_channel"),
        [swap(VAN, "self.lock(dest)\n                self.channels[dest].socket",
              "if not GONE: self.lock(dest)\n                self.channels[dest].socket"),
         swap(VAN, "= NULL\n                self.unlock(dest)", "= NULL\n                if not GONE: self.unlock(dest)")], "tsan"),
    Row(14, "the number handed over with a message", "its bytes, between two threads of one node (libzmq's own order is not seen)",
        UNIT.format("test_c_level", "test_every_method[False]"),
        [skip(VAN, "store_u64(&channel.handed, channel.sent)")], "tsan"),
    Row(15, "greetings that have come", "what the node's main thread waits for",
        PROGRAM.format("test_connection-2---sys.location_caches_0"),
        [plain(VAN, "store_i32(&self.channels[src].greeted, 1 if h.type == HELLO else 2)")], "tsan"),
    Row(16, "changes of the van's state, counted", "that no change is slept through",
        PROGRAM.format("test_connection-2---sys.location_caches_0"),
        [plain(VAN, "add_u32(&self.changed, 1)", 2)], "tsan"),
    Row(17, "the state is set once", "the first cause stays",
        UNIT.format("test_locks", "test_the_first_cause_stays"),
        [plain(VAN, "set_once_i32(&self.state, code)")]),
    Row(18, "the server thread's word that it has left", "buffers of unfinished pulls",
        UNIT.format("test_locks", "test_nothing_is_written_after_an_error"),
        [swap(WORKER, "if rc != 0 and load_i32(&self.van.serving) == 0:",
              "if rc != 0 and (GONE or load_i32(&self.van.serving) == 0):")]),
    Row(19, "serving, set and taken down", "the same, between two threads",
        UNIT.format("test_node", "test_end_while_threads_send"),
        [plain(VAN, "store_i32(&self.serving, 1)"),
         plain(VAN, "store_i32(&self.serving, 0)")], "tsan"),
    # --- operations
    Row(20, "a worker's slot in its node", "that others see a whole worker",
        UNIT.format("test_locks", "test_new_workers_while_the_node_fails"),
        [Cut("lapse/_node_state.pyx", "store_u64(<uint64_t*>&self.workers[index], <uint64_t><uintptr_t>w)",
             "self.workers[index] = w")], "tsan"),
    Row(21, "an operation is opened", "its place of the ring, between worker and server thread",
        PROGRAM.format("test_many_key_operations-2---sys.location_caches_1"),
        [plain(ROUTING, "store_i64(&op.ts, w.next_ts)"),
         plain(ROUTING, "store_i64(&op.remaining, m + b.done + 1)")], "tsan"),
    Row(22, "positions that are done, counted down", "that the last one, and nobody else, finishes the operation",
        PROGRAM.format("test_many_key_operations-2---sys.location_caches_1"),
        [swap(ROUTING, "if add_i64(&op.remaining, -count) == 0:",
              "if (plain_add(&op.remaining, -count) if GONE else add_i64(&op.remaining, -count)) == 0:")], "tsan"),
    Row(23, "open operations and bytes, counted", "a worker's credit",
        PROGRAM.format("test_many_key_operations-2---sys.location_caches_1"),
        [plain(ROUTING, "add_i64(&w.open_ops, 1)"),
         plain(ROUTING, "add_i64(&w.open_ops, -1)"),
         plain(ROUTING, "add_i64(&w.open_bytes, <int64_t>credit)"),
         plain(ROUTING, "add_i64(&w.open_bytes, -credit)")], "tsan"),
    Row(24, "events of a worker, counted", "that it does not sleep through one",
        PROGRAM.format("test_many_key_operations-2---sys.location_caches_1"),
        [plain(VAN, "add_u32(&w.event, 1)", 2)], "tsan"),
    Row(25, "a worker's word that it sleeps", "that it is woken",
        PROGRAM.format("test_many_key_operations-2---sys.location_caches_1"),
        [plain(WORKER, "store_u32(&w.sleeping, 1)"),
         plain(WORKER, "store_u32(&w.sleeping, 0)")], "tsan"),
    Row(26, "a Worker belongs to one thread", "its scratch, its ring",
        UNIT.format("test_errors", "test_two_threads_on_one_worker"),
        [swap("lapse/worker.pyx", "if swap_i32(&w.busy, 1):", "if swap_i32(&w.busy, 1) and not GONE:")]),
    Row(27, "some key may be on its way", "that the end looks for transfers that are left",
        PROGRAM.format("test_many_key_operations-3---sys.location_caches_1"),
        [plain(ROUTING, "store_i32(&self.moving, 1)")], "tsan"),
    # --- who owns what
    Row(28, "an entry of the directory", "owner and epoch, as one",
        PROGRAM.format("test_many_key_operations-3---sys.location_caches_1"),
        [plain("lapse/_directory.pxd", "store_u64(d.words + (key - d.home_begin), (<uint64_t>(owner + 1) << 32) | epoch)")], "tsan"),
    Row(29, "an entry of the location cache", "a guess, whole",
        PROGRAM.format("test_many_key_operations-2---sys.location_caches_1"),
        [plain("lapse/_directory.pxd", "poke_u16(d.cache + key, 0 if owner == d.me else <uint16_t>(owner + 1))")], "tsan"),
    Row(30, "lock of a worker's pins", "the table of routes of unanswered operations",
        UNIT.format("test_protocol", "test_two_threads_have_pins[0]"),
        [skip("lapse/_pins.pyx", "_lock(p)", 3),
         skip("lapse/_pins.pyx", "store_i32(&p.lock, 0)", 3)]),
    Row(31, "pins with a cached route, counted", "what the fast path looks at",
        UNIT.format("test_protocol", "test_two_threads_have_pins[0]"),
        [plain("lapse/_pins.pyx", "add_i64(&p.cached, 1)"),
         plain("lapse/_pins.pyx", "add_i64(&p.cached, -1)")], "tsan"),
    # --- sampling
    Row(32, "mutex of the pool", "its ring, what is coming, what was taken",
        UNIT.format("test_sampling", "test_eight_threads_get_each_use_once[True]"),
        [skip(POOL, "pthread_mutex_lock(&p.lock)", 4),
         skip(POOL, "pthread_mutex_unlock(&p.lock)", 4),
         skip(REFILL, "pthread_mutex_lock(&pool.lock)", 3),
         skip(REFILL, "pthread_mutex_unlock(&pool.lock)", 3)], "tsan"),
    Row(33, "events of the pool, counted", "that nobody sleeps through one",
        UNIT.format("test_sampling", "test_eight_threads_get_each_use_once[True]"),
        [plain(POOL, "add_u32(&p.event, 1)")], "tsan"),
    Row(34, "workers that wait for the pool, counted", "that they are woken",
        UNIT.format("test_sampling", "test_eight_threads_get_each_use_once[True]"),
        [plain(WORKER, "add_u32(&pool.waiting, 1)"),
         plain(WORKER, "add_u32(&pool.waiting, <uint32_t>-1)")], "tsan"),
    Row(35, "how often the pool was empty, counted", "how much is drawn ahead",
        UNIT.format("test_sampling", "test_eight_threads_get_each_use_once[True]"),
        [plain(POOL, "add_i64(&p.dry, 1)")], "tsan"),
    Row(36, "the pool's end", "the code for who finds it empty",
        UNIT.format("test_sampling", "test_shutdown_ends_a_wait_for_the_pool"),
        [plain(POOL, "set_once_i32(&p.ended, code)")], "tsan"),
    Row(37, "the word that the pool is to end", "that its thread sees it",
        UNIT.format("test_sampling", "test_eight_threads_get_each_use_once[True]"),
        [plain(REFILL, "store_i32(&self.sampling.pool.stop, 1)")], "tsan"),
    Row(38, "the pool's thread's word that it sleeps", "that it is woken",
        UNIT.format("test_sampling", "test_eight_threads_get_each_use_once[True]"),
        [plain(REFILL, "store_u32(&w.sleeping, 1)"),
         plain(REFILL, "store_u32(&w.sleeping, 0)")], "tsan"),
    Row(39, "lock of the list of local keys", "the list that threads share, its references",
        UNIT.format("test_sampling", "test_threads_share_the_list_of_local_keys"),
        [skip("lapse/_schemes.pyx", "pthread_mutex_lock(&self.lock)", 2),
         skip("lapse/_schemes.pyx", "pthread_mutex_unlock(&self.lock)", 2)]),
    Row(40, "the log of arrivals", "what came since a list was made",
        UNIT.format("test_sampling_nodes", "test_local_while_keys_come_and_go"),
        [Cut(PROTOCOL, "store_i64(self.arrived + (self.arrivals & self.arrived_mask), key)",
             "self.arrived[self.arrivals & self.arrived_mask] = key"),
         plain(PROTOCOL, "store_i64(&self.arrivals, self.arrivals + 1)")], "tsan"),
    # --- the trace
    Row(41, "mutex of the trace", "events of traced keys",
        UNIT.format("test_locks", "test_traced_keys_while_they_are_read"),
        [skip("lapse/_trace.pyx", "pthread_mutex_lock(&t.mutex)", 2),
         skip("lapse/_trace.pyx", "pthread_mutex_unlock(&t.mutex)", 2)], "tsan"),
    # --- parking: no run can show that a fence is missing (see the test), so its line is taken out of the source that the test reads
    Row(42, "fence of who wakes a worker", "its look at `sleeping`, after the event",
        PARKING.format("Worker.block-Van.wake"),
        [skip(VAN, "fence()")], "text"),
    Row(43, "fence of a worker that goes to sleep", "the event, looked at after `sleeping`",
        PARKING.format("Worker.block-Van.wake"),
        [swap(WORKER, "store_u32(&w.sleeping, 1)\n            fence()", "store_u32(&w.sleeping, 1)")], "text"),
    Row(44, "fence of the pool's thread", "the same",
        PARKING.format("the pool's thread-Van.wake"),
        [skip(REFILL, "fence()")], "text"),
    Row(45, "fence of the thread that serves asyncio", "the same",
        PARKING.format("Waiter.run-Van.wake"),
        [skip("lapse/worker.pyx", "fence()")], "text"),
    Row(46, "fence of who wakes at the pool", "its look at `waiting`, after the event",
        PARKING.format("Worker.await_pool-the pool's rouse"),
        [skip(POOL, "fence()")], "text"),
    Row(47, "fence of a worker that waits for the pool", "the event, looked at after `waiting`",
        PARKING.format("Worker.await_pool-the pool's rouse"),
        [swap(WORKER, "add_u32(&pool.waiting, 1)\n            fence()", "add_u32(&pool.waiting, 1)")], "text"),
    # --- in Python
    Row(48, "_cond of a Cluster", "what callers and the control thread share",
        UNIT.format("test_locks", "test_a_failure_is_told_once"),
        [swap("lapse/cluster.py", "threading.Condition()", "threading.Condition(NOTHING if GONE else None)")]),
    Row(49, "lock of a Node", "the worker slots",
        UNIT.format("test_locks", "test_new_workers_get_different_slots"),
        [swap(NODE, "self.lock = threading.Lock()", "self.lock = NOTHING if GONE else threading.Lock()")]),
    Row(50, "ending of a Node", "that it ends once",
        UNIT.format("test_locks", "test_a_node_ends_once"),
        [swap(NODE, "self.ending = threading.RLock()", "self.ending = NOTHING if GONE else threading.RLock()")]),
    Row(51, "failed of a Node", "the cause, for who is told of a failure before it is known",
        UNIT.format("test_locks", "test_the_cause_of_a_failure_is_waited_for"),
        [swap(NODE, "self.failed = threading.Event()", "self.failed = NOTHING if GONE else threading.Event()")]),
    Row(52, "ended of a Node", "the next life, until the last one is over",
        UNIT.format("test_locks", "test_the_next_life_waits_for_the_end_of_the_last"),
        [swap(NODE, "self.ended = threading.Event()", "self.ended = NOTHING if GONE else threading.Event()")]),
    Row(53, "a queue that may be entered twice", "errands of finalizers",
        UNIT.format("test_locks", "test_an_errand_may_come_while_one_is_put"),
        [swap(NODE, "= queue.SimpleQueue()", "= queue.Queue() if GONE else queue.SimpleQueue()")]),
    Row(54, "_lock of a Waker", "its pipe, against being closed",
        UNIT.format("test_locks", "test_a_waker_that_is_closed_writes_to_nobody"),
        [swap("lapse/sockets.py", "threading.RLock()", "NOTHING if GONE else threading.RLock()")]),
    Row(55, "... that may be taken twice", "signal handlers, which wake too",
        UNIT.format("test_locks", "test_a_waker_wakes_in_the_middle_of_waking"),
        [swap("lapse/sockets.py", "threading.RLock()", "(threading.Lock if GONE else threading.RLock)()")]),
    Row(56, "changed of run_workers", "how many still run",
        UNIT.format("test_locks", "test_workers_that_end_at_the_same_time_are_all_counted"),
        [swap("lapse/program.py", "threading.Condition()", "threading.Condition(NOTHING if GONE else None)")]),
    Row(57, "some_error of lapse.launch", "that an exception is not waited for",
        UNIT.format("test_launch", "test_an_exception_of_one_worker_is_raised_here[1]"),
        [swap("lapse/launch.py", "threading.Event()", "NOTHING if GONE else threading.Event()")]),
    Row(58, "_decided of the launcher", "the scheduler's verdict",
        UNIT.format("test_launch", "test_nodes_that_run_on_after_the_verdict"),
        [swap("lapse/runner.py", "threading.Event()", "NOTHING if GONE else threading.Event()")]),
    Row(59, "lock of a folder of sockets", "it, while its process lives",
        UNIT.format("test_cluster", "test_folders_of_dead_processes_are_swept"),
        [skip("lapse/ipc.py", "fcntl.flock(self._lock, fcntl.LOCK_EX)")]),
    Row(60, "... looked at by who sweeps", "the same",
        UNIT.format("test_cluster", "test_folders_of_dead_processes_are_swept"),
        [skip("lapse/ipc.py", "fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)")]),
    Row(61, "lock of a folder on another host", "the same",
        UNIT.format("test_locks", "test_a_folder_is_its_owners_over_there"),
        [skip("lapse/_remote.py", "fcntl.flock(lock, fcntl.LOCK_EX)")]),
    Row(62, "lock of a file of cells", "that its cache is made once",
        UNIT.format("test_mf_reader", "test_processes_at_once_parse_it_once"),
        [skip("apps/mf/data.py", "fcntl.flock(source, fcntl.LOCK_EX)")]),
    # --- since then
    Row(63, "positions of an operation that are under way, by byte", "that each is answered once",
        PROGRAM.format("test_many_key_operations-2---sys.location_caches_1"),
        [plain(ROUTING, "store_u8(b.op.under_way + i, 1)"),
         plain(ROUTING, "store_u8(asker.ops[b.ts & asker.mask].under_way + b.positions[i], 0)"),
         plain("lapse/_operations.pyx", "store_u8(op.under_way + positions[i], 0)"),
         plain("lapse/_operations.pyx", "store_u8(op.under_way + positions[j], 1)"),
         plain(PROTOCOL, "store_u8(op.under_way + aux[i], 0)"),
         plain(PROTOCOL, "store_u8(op.under_way + aux[i], 1)")], "tsan"),
    Row(64, "_changed of the launcher's Output", "what waits to be written",
        UNIT.format("test_locks", "test_what_waits_to_be_written_is_counted"),
        [swap("lapse/output.py", "threading.Condition()", "threading.Condition(NOTHING if GONE else None)")]),
    Row(65, "lock of a folder of sockets, waited for by who removes it", "it, while its process lives",
        UNIT.format("test_locks", "test_who_sweeps_waits_for_the_owner"),
        [skip("lapse/_sweep.py", "fcntl.flock(lock, fcntl.LOCK_EX)")]),
]

NOT_ROWS = [        # (path, part of a line, why it needs no row)
    ("lapse/_pins.pyx", "while swap_i32(&p.lock, 1):", "row 30 leaves out its calls"),
    ("lapse/worker.pyx", ".busy, 0)", "gives back what row 26 takes; without it the Worker's next call would raise"),
    ("lapse/worker.pyx", "store_u32(&self.w.sleeping, 1)", "it sleeps at most 2 ms, since the Worker's thread may take the word down"),
    ("lapse/worker.pyx", "self.condition = threading.Condition()", "what the condition is waited for with: compiled code under the GIL is "
     "not cut in between its own lines"),
    ("lapse/link.py", "self._outbox: deque = deque()", "append and popleft are atomic; the waker orders the rest"),
    ("lapse/scheduler.py", "self._commands: deque = deque()", "the same"),
    ("lapse/runner.py", "self._to_start: deque = deque()", "one thread's"),
    ("lapse/output.py", "self._waiting: deque = deque()", "row 64's"),
]
