"""The C level as its users see it: a .pyx out of tree that cimports lapse, and that nothing waits for the GIL."""
import os
import subprocess
import sys
import sysconfig
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import lapse
from lapse._build import kind

pytest.importorskip("Cython")
PACKAGE = str(Path(lapse.__file__).parents[1])
SANITIZERS = {"asan": "-fsanitize=address,undefined", "tsan": "-fsanitize=thread"}

USER = '''
# cython: language_level=3
"""A user of the C level: every method, keys and values as pointers."""
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.stddef cimport size_t
from lapse cimport (ACQUIRE_MAX, DONE, ERR_FAILED, ERR_HELD, ERR_KEY_RANGE, ERR_STOPPED, ERR_TIMEOUT, ERR_TIMESTAMP, ERR_TOO_MANY, Key,
                    Timestamp, Worker, acquire_two, count_pairs, look, prefetch_row, prefetch_slot, release_two, sight_t, two_rows_t)

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>
    static inline int32_t flag_get(int32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void flag_set(int32_t *p, int32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline void flag_spin(int32_t *p, int32_t until) {
        struct timespec little = {0, 20000};
        while (flag_get(p) != until) nanosleep(&little, 0);      /* holds whatever the caller holds, but leaves the core */
    }
    """
    int32_t flag_get(int32_t*) noexcept nogil
    void flag_set(int32_t*, int32_t) noexcept nogil
    void flag_spin(int32_t*, int32_t) noexcept nogil


def every_method(Worker kv):
    cdef Key keys[3]
    cdef float vals[12]
    cdef float out[12]
    cdef void* rows[3]
    cdef Timestamp ts
    cdef int i, rc
    cdef list seen = []
    cdef bint ok = True
    keys[0], keys[1], keys[2] = 1, 3, 5
    with nogil:
        for i in range(12):
            vals[i] = i
            out[i] = -1
        ts = kv.set(keys, 3, vals)
        rc = kv.wait(ts)
    seen.append(("set", rc))
    with nogil:
        ts = kv.push(keys, 3, vals)
        rc = kv.wait_for(ts, 60_000_000_000)
    seen.append(("push", rc))
    with nogil:
        ts = kv.localize(keys, 3)
        rc = kv.waitall()
    seen.append(("localize", rc))
    with nogil:
        ts = kv.pull(keys, 3, out)
        rc = kv.waitall_for(60_000_000_000)
    seen.append(("pull", rc))
    seen.append(("finished", kv.is_finished(ts)))
    seen.append(("values", [out[i] for i in range(12)]))
    with nogil:
        for i in range(12):
            out[i] = -1
        rc = kv.pull_if_local(keys, 3, out)
    seen.append(("pull_if_local", rc))
    seen.append(("is_local", kv.is_local(3)))
    seen.append(("value_length", kv.value_length(3)))
    seen.append(("num_keys", kv.num_keys()))
    return seen, [out[i] for i in range(12)]


def in_place(Worker kv, Key first, Key second):
    """Add 100 to the row of `first` and swap it with `second`'s, both in place."""
    cdef Key[2] keys
    cdef void* rows[2]
    cdef float* a
    cdef float* b
    cdef float x
    cdef Py_ssize_t i, length
    cdef int got, between, rc
    keys[0], keys[1] = first, second
    with nogil:
        length = kv.value_length(first)
        got = kv.acquire(keys, 2, rows)
        a = <float*>rows[0]
        b = <float*>rows[1]
        if got == 2:
            for i in range(length):
                x = a[i] + 100
                a[i] = b[i]
                b[i] = x
        between = kv.pull_if_local(keys, 2, &x)
        rc = kv.release(3)
    return got, between == ERR_HELD, a == b, rc


def two_in_place(Worker kv, Key first, Key second, int64_t times=1):
    """Add 1 to the rows of both keys, so often; whether there was anything to be seen, and how often both were had."""
    cdef sight_t sight
    cdef two_rows_t two
    cdef bint sees
    cdef Py_ssize_t i, length
    cdef int64_t turn, got = 0
    with nogil:
        sees = look(kv, &sight)
        if sees:
            length = kv.value_length(0)
            for turn in range(times):
                if 0 <= first < kv.num_keys():
                    prefetch_slot(&sight, first)
                    prefetch_row(&sight, first, length * sizeof(float))
                if acquire_two(&sight, first, second, &two):
                    for i in range(length):
                        (<float*>two.row[0])[i] += 1
                        (<float*>two.row[1])[i] += 1
                    release_two(&two)
                    got += 1
        elif acquire_two(&sight, first, second, &two):
            got = -1
        count_pairs(&sight, got)
    return sees, got


def keep_latched(Worker kv, Key key):
    """An acquire whose release is forgotten."""
    cdef void* row
    return kv.acquire(&key, 1, &row)


def codes(Worker kv):
    """Each kind of refusal, as (name, was it)."""
    cdef Key key = -1
    cdef Key many[ACQUIRE_MAX + 1]
    cdef void* rows[ACQUIRE_MAX + 1]
    cdef float x[4]
    cdef int i
    for i in range(ACQUIRE_MAX + 1):
        many[i] = 0
    result = [("below", kv.pull(&key, 1, x) == ERR_KEY_RANGE)]
    key = kv.num_keys()
    result.append(("beyond", kv.push(&key, 1, x) == ERR_KEY_RANGE))
    result.append(("localize", kv.localize(&key, 1) == ERR_KEY_RANGE))
    result.append(("acquire", kv.acquire(&key, 1, rows) == ERR_KEY_RANGE))
    result.append(("many", kv.acquire(many, ACQUIRE_MAX + 1, rows) == ERR_TOO_MANY))
    result.append(("timestamp", kv.wait(1 << 40) == ERR_TIMESTAMP))
    result.append(("done", kv.wait(DONE) == 0))
    result.append(("nothing", kv.pull(NULL, 0, NULL) == DONE))
    return result


def stopped(Worker kv):
    cdef Key key = 1
    cdef float x[4]
    return kv.pull(&key, 1, x) == ERR_STOPPED and kv.pull_if_local(&key, 1, x) == ERR_STOPPED


def meet(Worker kv):
    cdef int rc
    with nogil:
        rc = kv.barrier()
    return rc


# --- the GIL, without a clock: a flag in memory is passed back and forth

def pull_while_held(Worker kv, int n, size_t flag, Key key):
    """Without the GIL: say so (flag 3), wait until somebody holds it (flag 1), complete n local pulls and pushes, say so (flag 2)."""
    cdef int32_t* f = <int32_t*>flag
    cdef float x[4]
    cdef int i
    cdef Timestamp worst = 0
    with nogil:
        flag_set(f, 3)
        flag_spin(f, 1)
        for i in range(n):
            worst = min(worst, kv.wait(kv.pull(&key, 1, x)), kv.wait(kv.push(&key, 1, x)))
        flag_set(f, 2)
    return worst


def hold_the_gil(size_t flag):
    """When the other thread is without the GIL (flag 3): say that this one has it (flag 1), and keep it until flag 2."""
    cdef int32_t* f = <int32_t*>flag
    with nogil:
        flag_spin(f, 3)
    flag_set(f, 1)
    flag_spin(f, 2)


def hold_the_gil_until(size_t flag, int32_t begin, int32_t end):
    cdef int32_t* f = <int32_t*>flag
    flag_set(f, begin)
    flag_spin(f, end)


def wait_for_flag(size_t flag, int32_t value):
    with nogil:
        flag_spin(<int32_t*>flag, value)


def set_flag(size_t flag, int32_t value):
    flag_set(<int32_t*>flag, value)
'''

SETUP = '''
from setuptools import Extension, setup
setup(name="user", ext_modules=[Extension("user", ["user.pyx"], extra_compile_args=["-O1"])])
'''


@pytest.fixture(scope="session")
def user(tmp_path_factory):
    """The user's module, compiled in a folder of its own by an ordinary setup.py."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user.pyx").write_text(USER.lstrip())
    (folder / "setup.py").write_text(SETUP)
    # It inlines latches, which a sanitizer has to see as those of the package.
    environment = {**os.environ, "PYTHONPATH": PACKAGE, "CFLAGS": SANITIZERS.get(kind, "")}
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, env=environment, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / f"user{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    sys.path.insert(0, str(folder))
    try:
        import user
    finally:
        sys.path.remove(str(folder))
    return user


EXPECTED = [("set", 0), ("push", 0), ("localize", 0), ("pull", 0), ("finished", 1), ("values", [2.0 * i for i in range(12)])]


@pytest.mark.parametrize("shared_memory", [True, False])
def test_every_method(user, serve, shared_memory):
    kv = lapse.Worker(0, serve(4, shared_memory=shared_memory))
    seen, pulled = user.every_method(kv)
    assert seen[:6] == EXPECTED
    if shared_memory:
        assert seen[6:] == [("pull_if_local", 1), ("is_local", True), ("value_length", 4), ("num_keys", 100)]
        assert pulled == [2.0 * i for i in range(12)]
    kv.finalize()


def test_in_place(user, serve):
    server = serve(4)
    kv = lapse.Worker(0, server)
    kv.set([1, 2], np.array([[1] * 4, [2] * 4], np.float32))
    assert user.in_place(kv, 1, 2) == (2, True, False, 0)
    assert kv.pull([1, 2])[:, 0].tolist() == [2, 101]
    assert user.in_place(kv, 2, 1) == (2, True, False, 0)           # in any order
    assert kv.pull([1, 2])[:, 0].tolist() == [201, 2]
    assert user.in_place(kv, 1, 1) == (2, True, True, 0)            # a key twice: one row
    assert kv.pull([1])[0, 0] == 301
    kv.finalize()


def test_two_in_place(user, serve):
    server = serve(4, threads=2)
    kv, other = lapse.Worker(0, server), lapse.Worker(1, server)
    kv.set(range(100), np.zeros((100, 4), np.float32))
    before = server.stats()
    assert user.two_in_place(kv, 1, 2) == user.two_in_place(kv, 2, 1) == (True, 1)
    after = server.stats()
    assert after.pulled.local - before.pulled.local == after.pushed.local - before.pushed.local == 4
    for pair in ((3, 3), (-1, 3), (3, -1), (100, 3), (3, 100), (3, 2**62)):
        assert user.two_in_place(kv, *pair) == (True, 0)
    assert server.stats().pushed.local == after.pushed.local
    other.push(range(100), np.zeros((100, 4), np.float32))         # nothing is held
    assert kv.pull(range(5))[:, 3].tolist() == [0, 2, 2, 0, 0]
    assert user.keep_latched(kv, 50) == 1
    assert user.two_in_place(kv, 1, 2) == (False, 0)                # between acquire and release
    kv = None                                                       # one that is gone holds nothing
    assert user.two_in_place(other, 50, 1) == (True, 1)
    server.shutdown()
    assert user.two_in_place(other, 1, 2) == (False, 0)


def test_two_in_place_without_shared_memory(user, serve):
    kv = lapse.Worker(0, serve(4, shared_memory=False))
    assert user.two_in_place(kv, 1, 2) == (False, 0)
    kv.finalize()
    assert user.two_in_place(kv, 1, 2) == (False, 0)


def test_two_in_place_loses_nothing(user, serve):
    """Two threads want the same rows in opposite order, and others of theirs."""
    server = serve(2, threads=2)
    workers = [lapse.Worker(i, server) for i in range(2)]
    workers[0].set(range(100), np.zeros((100, 2), np.float32))
    pairs = [[(1, 2), (2, 3)], [(2, 1), (3, 2)]]

    def work(i):
        for _ in range(20):
            for pair in pairs[i]:
                assert user.two_in_place(workers[i], *pair, 10_000) == (True, 10_000)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert workers[0].pull([1, 2, 3])[:, 1].tolist() == [400_000, 800_000, 400_000]


TWO_NODES = '''
import sys
sys.path.insert(0, {folder!r})
import numpy as np
import user
import lapse
lapse.setup(10, 1)
server = lapse.Server(4)
kv = lapse.Worker(0, server)
here, there = (0, 9) if server.my_rank() == 0 else (9, 0)
kv.set([here], np.zeros((1, 4), np.float32))
kv.barrier()
for pair in ((here, there), (there, here)):
    assert user.two_in_place(kv, *pair) == (True, 0)
kv.barrier()
if server.my_rank() == 0:
    kv.localize([9])
    for pair in ((0, 9), (9, 0)):
        assert user.two_in_place(kv, *pair) == (True, 1)
kv.barrier()
assert kv.pull([0, 9])[:, 0].tolist() == [2, 2]        # nothing is held
kv.finalize()
server.shutdown()
'''


def test_two_in_place_where_one_is_elsewhere(user, run_program):
    run_program(textwrap.dedent(TWO_NODES).format(folder=str(Path(user.__file__).parent)), nodes=2)


@pytest.mark.parametrize("end", ["dropped", "finalized", "left by an exception", "replaced at once"])
def test_forgotten_release(user, serve, end):
    """The rows of a Worker that is gone are not latched for ever."""
    server = serve(4, threads=2)
    other = lapse.Worker(1, server)
    kv = lapse.Worker(0, server)
    assert user.keep_latched(kv, 7) == 1
    if end == "finalized":
        with pytest.raises(RuntimeError, match="between acquire and release"):
            kv.finalize()
    elif end == "left by an exception":
        with pytest.raises(KeyError), kv:
            raise KeyError
    del kv
    if end == "replaced at once":
        kv = lapse.Worker(0, server)
        assert user.in_place(kv, 7, 8)[0] == 2
        kv = None
    other.push([7], np.ones((1, 4), np.float32))
    assert other.pull([7])[0, 0] in (1, 1 + 100)
    other = None


def test_codes(user, serve):
    server = serve(4)
    kv = lapse.Worker(0, server)
    assert all(right for _, right in user.codes(kv)), user.codes(kv)
    assert user.meet(kv) == 0
    server.shutdown()
    assert user.stopped(kv)
    assert user.meet(kv) < 0


def test_subclass_at_c_level(user, serve):
    class Own(lapse.Worker):
        pass

    kv = Own(0, serve(4))
    assert user.every_method(kv)[0][:6] == EXPECTED
    kv.finalize()
    with pytest.raises(TypeError):
        user.every_method(object())


def test_finalized_worker_at_c_level(user, serve):
    kv = lapse.Worker(0, serve(4))
    kv.finalize()
    assert user.stopped(kv)


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared_memory", "server_thread"])
def test_local_operations_while_another_thread_holds_the_gil(user, serve, shared_memory):
    """Ends only when the worker gets its operations done although the main thread keeps the GIL in C code."""
    kv = lapse.Worker(0, serve(4, shared_memory=shared_memory))
    flag = np.zeros(1, np.int32)
    results = []
    thread = threading.Thread(target=lambda: results.append(user.pull_while_held(kv, 10_000, flag.ctypes.data, 5)))
    thread.start()
    user.hold_the_gil(flag.ctypes.data)
    thread.join()
    assert results == [0]
    kv.finalize()


def test_python_calls_wait_without_the_gil(user, serve):
    """A synchronous call of Python that goes through the server thread: the GIL is free while it waits, and it is not needed
    to answer it. Were it held by the waiting thread, the main thread could never raise the flag."""
    kv = lapse.Worker(0, serve(4, shared_memory=False))
    other = np.zeros(1, np.int32)
    stop = threading.Event()
    count = []

    def work():
        while not stop.is_set():
            kv.pull([1])
            kv.push(np.arange(50), np.zeros((50, 4), np.float32))
            kv.waitall()
            count.append(1)
        kv.finalize()

    thread = threading.Thread(target=work)
    thread.start()
    while len(count) < 100 and thread.is_alive():
        user.set_flag(other.ctypes.data, len(count))
    stop.set()
    thread.join()
    assert len(count) >= 100


REMOTE = '''
import mmap, os, sys
sys.path.insert(0, {folder!r})
import numpy as np
import user
import lapse
lapse.setup(10, 1)
server = lapse.Server(4)
kv = lapse.Worker(0, server)
rank = server.my_rank()
if rank == 1:
    kv.set([9], np.full(4, 7, np.float32))
    with open("flag.tmp", "wb") as file:
        file.write(bytes(4096))
    os.rename("flag.tmp", "flag")
kv.barrier()
with open("flag", "r+b") as file:
    shared = mmap.mmap(file.fileno(), 4096)
flag = np.frombuffer(shared, np.int32)
address = flag.ctypes.data
if rank == 1:
    user.hold_the_gil_until(address, 1, 2)          # the owner keeps its GIL until the answers have arrived
else:
    user.wait_for_flag(address, 1)
    assert kv.pull([9]).tolist() == [[7] * 4]
    kv.push([9], np.ones(4, np.float32))
    kv.push([8, 9] * 500, np.ones((1000, 4), np.float32))
    assert kv.pull([9]).tolist() == [[508] * 4]
    kv.localize([9])
    assert kv.is_local(9)
    user.set_flag(address, 2)
kv.barrier()
assert kv.pull([9]).tolist() == [[508] * 4]
kv.finalize()
server.shutdown()
print("answered")
'''


def test_owner_answers_while_its_main_thread_holds_the_gil(user, run_program):
    """2 nodes: pull, push and localize of keys whose owner's GIL is held in C all the time."""
    folder = str(Path(user.__file__).parent)
    done = run_program(textwrap.dedent(REMOTE).format(folder=folder), nodes=2)
    assert done.stdout.count("answered") == 2, done.stdout + done.stderr
