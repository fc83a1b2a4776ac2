"""Python's Worker: the primitives on arrays.

Design: a regular class, so that programs can subclass it freely; `self` is also the C-level Worker, which does the work. Each
call checks everything (`lapse._arrays`, key range, then lengths), then does everything. A small call whose keys are all local
keeps the GIL: giving it up and taking it back costs more than the copy, and nothing of it can wait. Every other call releases it.

A Worker belongs to one thread at a time; `busy` turns a mistake into a RuntimeError. What an unfinished pull writes to is held in
`Operations`, which outlives a dropped Worker. Only `Waiter`'s thread, which serves asyncio, looks on from outside.
"""
import asyncio
import threading
import weakref

import numpy as np

cimport numpy as cnp
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memset
from lapse._arrays cimport apart, key_array, key_view, lasting, numpy_type, shape_of, value_view, view_t
from lapse._operations cimport counters_t, op_finished, worker_t
from lapse._protocol cimport Protocol
from lapse._store cimport (HERE, batch_bytes, first_out_of_range, slot_word, state_of, store_t, visible_bytes)
from lapse._sync cimport fence, load_i32, load_i64, load_u32, park, store_i32, store_u32, swap_i32
from lapse._schemes cimport LOCAL, POOL
from lapse._types cimport (DONE, ERR_DRAW, ERR_FORKED, ERR_HELD, ERR_KEY_RANGE, ERR_MEMORY, ERR_NO_SAMPLING, ERR_SAMPLE, ERR_SAMPLE_COUNT,
                           ERR_TIMEOUT, ERR_TIMESTAMP, ERR_TOO_MANY, OP_LOCALIZE, OP_PULL, OP_PUSH, OP_SET, Key)
from lapse._types cimport Timestamp as Time
from lapse._worker cimport Worker as Core, drop_latches

from lapse.errors import KeyRangeError

cnp.import_array()

cdef enum:
    SMALL_KEYS = 16             # a call of more keys,
    SMALL_BYTES = 8192          # or of more bytes releases the GIL also when all is local
    PURGE_AT = 32
    NOT_HERE = -1000            # below every ERR_ code: nothing was done, because a key is not local
cdef int64_t SLICE = 2_000_000  # nanoseconds


class Timestamp(int):
    """The number of an asynchronous operation of one Worker: for `wait`, and a small future of its own.

    -1 stands for any operation that is finished. It can be awaited in asyncio.
    """

    _worker = None              # None: finished
    _array = None               # what a pull without vals fills

    def done(self):
        """Tell whether the operation has finished. Asynchronous; thread-safe; local."""
        return self._worker is None or self._worker.is_finished(self)

    def result(self, timeout=None):
        """Wait for the operation; return the array of a `pull(keys)` without vals, else None.

        TimeoutError after `timeout` seconds. Blocking; the Worker's thread; local.
        """
        if self._worker is not None:
            self._worker.wait(self, timeout)
        return self._array

    def __await__(self):
        if not self.done():
            future = asyncio.get_running_loop().create_future()
            add_waiting(self._worker, self, future)
            yield from future
        return self._array


FINISHED = Timestamp(DONE)


cdef class Operations:
    """What the Python face keeps of one Worker; when the Worker is dropped, the node holds this until all has finished."""
    cdef:
        readonly dict held      # {timestamp: arrays} of pulls that may be unfinished
        Py_ssize_t purge_at
        worker_t* w             # borrowed from protocol
        Protocol protocol
        Waiter waiter
        bint asynchronous       # the default of this Worker
        bint direct             # local keys are reached without the node's own channel
        readonly bint finalized
        Time issued             # timestamps below this had been given when the Worker was finalized
        int typenum             # NumPy's
        int64_t op_timeout      # nanoseconds; -1: for ever
        readonly object finalizer

    def __len__(self):
        return len(self.held)

    def purge(self):
        """Let go of the arrays of finished pulls; returns how many are left. For the one thread that this belongs to."""
        for ts in [ts for ts in self.held if op_finished(self.w, ts)]:
            del self.held[ts]
        return len(self.held)
    def __cinit__(self):
        self.held = {}

    def let_go(self):
        """Give back what a Worker that is gone has not released. Nobody else uses its slot meanwhile."""
        if self.w != NULL:
            drop_latches(self.protocol, self.w)

    cdef int hold(self, Time ts, object arrays) except -1:
        if len(self.held) >= self.purge_at:
            self.purge()
            self.purge_at = max(PURGE_AT, 2 * len(self.held))
        self.held[ts] = arrays
        return 0

    cdef Waiter waiter_of(self, Core me):
        if self.waiter is None:
            self.waiter = Waiter.__new__(Waiter)
            self.waiter.w = me.w
            self.waiter.protocol = me.protocol
        return self.waiter


cdef class Waiter:
    """Completes asyncio futures: a thread that sleeps on the worker's event while timestamps are awaited.

    Locking: `condition` guards pending and running. The thread shares the sleeping flag with the Worker's own thread, which may
    take it down while this one sleeps; hence the slices.
    """
    cdef:
        worker_t* w             # borrowed from protocol
        Protocol protocol
        object condition
        list pending            # (Worker, timestamp, future); only these keep the Worker alive
        bint running

    def __cinit__(self):
        self.condition = threading.Condition()
        self.pending = []

    def add(self, Core me, ts, future):
        with self.condition:
            self.pending.append((me, ts, future))
            if not self.running:
                self.running = True
                threading.Thread(target=self.run, name="lapse-waiter", daemon=True).start()
            self.condition.notify()

    def run(self):
        cdef uint32_t seen
        cdef list pending
        while True:
            left = pending = entry = None
            with self.condition:
                if not self.pending and not self.condition.wait_for(self.is_wanted, 1.0):
                    self.running = False
                    return
                pending, self.pending = self.pending, []
            seen = load_u32(&self.w.event)
            left = [entry for entry in pending if not self.settle(entry[0], entry[1], entry[2])]
            with self.condition:
                self.pending += left
            if left:
                with nogil:
                    store_u32(&self.w.sleeping, 1)
                    fence()
                    if load_u32(&self.w.event) == seen:
                        park(&self.w.event, seen, SLICE)

    def is_wanted(self):
        return len(self.pending) > 0

    cdef bint settle(self, Core me, ts, future) except -1:
        cdef int code = 1 if op_finished(self.w, ts) else me.is_finished(ts)
        error = None
        if code == 0:
            return False
        if code < 0:
            try:
                fail(me, code)
            except BaseException as caught:
                error = caught
        try:
            future.get_loop().call_soon_threadsafe(conclude, future, error)
        except RuntimeError:            # the loop has been closed: nobody waits any more
            pass
        return True


cdef int add_waiting(Core me, ts, future) except -1:
    operations_of(me).waiter_of(me).add(me, int(ts), future)
    return 0


def conclude(future, error):
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


# --- errors and small conversions ---------------------------------------------------------------------------------------------

cdef int fail(Core me, int code) except -1:
    """Raise what an ERR_ code means."""
    if me.signal is not None:           # a signal handler's exception
        error, me.signal = me.signal, None
        raise error
    if code == ERR_DRAW and me.draw_error is not None:
        error, me.draw_error = me.draw_error, None
        raise error
    if code == ERR_TIMEOUT:
        raise TimeoutError("the operation is still under way: its time is up")
    if code == ERR_MEMORY:
        raise MemoryError("no memory for the operation")
    if code == ERR_HELD:
        raise RuntimeError("a call between acquire and release")
    if code == ERR_TOO_MANY:
        raise ValueError("too many keys in one call")
    if code == ERR_TIMESTAMP:
        raise ValueError("a timestamp that this Worker never gave")
    if code == ERR_KEY_RANGE:
        raise KeyRangeError(f"a key is not in [0, {me.protocol.store.num_keys})")
    if code == ERR_NO_SAMPLING:
        raise RuntimeError("call Server.enable_sampling_support before the first Worker")
    if code == ERR_DRAW:
        raise RuntimeError("the distribution's callable has failed")
    if code == ERR_SAMPLE:
        raise ValueError("a sample that this Worker never prepared")
    if code == ERR_SAMPLE_COUNT:
        raise ValueError("more draws than the sample has left, or more different ones than there are")
    raise me.server._error(code)


cdef Operations operations_of(Core me):
    """The face's state of a Worker that can be used."""
    if type(me.buffers) is not Operations:
        raise RuntimeError("lapse.Worker.__init__ has not been called")
    if me.w == NULL:
        raise RuntimeError("this Worker has been finalized")
    if load_i32(&me.van.state) == ERR_FORKED:
        fail(me, ERR_FORKED)
    return <Operations>me.buffers


cdef int enter(Core me, worker_t* w) except -1:
    if swap_i32(&w.busy, 1):
        raise RuntimeError(f"worker {me.index} is in use by another thread: a Worker belongs to one thread at a time")
    if me.w != w:                       # by what the arguments ran when they were looked at, or by another thread meanwhile
        store_i32(&w.busy, 0)
        raise RuntimeError("this Worker has been finalized")
    return 0


cdef int64_t nanoseconds_of(Operations ops, object timeout) except? -2:
    """A timeout in seconds; None: the job's op_timeout."""
    if timeout is None:
        return ops.op_timeout
    seconds = float(timeout)
    if not seconds >= 0:
        raise ValueError(f"timeout must be a number of seconds, at least 0, not {timeout!r}")
    return <int64_t>(seconds * 1e9) if seconds < 9e9 else -1


cdef bint is_later(Operations ops, object asynchronous, dict options) except -1:
    """Whether a call is asynchronous; options: a caller's `**{"async": ...}`."""
    if options:
        if "async" not in options or len(options) > 1:
            wrong = [name for name in options if name != "async"]
            raise TypeError(f"unexpected keyword argument {wrong[0]!r}")
        if asynchronous is not None:
            raise TypeError("both asynchronous and async are given")
        asynchronous = options["async"]
    return ops.asynchronous if asynchronous is None else bool(asynchronous)


cdef Time time_of(Core me, object timestamp) except? -3:
    """The number in a timestamp; DONE for those that stand for finished operations."""
    if isinstance(timestamp, Timestamp) and timestamp._worker is not None and timestamp._worker is not me:
        raise ValueError(f"timestamp {timestamp!r} is another Worker's")
    cdef Time ts = timestamp.__index__() if not isinstance(timestamp, int) else timestamp
    if ts < DONE:
        raise ValueError(f"timestamp {ts} was never given")
    return ts


cdef int check_range(const store_t* store, const Key* keys, Py_ssize_t n) except -1:
    cdef Py_ssize_t bad = first_out_of_range(keys, n, store.num_keys)
    if bad >= 0:
        raise KeyRangeError.of(keys[bad], store.num_keys)
    return 0


cdef Key one_key(const store_t* store, object key) except? -1:
    number = key.__index__()
    if not 0 <= number < store.num_keys:
        raise KeyRangeError.of(number, store.num_keys)
    return number


cdef int check_size(const store_t* store, Py_ssize_t n, size_t needed_bytes, object vals, const view_t* view) except -1:
    cdef Py_ssize_t needed = needed_bytes // store.itemsize
    if view.size != needed or (view.ndim == 2 and view.first != n):
        what = f"{view.size} values" if view.ndim == 1 else f"values of shape {shape_of(vals)}"
        raise ValueError(f"{n} {'key has' if n == 1 else 'keys have'} {needed} values, but vals has {what}")
    return 0


cdef cnp.ndarray room_for(const store_t* store, int typenum, Py_ssize_t n, size_t bytes_):
    """A new array for the values of n keys: [n, length], or one run of all where lengths differ."""
    cdef cnp.npy_intp[2] shape
    if store.visible == NULL:
        shape[0], shape[1] = n, <cnp.npy_intp>(store.uniform_visible // store.itemsize)
        return cnp.PyArray_SimpleNew(2, shape, typenum)
    shape[0] = <cnp.npy_intp>(bytes_ // store.itemsize)
    return cnp.PyArray_SimpleNew(1, shape, typenum)


# --- the primitives -------------------------------------------------------------------------------------------------------------

cdef Time try_here(Core me, Operations ops, int kind, const Key* keys, Py_ssize_t n, void* vals):
    """Do a small operation on local keys under the GIL, if nothing of it can wait. A timestamp or code, or NOT_HERE."""
    cdef worker_t* w = me.w
    cdef Py_ssize_t i
    cdef int done
    if kind == OP_PULL:
        done = me.pull_if_local(keys, n, vals)
        return DONE if done == 1 else NOT_HERE if done == 0 else done
    for i in range(n):
        if not me.is_local(keys[i]):
            return NOT_HERE
    if kind == OP_LOCALIZE:
        if load_i32(&me.van.state) or w.held:
            return NOT_HERE
        w.counters.localized_local += n
        return DONE
    # Should a key leave now, the operation is sent, and credit for it is what issue would wait for.
    if (load_i64(&w.pins.cached) or load_i64(&w.ops[w.next_ts & w.mask].remaining)
            or load_i64(&w.open_bytes) + SMALL_BYTES + 16 * SMALL_KEYS > me.credit_bytes):
        return NOT_HERE
    return me.issue(kind, keys, n, vals)


cdef object operate(Core me, int kind, object keys, object vals, object asynchronous, object timeout, dict options):
    """One primitive: check, issue, and wait or hand out a timestamp."""
    cdef Operations ops = operations_of(me)
    cdef const store_t* store = me.protocol.store
    cdef worker_t* w = me.w
    cdef bint later = is_later(ops, asynchronous, options)
    cdef int64_t limit = nanoseconds_of(ops, timeout)
    cdef view_t view
    cdef object key_room = key_view(keys, False, &view)
    cdef const Key* k = <const Key*>view.data
    cdef Py_ssize_t n = view.size
    cdef object room = None
    cdef void* v = NULL
    cdef size_t size = 0
    cdef Time ts = NOT_HERE
    cdef int code = 0
    if later and timeout is not None:
        raise ValueError("timeout is for synchronous calls; give it to wait")
    check_range(store, k, n)
    if kind != OP_LOCALIZE:
        size = batch_bytes(store, k, n)
        if vals is None and kind == OP_PULL:
            room = room_for(store, ops.typenum, n, size)
            v = cnp.PyArray_DATA(<cnp.ndarray>room)
        else:
            room = value_view(vals, ops.typenum, kind == OP_PULL, &view)
            check_size(store, n, size, room, &view)
            v = view.data
            if kind == OP_PULL:
                apart(k, n, v, size)
    enter(me, w)
    try:
        if n <= SMALL_KEYS and size <= SMALL_BYTES and ops.direct:
            ts = try_here(me, ops, kind, k, n, v)
        if ts == NOT_HERE:
            with nogil:
                me.patience = limit
                ts = me.issue(kind, k, n, v)
                me.patience = -1
                if ts >= 0 and not later:
                    code = me.wait_for(ts, limit)
        elif ts >= 0 and not later:
            with nogil:
                code = me.wait_for(ts, limit)
        settle(me, ops, ts, code, later, (key_room, room) if kind == OP_PULL else None)
    finally:
        store_i32(&w.busy, 0)
    return answer(me, ts, later, room if kind == OP_PULL and vals is None else None)


cdef int settle(Core me, Operations ops, Time ts, int code, bint later, tuple arrays) except -1:
    """Raise what an operation has failed of; hold the arrays of a pull that goes on, so that what it writes to stays where it is."""
    if ts == ERR_TIMEOUT:
        raise TimeoutError("nothing was done: the operations under way have used up the credit, and the time is up")
    if ts < DONE:
        fail(me, <int>ts)
    if arrays is not None and ts >= 0 and (later or code):
        ops.hold(ts, arrays)
        ops.held[ts] = arrays[0], lasting(arrays[1])
    if code:
        fail(me, code)
    return 0


cdef object answer(Core me, Time ts, bint later, object made):
    """What the caller gets: a timestamp, or the array that was made for him."""
    if not later:
        return FINISHED if made is None else made
    if ts < 0 and made is None:
        return FINISHED
    result = Timestamp(ts)
    if ts >= 0:
        result._worker = me
    result._array = made
    return result


# --- sampling -------------------------------------------------------------------------------------------------------------------

cdef int sample_fails(Core me, int code, int64_t handle, Py_ssize_t n) except -1:
    cdef int64_t left
    if code == ERR_SAMPLE:
        raise ValueError(f"sample {handle}: this Worker never prepared it")
    if code == ERR_SAMPLE_COUNT:
        left = me.sampler.left_of(handle)
        raise ValueError(f"sample {handle} has {left} draws left, not {n}")
    return fail(me, code)


cdef object pull_drawn(Core me, object sample, object keys, object vals, object asynchronous, object timeout, dict options):
    """pull_sample: check, draw, then pull what was drawn."""
    cdef Operations ops = operations_of(me)
    cdef const store_t* store = me.protocol.store
    cdef worker_t* w = me.w
    cdef bint later = is_later(ops, asynchronous, options)
    cdef int64_t limit = nanoseconds_of(ops, timeout)
    cdef int64_t handle = handle_of(sample)
    cdef view_t view
    cdef object key_room = key_view(keys, True, &view)
    cdef Key* k = <Key*>view.data
    cdef Py_ssize_t n = view.size
    cdef object room = None
    cdef void* v = NULL
    cdef Time ts = NOT_HERE
    cdef int code = 0
    cdef bint small
    if later and timeout is not None:
        raise ValueError("timeout is for synchronous calls; give it to wait")
    if me.sampler is None:
        fail(me, ERR_NO_SAMPLING)
    if vals is not None:
        room = value_view(vals, ops.typenum, True, &view)
        check_room(store, n, me.sampler.sampling.longest, me.sampler.sampling.uniform, room, &view)
        v = view.data
        apart(k, n, v, n * me.sampler.sampling.longest)
    elif me.sampler.sampling.uniform:
        room = room_for_drawn(ops.typenum, n, me.sampler.sampling.longest // store.itemsize, store.visible == NULL)
        v = cnp.PyArray_DATA(<cnp.ndarray>room)
    small = n <= SMALL_KEYS and n * me.sampler.sampling.longest <= SMALL_BYTES and ops.direct
    enter(me, w)
    try:
        if small and room is not None and me.sampler.sampling.scheme != POOL:
            code = me.draw_sample(handle, k, n)
            if code == 0:
                if me.sampler.sampling.scheme == LOCAL:
                    code = me.pull_drawn(k, n, v)
                    ts = DONE if code > 0 else NOT_HERE
                    code = min(code, 0)
                if ts == NOT_HERE and code == 0:
                    ts = try_here(me, ops, OP_PULL, k, n, v)
        else:
            with nogil:
                me.patience = limit
                code = me.draw_sample(handle, k, n)
                me.patience = -1
        if code == ERR_TIMEOUT:
            raise TimeoutError("nothing was drawn: the pool is empty, and the time is up")
        if code != 0:
            sample_fails(me, code, handle, n)
        if room is None:
            room = room_for(store, ops.typenum, n, batch_bytes(store, k, n))
            v = cnp.PyArray_DATA(<cnp.ndarray>room)
        if ts == NOT_HERE or ts >= 0:
            with nogil:
                if ts == NOT_HERE:
                    me.patience = limit
                    ts = me.pull_drawn(k, n, v) if me.sampler.sampling.scheme == LOCAL and not small else 0
                    ts = DONE if ts > 0 else me.issue(OP_PULL, k, n, v) if ts == 0 else ts
                    me.patience = -1
                if ts >= 0 and not later:
                    code = me.wait_for(ts, limit)
        if ts == ERR_TIMEOUT:
            raise TimeoutError("keys has the draws, but their values were not pulled: the operations under way have used up the credit, "
                               "and the time is up")
        settle(me, ops, ts, code, later, (key_room, room))
    finally:
        store_i32(&w.busy, 0)
    return answer(me, ts, later, room if vals is None else None)


cdef int64_t handle_of(object sample) except? -2:
    try:
        return sample.__index__()
    except AttributeError:
        raise TypeError(f"a sample is an int, not {type(sample).__name__}") from None
    except OverflowError:
        raise ValueError(f"sample {sample}: this Worker never prepared it") from None


cdef cnp.ndarray room_for_drawn(int typenum, Py_ssize_t n, Py_ssize_t length, bint rows):
    cdef cnp.npy_intp[2] shape
    shape[0], shape[1] = n, length
    if rows:
        return cnp.PyArray_SimpleNew(2, shape, typenum)
    shape[0] = n * length
    return cnp.PyArray_SimpleNew(1, shape, typenum)


cdef int check_room(const store_t* store, Py_ssize_t n, size_t longest, bint uniform, object vals, const view_t* view) except -1:
    """Room for whatever will be drawn: exactly that where all values are equally long, else for n of the longest."""
    cdef Py_ssize_t needed = n * <Py_ssize_t>(longest // store.itemsize)
    if view.size != needed or (view.ndim == 2 and view.first != n):
        what = f"{view.size} values" if view.ndim == 1 else f"values of shape {shape_of(vals)}"
        need = "have" if uniform else "may have up to"
        raise ValueError(f"{n} {'draw' if n == 1 else 'draws'} {need} {needed} values, but vals has {what}")
    return 0


class Worker(Core):
    """The view of one worker thread on the parameters: `Worker(customer_id, server)` or `Worker(app_id, customer_id, server)`.

    The ids are labels. `asynchronous=True` makes asynchronous the default of pull, push, set and localize. RuntimeError when the
    server has been shut down, ValueError when as many Workers live as `lapse.setup` declared threads.

    keys: 1-D int64 array (NumPy, or torch in main memory), or a list, tuple or range of ints. vals: 1-D, or 2-D [keys, length], of
    the server's dtype, used in place. Wrong keys: KeyRangeError; wrong sizes or layouts: ValueError; wrong types: TypeError; all
    before anything is sent or written. Every call raises NodeFailure once the job has failed.

    One thread; local. Lapse: Renz-Wieland et al., PVLDB 13(11), 2020.
    """

    def __init__(self, *ids, server=None, asynchronous=False, **labels):
        cdef Core me = self
        cdef Operations ops = Operations.__new__(Operations)
        if server is None and ids:
            *ids, server = ids
        if not (hasattr(server, "_node") and len(ids) + len(labels) in (1, 2) and not labels.keys() - {"app_id", "customer_id"}):
            raise TypeError("Worker(customer_id, server) or Worker(app_id, customer_id, server)")
        if type(me.buffers) is Operations:
            raise RuntimeError("this Worker has been initialised before")
        node = server._node
        index = node.enter(self)
        try:
            me.attach(server, index, node.config.credit_bytes, labels.get("customer_id", ids[len(ids) - 1] if ids else None))
        except BaseException:
            node.leave(index)
            raise
        ops.w = me.w
        ops.protocol = me.protocol
        ops.purge_at = PURGE_AT
        ops.asynchronous = asynchronous
        ops.direct = me.protocol.shared_memory
        ops.typenum = numpy_type(me.protocol.store.dtype)
        ops.op_timeout = -1 if node.config.op_timeout is None else <int64_t>(node.config.op_timeout * 1e9)
        me.buffers = ops
        ops.finalizer = weakref.finalize(self, node.dropped, index, ops)
        ops.finalizer.atexit = False

    # --- primitives

    def pull(self, keys, vals=None, asynchronous=None, *, timeout=None, **options):
        """Read the values of `keys` into `vals`, or into a new array.

        Returns a timestamp, -1 when finished; without vals the array ([keys, length], or 1-D where lengths differ), or asynchronously
        a timestamp whose result is the array. An asynchronous pull holds its arrays until it has finished.
        TimeoutError after `timeout` seconds: the pull goes on. Blocking or asynchronous; one thread; local.
        """
        return operate(self, OP_PULL, keys, vals, asynchronous, timeout, options)

    def push(self, keys, vals, asynchronous=None, *, timeout=None, **options):
        """Add `vals` to the values of `keys`. Returns a timestamp, -1 when finished; vals has been copied then.

        Duplicate keys all count. TimeoutError after `timeout` seconds: the push goes on.
        Blocking or asynchronous; one thread; local.
        """
        return operate(self, OP_PUSH, keys, vals, asynchronous, timeout, options)

    def staggered_push(self, keys, vals, asynchronous=None, *, timeout=None, **options):
        """Push many keys: the same as `push`, which splits what is large by itself. Blocking or asynchronous; one thread; local."""
        return operate(self, OP_PUSH, keys, vals, asynchronous, timeout, options)

    def set(self, keys, vals, asynchronous=None, *, timeout=None, **options):
        """Overwrite the values of `keys` with `vals`. Returns a timestamp, -1 when finished; vals has been copied then.

        Of duplicate keys the last one counts. TimeoutError after `timeout` seconds: the set goes on.
        Blocking or asynchronous; one thread; local.
        """
        return operate(self, OP_SET, keys, vals, asynchronous, timeout, options)

    def localize(self, keys, asynchronous=None, *, timeout=None, **options):
        """Relocate `keys` to this node. Returns a timestamp, -1 when finished.

        A hint: finished when the keys have arrived once, though another node may have taken them since.
        Blocking or asynchronous; one thread; local.
        """
        return operate(self, OP_LOCALIZE, keys, None, asynchronous, timeout, options)

    # --- sampling

    def prepare_sample(self, n, start=None, end=0):
        """Prepare n draws from the server's distribution; returns the number of the sample, for `pull_sample`.

        Scheme preloc draws them here, and begins to localize them. start and end (clocks) have no effect yet.
        RuntimeError before `Server.enable_sampling_support`; ValueError when n < 0, or, without replacement, when there are not so many
        keys.
        Asynchronous; one thread; local.
        """
        cdef Core me = self
        cdef Operations ops = operations_of(me)
        cdef worker_t* w = me.w
        cdef int64_t count, handle
        if me.sampler is None:
            fail(me, ERR_NO_SAMPLING)
        try:
            n = n.__index__()
        except AttributeError:
            raise TypeError(f"the number of draws must be an int, not {type(n).__name__}") from None
        if not 0 <= n < 2**32:
            raise ValueError(f"the number of draws must be in [0, 2**32), not {n}")
        count = n
        enter(me, w)
        with nogil:
            handle = me.prepare_sample(count)
        store_i32(&w.busy, 0)
        if handle == ERR_SAMPLE_COUNT:
            raise ValueError(f"{count} different keys cannot be drawn: there are {me.sampler.sampling.support}")
        if handle < 0:
            fail(me, <int>handle)
        return handle

    def pull_sample(self, sample, keys, vals=None, asynchronous=None, *, timeout=None, **options):
        """Draw as many keys of `sample` as `keys` has room for; fill `keys` with them and `vals` with their values.

        Returns as `pull` does: without vals the array. Where values of the distribution's keys differ in length, vals has room for the
        longest, and is filled from the front. ValueError for a sample that was never prepared, or has fewer draws left: nothing is drawn then.
        TimeoutError after `timeout` seconds: with an empty pool nothing was drawn; else the draws are in `keys`, and the pull goes on, unless
        the error says that there was no credit for it (`pull` the keys then).
        Blocking or asynchronous (but for an empty pool); one thread; local.
        """
        return pull_drawn(self, sample, keys, vals, asynchronous, timeout, options)

    def finish_sample(self, sample):
        """Give up what is left of `sample`; nothing when it has been used up or finished before.

        ValueError for a sample that was never prepared. Asynchronous; one thread; local.
        """
        cdef Core me = self
        cdef Operations ops = operations_of(me)
        cdef worker_t* w = me.w
        cdef int64_t handle = handle_of(sample)
        cdef int code
        if me.sampler is None:
            fail(me, ERR_NO_SAMPLING)
        enter(me, w)
        code = me.finish_sample(handle)
        store_i32(&w.busy, 0)
        if code:
            sample_fails(me, code, handle, 0)

    # --- what is local

    def pull_if_local(self, keys, vals=None):
        """Read `keys` if all of them are local: True and vals filled, or False and vals undefined. Sends nothing.

        Without vals: the array, or None. Asynchronous; one thread; local.
        """
        cdef Core me = self
        cdef Operations ops = operations_of(me)
        cdef worker_t* w = me.w
        cdef view_t view
        cdef object key_room = key_view(keys, False, &view)
        cdef const Key* k = <const Key*>view.data
        cdef Py_ssize_t n = view.size
        cdef object room
        cdef size_t size
        cdef void* v
        cdef int code
        check_range(me.protocol.store, k, n)
        size = batch_bytes(me.protocol.store, k, n)
        if vals is None:
            room = room_for(me.protocol.store, ops.typenum, n, size)
            v = cnp.PyArray_DATA(<cnp.ndarray>room)
        else:
            room = value_view(vals, ops.typenum, True, &view)
            check_size(me.protocol.store, n, size, room, &view)
            v = view.data
            apart(k, n, v, size)
        enter(me, w)
        if n <= SMALL_KEYS and size <= SMALL_BYTES:
            code = me.pull_if_local(k, n, v)
        else:
            with nogil:
                code = me.pull_if_local(k, n, v)
        store_i32(&w.busy, 0)
        if code < 0:
            fail(me, code)
        if vals is None:
            return room if code else None
        return code == 1

    def is_local(self, keys):
        """Tell whether a key is local (an int), or which keys are (a bool array). Asynchronous; one thread; local."""
        cdef Core me = self
        operations_of(me)
        if hasattr(keys, "__index__") and not getattr(keys, "ndim", 0):
            return me.is_local(one_key(me.protocol.store, keys))
        return local_mask(me.protocol, keys)

    # --- waiting

    def wait(self, timestamp, timeout=None):
        """Wait for the operation of `timestamp`; at once, as often as called, when it has finished.

        ValueError for a timestamp that this Worker never gave, TimeoutError after `timeout` seconds.
        Blocking; one thread; local.
        """
        cdef Core me = self
        cdef Time ts = time_of(me, timestamp)
        cdef Operations ops
        cdef worker_t* w = me.w
        cdef int64_t limit
        cdef int code
        if ts == DONE or was_finalized(me, ts):
            return
        ops = operations_of(me)
        limit = nanoseconds_of(ops, timeout)
        enter(me, w)
        with nogil:
            code = me.wait_for(ts, limit)
        store_i32(&w.busy, 0)
        if code:
            fail(me, code)
        ops.held.pop(ts, None)

    def waitall(self, timeout=None):
        """Wait for all operations of this Worker. TimeoutError after `timeout` seconds. Blocking; one thread; local."""
        cdef Core me = self
        cdef Operations ops = operations_of(me)
        cdef worker_t* w = me.w
        cdef int64_t limit = nanoseconds_of(ops, timeout)
        cdef int code
        enter(me, w)
        with nogil:
            code = me.waitall_for(limit)
        store_i32(&w.busy, 0)
        if code:
            fail(me, code)
        ops.held.clear()

    wait_all = waitall

    def is_finished(self, timestamp):
        """Tell whether the operation of `timestamp` has finished. Asynchronous; one thread; local."""
        cdef Core me = self
        cdef Time ts = time_of(me, timestamp)
        cdef Operations ops
        cdef int code
        if ts == DONE or was_finalized(me, ts):
            return True
        ops = operations_of(me)
        code = me.is_finished(ts)
        if code < 0:
            fail(me, code)
        if code:
            ops.held.pop(ts, None)
        return code == 1

    def barrier(self, timeout=None):
        """Wait until every worker slot of every node has come here. Does not complete asynchronous operations.

        TimeoutError after `timeout` seconds. Blocking; one thread; collective over all workers.
        """
        cdef Core me = self
        cdef worker_t* w = me.w
        operations_of(me)
        enter(me, w)
        try:
            me.server._node.worker_barrier(me.index, timeout)
        finally:
            store_i32(&w.busy, 0)

    # --- life

    def begin_setup(self):
        """Begin to initialise the model: wait for all operations, then a barrier. Blocking; one thread; collective over all workers."""
        self.waitall()
        self.barrier()

    def end_setup(self):
        """End the initialisation of the model: wait for all operations, a barrier, and statistics start from zero.

        Blocking; one thread; collective over all workers.
        """
        cdef Core me = self
        self.waitall()
        self.barrier()
        me.server._node.reset_stats(me.index)
        self.barrier()

    def finalize(self, timeout=None):
        """End this Worker: wait for all its operations, then a barrier over all workers. Calling it again does nothing.

        TimeoutError after `timeout` seconds; the Worker can be finalized again then.
        Blocking; one thread; collective over all workers.
        """
        cdef Core me = self
        cdef Operations ops
        cdef worker_t* w = me.w
        cdef int64_t limit
        cdef int code
        if w == NULL:
            return
        ops = operations_of(me)
        limit = nanoseconds_of(ops, timeout)
        node = me.server._node
        enter(me, w)
        try:
            if not node.closed:
                with nogil:
                    code = me.waitall_for(limit)
                if code:
                    fail(me, code)
                node.worker_barrier(me.index, timeout)
        except TimeoutError:
            store_i32(&w.busy, 0)
            raise
        except BaseException:
            self._detach()
            raise
        self._detach()

    def _detach(self):
        cdef Core me = self
        cdef Operations ops = me.buffers
        cdef worker_t* w = me.w
        ops.finalizer.detach()
        drop_latches(me.protocol, w)
        if me.sampler is not None:
            me.sampler.give_up()
        ops.issued = w.next_ts
        ops.finalized = True
        me.w = NULL
        store_i32(&w.busy, 0)
        me.server._node.finalized(me.index, ops)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        cdef Core me = self
        if kind is None:
            self.finalize()
        elif me.w != NULL:              # as if dropped: the others are not to wait for this one
            node, ops = me.server._node, me.buffers
            self._detach()
            node.dropped(me.index, ops)

    # --- facts

    def get_key_size(self, key_id=0):
        """Return the number of values of a key. Asynchronous; thread-safe; local."""
        cdef Core me = self
        operations_of(me)
        return visible_bytes(me.protocol.store, one_key(me.protocol.store, key_id)) // me.protocol.store.itemsize

    get_len = get_key_size

    @property
    def num_keys(self):
        """The number of keys of the job. Asynchronous; thread-safe; local."""
        cdef Core me = self
        operations_of(me)
        return me.protocol.store.num_keys

    def get_num_keys(self):
        """Return the number of keys of the job. Asynchronous; thread-safe; local."""
        return self.num_keys

    def reset_stats(self):
        """Start this Worker's statistics from zero. Asynchronous; one thread; local."""
        cdef Core me = self
        operations_of(me)
        memset(&me.w.counters, 0, sizeof(counters_t))

    def __repr__(self):
        cdef Core me = self
        state = "not initialised" if type(me.buffers) is not Operations else "finalized" if me.w == NULL else f"{len(me.buffers)} arrays held"
        return f"<{type(self).__name__} {me.index}, {state}>"


cdef bint was_finalized(Core me, Time ts) except -1:
    """A finalized Worker has finished everything that it ever issued."""
    return me.w == NULL and type(me.buffers) is Operations and ts < (<Operations>me.buffers).issued


def local_mask(Protocol protocol not None, keys):
    """Which keys are local at this instant, as a bool array. Asynchronous; thread-safe; local."""
    cdef view_t view
    cdef object key_room = key_view(keys, False, &view)
    cdef const Key* k = <const Key*>view.data
    cdef Py_ssize_t i, n = view.size
    cdef const store_t* store = protocol.store
    check_range(store, k, n)
    cdef cnp.ndarray mask = np.empty(n, np.bool_)
    cdef char* out = <char*>cnp.PyArray_DATA(mask)
    with nogil:
        for i in range(n):
            out[i] = state_of(store, k[i], slot_word(store, k[i])) == HERE
    return mask


def checked_keys(Protocol protocol not None, keys):
    """`keys` as an int64 array of keys that exist. Asynchronous; thread-safe; local."""
    cdef cnp.ndarray a = key_array(keys)
    check_range(protocol.store, <const Key*>cnp.PyArray_DATA(a), cnp.PyArray_DIM(a, 0))
    return a
