"""What the primitives mean, on one node: through shared memory, and through the server thread (really asynchronous)."""
import asyncio
import gc
import textwrap
import threading

import numpy as np
import pytest

import lapse


@pytest.fixture(params=[True, False], ids=["shared_memory", "server_thread"])
def kv(serve, request):
    worker = lapse.Worker(0, serve(4, num_keys=1000, shared_memory=request.param))
    yield worker
    worker.finalize()


def ones(n, length=4):
    return np.ones((n, length), np.float32)


def test_starts_with_zeros(kv):
    assert not kv.pull(range(1000)).any()


def test_push_pull_set(kv):
    assert kv.push([1, 3, 5], ones(3)) == -1
    assert kv.push(np.array([3, 5]), 2 * ones(2)) == -1
    out = np.zeros((3, 4), np.float32)
    assert kv.pull([1, 3, 5], out) == -1
    assert out[:, 0].tolist() == [1, 3, 3]
    assert kv.set([3], np.arange(4, dtype=np.float32)) == -1
    flat = np.zeros(8, np.float32)
    assert kv.pull([3, 1], flat) == -1
    assert flat.tolist() == [0, 1, 2, 3, 1, 1, 1, 1]


def test_pull_without_vals(kv):
    kv.push([7], ones(1))
    out = kv.pull([7, 8])
    assert out.dtype == np.float32
    assert out.tolist() == [[1] * 4, [0] * 4]
    later = kv.pull(np.array([8, 7]), None, True)
    assert isinstance(later, int)
    assert later.result().tolist() == [[0] * 4, [1] * 4]
    assert later.result(0).tolist() == [[0] * 4, [1] * 4]


def test_own_lengths(serve):
    kv = lapse.Worker(0, serve([0, 1, 2, 3], num_keys=4, dtype="int64"))
    kv.push([3, 1, 2, 0], np.array([1, 2, 3, 4, 5, 6]))
    assert kv.pull([1, 2, 3]).tolist() == [4, 5, 6, 1, 2, 3]
    assert kv.pull([0]).tolist() == []
    assert [kv.get_key_size(key) for key in range(4)] == [0, 1, 2, 3]
    assert kv.get_len(2) == 2
    kv.finalize()


def test_stored_lengths(serve):
    kv = lapse.Worker(0, serve(2, num_keys=4, stored_lengths=5))
    assert kv.get_key_size() == 2
    kv.push([1], np.ones(2, np.float32))
    assert kv.pull([1]).tolist() == [[1, 1]]
    kv.finalize()


@pytest.mark.parametrize("empty", [[], (), range(0), np.empty(0, np.int64)])
def test_no_keys(kv, empty):
    assert kv.pull(empty).shape == (0, 4)
    assert kv.pull(empty, np.empty((0, 4), np.float32)) == -1
    assert kv.push(empty, np.empty(0, np.float32)) == -1
    assert kv.set(empty, np.empty(0, np.float32), True) == -1
    assert kv.localize(empty) == -1
    assert kv.pull_if_local(empty, np.empty(0, np.float32)) is True
    assert kv.is_local(empty).tolist() == []


def test_duplicate_keys(kv):
    kv.push([5, 5, 6, 5], ones(4))
    assert kv.pull([5, 6, 5])[:, 0].tolist() == [3, 1, 3]
    kv.set([8, 8, 8], np.arange(12, dtype=np.float32))
    assert kv.pull([8]).tolist() == [[8, 9, 10, 11]]
    many = np.arange(200) % 7
    kv.push(100 + many, ones(200))
    assert kv.pull(range(100, 107))[:, 0].tolist() == np.bincount(many).tolist()


@pytest.mark.parametrize("keys", [[1, 2, 3], (1, 2, 3), range(1, 4), np.array([1, 2, 3]), [np.int64(1), np.int32(2), 3]])
def test_kinds_of_keys(kv, keys):
    kv.push(keys, ones(3))
    assert kv.pull(keys)[:, 0].tolist() == [1, 1, 1]
    assert kv.pull(range(5))[:, 0].tolist() == [0, 1, 1, 1, 0]


def test_ranges_of_keys(kv):
    kv.push(range(1000), np.repeat(np.arange(1000, dtype=np.float32), 4))
    assert kv.pull(range(10, 0, -3))[:, 0].tolist() == [10, 7, 4, 1]


def test_values_as_lists(kv):
    kv.push([1], [1, 2, 3, 4])
    kv.push([1, 2], [[0.5] * 4, [1.5] * 4])
    assert kv.pull([1, 2]).tolist() == [[1.5, 2.5, 3.5, 4.5], [1.5] * 4]


@pytest.mark.parametrize("spelling", ["positional", "asynchronous", "async", "default"])
def test_asynchronous(serve, spelling):
    server = serve(4, shared_memory=False)
    kv = lapse.Worker(0, server, asynchronous=spelling == "default")
    positional, named = {"positional": ((True,), {}), "asynchronous": ((), {"asynchronous": True}),
                         "async": ((), {"async": True}), "default": ((), {})}[spelling]
    stamps = [kv.push([1], ones(1), *positional, **named), kv.set([2], ones(1), *positional, **named),
              kv.localize([3], *positional, **named)]
    out = np.zeros(4, np.float32)
    stamps.append(kv.pull([1], out, *positional, **named))
    assert [int(ts) for ts in stamps if ts >= 0] == sorted(int(ts) for ts in stamps if ts >= 0)
    assert sum(ts >= 0 for ts in stamps) >= 3
    for ts in stamps * 2:               # as often as called
        kv.wait(ts)
        assert kv.is_finished(ts)
        assert ts.done()
        assert ts.result() is None
        kv.wait(int(ts))
    assert out.tolist() == [1] * 4
    if spelling == "default":
        assert kv.pull([1], out, False) == -1
    kv.waitall()
    kv.wait_all()
    kv.finalize()
    assert all(ts.done() for ts in stamps)


def test_wait_of_everything(kv):
    out = np.zeros(4, np.float32)
    kv.wait(kv.push([1], ones(1)))
    kv.wait(kv.pull([1], out))
    kv.wait(kv.pull([1], out, True))
    kv.wait(-1)
    kv.wait(np.int64(-1))
    assert kv.is_finished(-1)
    assert out.tolist() == [1] * 4


def test_program_order_of_asynchronous_operations(kv):
    outs = np.zeros((200, 4), np.float32)
    for i in range(200):
        kv.push([i % 3], ones(1), True)
        kv.pull([i % 3], outs[i], True)
    kv.waitall()
    assert outs[:, 0].tolist() == [i // 3 + 1 for i in range(200)]


def test_await(serve):
    server = serve(4, shared_memory=False, threads=2)
    kv, other = lapse.Worker(0, server), lapse.Worker(1, server)

    async def main():
        await kv.push([1], ones(1), True)
        await kv.push([1], ones(1))             # a synchronous one is finished
        out = np.zeros(4, np.float32)
        assert await kv.pull([1], out, True) is None
        assert out.tolist() == [2] * 4
        assert (await kv.pull([1], None, True)).tolist() == [[2] * 4]
        many = [worker.pull([1, 2], None, True) for _ in range(100) for worker in (kv, other)]
        results = await asyncio.gather(*map(awaiting, many))
        assert all(result[0].tolist() == [2] * 4 for result in results)
        waiting = asyncio.ensure_future(awaiting(kv.pull([1], None, True)))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        kv.waitall()

    async def awaiting(stamp):
        return await stamp

    asyncio.run(asyncio.wait_for(main(), 60))
    assert len(kv.buffers) == 0
    kv = other = None


def test_localize_and_locality(kv):
    assert kv.localize([1, 2, 3]) == -1
    kv.wait(kv.localize(np.arange(100), True))
    assert kv.is_local(5) is True
    assert kv.is_local([1, 2]).tolist() == [True, True]


def test_pull_if_local(serve):
    kv = lapse.Worker(0, serve(4))
    kv.push([1], ones(1))
    out = np.zeros((2, 4), np.float32)
    assert kv.pull_if_local([1, 2], out) is True
    assert out[:, 0].tolist() == [1, 0]
    assert kv.pull_if_local([1]).tolist() == [[1] * 4]
    assert kv.pull_if_local(np.arange(100)).shape == (100, 4)
    kv.finalize()


def test_facts(kv):
    assert kv.num_keys == kv.get_num_keys() == 1000
    assert kv.get_key_size() == 4
    assert kv.index == 0
    assert "Worker 0" in repr(kv)


def test_setup_brackets_reset_statistics(serve):
    server = serve(4, threads=2)
    workers = [lapse.Worker(i, server) for i in range(2)]

    def work(kv):
        kv.begin_setup()
        kv.push(range(100), ones(100))
        kv.end_setup()
        kv.pull([1, 2, 3])
        kv.barrier()
        kv.finalize()

    threads = [threading.Thread(target=work, args=(kv,)) for kv in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = server.stats()
    assert stats.pushed.total == 0
    assert stats.pulled.local == 6
    assert [worker.pulled.local for worker in stats.workers] == [3, 3]



def test_staggered_push(kv):
    kv.staggered_push(range(1000), ones(1000))
    assert (kv.pull(range(1000)) == 1).all()


def test_torch_in_place(kv):
    torch = pytest.importorskip("torch")
    keys, vals = torch.tensor([3, 4]), torch.ones(2, 4)
    kv.push(keys, vals)
    out = torch.zeros(2, 4)
    memory = out.data_ptr()
    kv.wait(kv.pull(keys, out, True))
    assert out.data_ptr() == memory
    assert (out == 1).all()
    kv.set(keys, out * 5)
    kv.pull(keys, out.view(-1))
    assert (out == 5).all()


def test_ndarray_subclasses_and_views(kv, tmp_path):
    mapped = np.memmap(tmp_path / "values", np.float32, "w+", shape=(2, 4))
    kv.push([1, 2], ones(2))
    kv.pull([1, 2], mapped)
    assert (mapped == 1).all()
    big = np.zeros((10, 4), np.float32)
    kv.pull([1, 2], big[4:6])
    assert big.sum() == 8


# --- subclasses

class Recorder:
    def __init__(self, name):
        self.name = name


class Own(Recorder, lapse.Worker):
    def __init__(self, name, rank, server):
        Recorder.__init__(self, name)
        lapse.Worker.__init__(self, 0, rank, server)
        self.rows = 0

    def pull(self, keys, vals=None, asynchronous=None):
        self.rows += len(keys)
        return super().pull(keys, vals, asynchronous)


class LaterFirst(lapse.Worker, Recorder):
    def __init__(self, server, **more):
        lapse.Worker.__init__(self, 7, server=server)
        Recorder.__init__(self, more["name"])


def test_subclasses_with_several_bases(serve):
    server = serve(4, threads=2)
    kv = Own("first", 1, server)
    assert kv.pull([1, 2]).shape == (2, 4)
    assert (kv.rows, kv.name) == (2, "first")
    other = LaterFirst(server, name="second")
    other.push([1], ones(1))
    assert other.name == "second"
    kv = other = None


class Forgetful(lapse.Worker):
    def __init__(self):
        pass


def test_subclass_that_forgets_to_initialise():
    kv = Forgetful()
    for call in (lambda: kv.pull([1]), lambda: kv.wait(3), lambda: kv.barrier(), lambda: kv.num_keys):
        with pytest.raises(RuntimeError, match="__init__ has not been called"):
            call()
    kv.finalize()


def test_wrong_constructor_arguments(serve):
    server = serve(4)
    for arguments in ((), (server,), (1,), (0, 1, 2, server), (0, 1), (0, None), (0, "server")):
        with pytest.raises(TypeError, match="customer_id, server"):
            lapse.Worker(*arguments)
    kv = lapse.Worker(0, 0, server)
    with pytest.raises(RuntimeError, match="initialised before"):
        kv.__init__(0, server)
    with pytest.raises(TypeError):
        lapse.Worker.pull(object(), [1])
    kv.finalize()


# --- ends

def test_more_workers_than_threads(serve):
    server = serve(4, threads=2)
    workers = [lapse.Worker(0, server), lapse.Worker(0, server)]        # equal labels
    assert sorted(kv.index for kv in workers) == [0, 1]
    with pytest.raises(ValueError, match="num_threads=2"):
        lapse.Worker(2, server)
    del workers
    again = [lapse.Worker(0, server) for _ in range(2)]
    loop = again
    loop.append(loop)
    del again, loop                                                       # only a cycle keeps them
    workers = [lapse.Worker(0, server), lapse.Worker(0, server)]
    assert sorted(kv.index for kv in workers) == [0, 1]


def test_slot_is_free_after_finalize(serve):
    server = serve(4)
    for _ in range(5):
        kv = lapse.Worker(0, server)
        kv.push([1], ones(1))
        kv.finalize()
    kv = lapse.Worker(0, server)
    assert kv.pull([1])[0, 0] == 5
    kv.finalize()


def test_dropped_worker_counts_as_arrived(serve):
    server = serve(4, threads=3)
    kv, second, third = (lapse.Worker(i, server) for i in range(3))
    del second
    thread = threading.Thread(target=kv.barrier)
    thread.start()
    del third
    thread.join(60)
    assert not thread.is_alive()
    kv.barrier()
    kv.finalize()


def test_dropped_and_back(serve):
    server = serve(4, threads=2)
    kv, other = lapse.Worker(0, server), lapse.Worker(1, server)
    del other
    kv.barrier()
    other = lapse.Worker(1, server)
    with pytest.raises(TimeoutError):
        kv.barrier(timeout=0.05)
    other.barrier()
    kv.barrier()
    kv = other = None


def test_dropped_with_operations_under_way(serve):
    server = serve(4, num_keys=1000, shared_memory=False)
    for _ in range(50):
        kv = lapse.Worker(0, server)
        for _ in range(20):
            kv.push(range(1000), ones(1000), True)
            kv.pull(range(1000), np.zeros((1000, 4), np.float32), True)
        del kv
    kv = lapse.Worker(0, server)
    assert (kv.pull(range(1000)) == 1000).all()
    kv.finalize()


FROZEN = """
    import os, signal, time, weakref
    import numpy as np, lapse
    lapse.setup(10, 1, heartbeat=(20, 60), {settings})
    server = lapse.Server(3)
    kv = lapse.Worker(0, server)
    rank = server.my_rank()
    if rank == 1:
        kv.set([9], np.full(3, 7, np.float32))
        with open("pid.tmp", "w") as file:
            file.write(str(os.getpid()))
    kv.barrier()
    if rank == 1:
        os.rename("pid.tmp", "pid")
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        while not os.path.exists("pid"):
            time.sleep(0.01)
        pid = int(open("pid").read())
        while open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        {body}
    {end}
    print("fine")
    """


def frozen(run_program, body, end="kv.finalize(); server.shutdown()", settings=""):
    """Node 0 runs `body` while node 1, the owner of key 9, is frozen; `body` wakes it by os.kill(pid, signal.SIGCONT)."""
    body = textwrap.indent(textwrap.dedent(body), 8 * " ").strip()
    done = run_program(FROZEN.format(body=body, end=end, settings=settings), nodes=2)
    assert done.stdout.count("fine") == 2
    assert "Traceback" not in done.stderr


def test_dropped_and_replaced_with_a_pull_under_way(run_program):
    """The arrays stay until the pull has finished, however soon the slot has another Worker."""
    frozen(run_program, """
        vals = np.zeros(3, np.float32)
        ref = weakref.ref(vals)
        kv.pull([9], vals, True)
        del vals, kv
        kv = lapse.Worker(0, server)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert ref() is not None
            time.sleep(0.02)
        assert not ref().any()
        os.kill(pid, signal.SIGCONT)
        assert kv.pull([9]).tolist() == [[7] * 3]
        while ref() is not None:
            time.sleep(0.01)
        """)


def test_dropped_just_before_shutdown(run_program):
    """Shutdown waits for the operations of a Worker that was dropped an instant before."""
    frozen(run_program, """
        for _ in range(100):
            kv.push([9], np.ones(3, np.float32), True)
        os.kill(pid, signal.SIGCONT)
        """, end="del kv; server.shutdown()")


def test_no_credit(run_program):
    """A call that finds no credit within its time has done nothing, not even to the local keys; the others go on."""
    frozen(run_program, """
        stamps = [kv.pull([9], None, True) for _ in range(4)]
        for call in (lambda: kv.push([9, 0], np.ones(6, np.float32), timeout=0.05), lambda: kv.pull([9], timeout=0.05),
                     lambda: kv.set([0, 9], np.ones(6, np.float32), timeout=0.05), lambda: kv.localize([9], timeout=0)):
            try:
                call()
            except TimeoutError as error:
                assert "nothing was done" in str(error), error
                continue
            raise AssertionError("no TimeoutError")
        assert not kv.pull([0]).any()
        kv.push([0], np.ones(3, np.float32), timeout=0.05)
        os.kill(pid, signal.SIGCONT)
        assert [stamp.result().tolist() for stamp in stamps] == [[[7] * 3]] * 4
        assert kv.pull([9, 0]).tolist() == [[7] * 3, [1] * 3]
        """, settings="credit_ops=4")


def test_collected_in_either_order(serve):
    server = serve(4)
    kv = lapse.Worker(0, server)
    kv.push([1], ones(1))
    server.shutdown()
    del kv
    gc.collect()
    lapse.setup(10, 1)
    server = lapse.Server(4)
    kv = lapse.Worker(0, server)
    del server
    gc.collect()
    kv.push([1], ones(1))
    assert kv.pull([1])[0, 0] == 1
    kv.finalize()
    del kv
    gc.collect()
    lapse.setup(10, 1)                      # waits for the dropped one to end
    lapse.Server(4).shutdown()


def test_context_manager(serve):
    server = serve(4, threads=2)
    kv, other = lapse.Worker(0, server), lapse.Worker(1, server)
    with pytest.raises(ZeroDivisionError), kv:
        kv.push([1], ones(1))
        raise ZeroDivisionError
    other.barrier()                         # does not wait for the one that left by an exception
    other.finalize()


def test_threads(serve):
    """Workers of several threads at once; every push counts."""
    server = serve(4, threads=4, num_keys=50)
    totals = []

    def work(index):
        kv = lapse.Worker(index, server)
        keys = np.arange(50)
        for i in range(300):
            kv.push(keys, ones(50), i % 2)
            if i % 7 == 0:
                kv.localize([i % 50], True)
        kv.waitall()
        kv.barrier()
        totals.append(kv.pull(keys))
        kv.finalize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(totals) == 4
    assert all((total == 1200).all() for total in totals)
