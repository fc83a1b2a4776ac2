"""Every row of the error table, and the defects of the former bindings; on NumPy arrays and on torch tensors."""
import gc
import re
import sys
import threading
import weakref

import numpy as np
import pytest

import lapse

N, LENGTH = 100, 4


@pytest.fixture(params=["numpy", "torch"])
def library(request):
    if request.param == "torch":
        return pytest.importorskip("torch")
    return np


def array(library, values, dtype):
    a = np.array(values, dtype)
    return a if library is np else library.from_numpy(a)


@pytest.fixture
def server(serve):
    return serve(LENGTH, num_keys=N)


@pytest.fixture
def kv(server):
    worker = lapse.Worker(0, server)
    worker.set(np.arange(N), np.ones((N, LENGTH), np.float32))
    yield worker
    everything = worker.pull(np.arange(N))          # a refused call has changed nothing
    assert (everything == 1).all()
    worker.finalize()


CALLS = {
    "pull": lambda kv, keys, vals: kv.pull(keys, vals),
    "pull async": lambda kv, keys, vals: kv.pull(keys, vals, True),
    "pull_if_local": lambda kv, keys, vals: kv.pull_if_local(keys, vals),
    "push": lambda kv, keys, vals: kv.push(keys, vals),
    "push async": lambda kv, keys, vals: kv.push(keys, vals, True),
    "set": lambda kv, keys, vals: kv.set(keys, vals),
    "set async": lambda kv, keys, vals: kv.set(keys, vals, True),
}
READS = [name for name in CALLS if name.startswith("pull")]
calls = pytest.mark.parametrize("call", list(CALLS))


# --- sizes

@calls
@pytest.mark.parametrize("shape", [(0,), (7,), (9,), (1, 8), (4, 2), (2, 5), (3, 4)])
def test_wrong_number_of_values(kv, library, call, shape):
    keys = array(library, [3, 5], np.int64)
    vals = array(library, np.full(shape, 9), np.float32)
    with pytest.raises(ValueError, match="2 keys have 8 values, but vals has") as caught:
        CALLS[call](kv, keys, vals)
    assert str(shape if len(shape) == 2 else f"{shape[0]} values") in str(caught.value)
    assert (np.asarray(vals) == 9).all()


@calls
def test_wrong_number_of_values_with_own_lengths(serve, call):
    server = serve([1, 2, 3, 4], num_keys=4)
    kv = lapse.Worker(0, server)
    with pytest.raises(ValueError, match="3 keys have 8 values, but vals has 9 values"):
        CALLS[call](kv, np.array([3, 0, 2]), np.zeros(9, np.float32))
    kv.finalize()


def test_needed_length_has_64_bits(serve):
    server = serve(2**31, num_keys=8)
    kv = lapse.Worker(0, server)
    with pytest.raises(ValueError, match=f"6 keys have {6 * 2**31} values, but vals has 0 values"):
        kv.push(range(6), np.zeros(0, np.float32))
    kv.finalize()


# --- keys

@calls
@pytest.mark.parametrize("key", [-1, N, -2**63, 2**62, 2**63 - 1])
@pytest.mark.parametrize("lengths", ["uniform", "own"])
def test_key_out_of_range(serve, library, call, key, lengths):
    """The range is checked before lengths are looked up: a wrong size beside it does not matter."""
    server = serve(LENGTH if lengths == "uniform" else np.arange(N) % 5, num_keys=N)
    kv = lapse.Worker(0, server)
    for n in (1, 40):               # few and many keys go different ways
        keys = array(library, [2] * n + [key], np.int64)
        with pytest.raises(lapse.KeyRangeError, match=rf"key {key} is not in \[0, {N}\)") as caught:
            CALLS[call](kv, keys, array(library, np.zeros(1), np.float32))
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, IndexError)
        assert isinstance(caught.value, lapse.LapseError)
    kv.finalize()


@pytest.mark.parametrize("key", [-1, N, 2**80])
@pytest.mark.parametrize("call", [
    lambda kv, s, key: kv.localize([key]),
    lambda kv, s, key: kv.localize([key], True),
    lambda kv, s, key: kv.pull([3, key]),
    lambda kv, s, key: kv.is_local(key),
    lambda kv, s, key: kv.is_local([key]),
    lambda kv, s, key: kv.get_key_size(key),
    lambda kv, s, key: s.is_local([key]),
    lambda kv, s, key: s.owner([3, key]),
    lambda kv, s, key: s.owner(key),
])
def test_key_out_of_range_elsewhere(kv, server, call, key):
    with pytest.raises(lapse.KeyRangeError, match=str(key)):
        call(kv, server, key)


@pytest.mark.parametrize("keys", [[1.0], [True], ["a"], [None], [[1, 2], [3]], [1, 2.5], [object()]])
def test_keys_that_are_no_ints(kv, keys):
    with pytest.raises(TypeError, match="keys must be"):
        kv.pull(keys)


@pytest.mark.parametrize("keys", [5, "5", b"12345678", {1, 2}, {1: 2}, None, iter([1]), memoryview(b"12345678")])
def test_keys_of_unsupported_objects(kv, keys):
    with pytest.raises(TypeError, match=f"keys must be .*, not {type(keys).__name__}"):
        kv.pull(keys)


@pytest.mark.parametrize("dtype", ["int32", "float32", "bool"])
def test_keys_of_another_dtype(kv, library, dtype):
    with pytest.raises(TypeError, match=f"keys must be of dtype int64, not {dtype}"):
        kv.pull(array(library, [1], dtype))


@pytest.mark.parametrize("dtype", ["uint64", ">i8", "object"])
def test_keys_of_another_numpy_dtype(kv, dtype):
    with pytest.raises(TypeError, match=f"keys must be of dtype int64, not {dtype}"):
        kv.pull(np.array([1], dtype))


def test_keys_of_another_shape(kv, library):
    with pytest.raises(ValueError, match="keys must have one dimension, not 2"):
        kv.pull(array(library, [[1, 2]], np.int64))
    with pytest.raises(ValueError, match="keys must have one dimension, not 0"):
        kv.pull(array(library, 1, np.int64))


def test_keys_not_contiguous(kv, library):
    with pytest.raises(ValueError, match="keys must be C-contiguous"):
        kv.pull(array(library, range(10), np.int64)[::2])


# --- values

@calls
@pytest.mark.parametrize("dtype", ["float64", "int32", "float16", "uint8"])
def test_values_of_another_dtype(kv, library, call, dtype):
    with pytest.raises(TypeError, match=f"vals must be of dtype float32, not {dtype}"):
        CALLS[call](kv, [3], array(library, [0] * 4, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
def test_values_of_each_dtype(serve, library, dtype):
    server = serve(2, num_keys=4, dtype=dtype)
    kv = lapse.Worker(0, server)
    vals = array(library, [1, 2], dtype)
    kv.push([3], vals)
    kv.push([3], vals)
    out = array(library, [0, 0], dtype)
    kv.pull([3], out)
    assert out.tolist() == [2, 4]
    wrong = "int32" if dtype != "int32" else "float32"
    with pytest.raises(TypeError, match=f"vals must be of dtype {dtype}, not {wrong}"):
        kv.pull([3], array(library, [0, 0], wrong))
    kv.finalize()


@calls
def test_values_in_another_byte_order(kv, call):
    with pytest.raises(TypeError, match="vals must be of dtype float32, not >f4"):
        CALLS[call](kv, [3], np.zeros(4, ">f4"))


@calls
def test_values_not_contiguous(kv, library, call):
    with pytest.raises(ValueError, match="vals must be C-contiguous"):
        CALLS[call](kv, [3], array(library, [0] * 8, np.float32)[::2])
    with pytest.raises(ValueError, match="vals must be C-contiguous"):
        CALLS[call](kv, [3, 4], array(library, np.zeros((4, 2)), np.float32).T)


@calls
def test_values_not_aligned(kv, call):
    vals = np.frombuffer(bytearray(17), np.uint8)[1:].view(np.float32)
    with pytest.raises(ValueError, match="vals must be aligned"):
        CALLS[call](kv, [3], vals)


@calls
def test_tensors_not_aligned(kv, call):
    torch = pytest.importorskip("torch")
    kv.pull(torch.tensor([3]), torch.zeros(4))      # from now on they are looked at through DLPack
    with pytest.raises(ValueError, match="vals must be aligned"):
        CALLS[call](kv, torch.tensor([3]), torch.frombuffer(bytearray(17), dtype=torch.float32, offset=1))
    with pytest.raises(ValueError, match="keys must be aligned"):
        CALLS[call](kv, torch.frombuffer(bytearray(12), dtype=torch.int64, offset=4), torch.zeros(4))


@calls
def test_values_of_another_shape(kv, library, call):
    with pytest.raises(ValueError, match="vals must have one dimension, or two"):
        CALLS[call](kv, [3], array(library, np.zeros((1, 1, 4)), np.float32))


@pytest.mark.parametrize("call", READS)
def test_read_only_values(kv, call):
    vals = np.zeros(4, np.float32)
    vals.flags.writeable = False
    with pytest.raises(ValueError, match="vals must be writeable"):
        CALLS[call](kv, [3], vals)
    assert not vals.any()


def test_read_only_inputs_are_fine(kv):
    keys, vals = np.array([3]), np.zeros(4, np.float32)
    keys.flags.writeable = vals.flags.writeable = False
    kv.push(keys, vals)
    assert kv.pull(keys).tolist() == [[1] * 4]


@calls
@pytest.mark.parametrize("vals", ["abcd", b"0123456789abcdef", 5, {1: 2}, object(), np.float32(3), bytearray(16)])
def test_values_of_unsupported_objects(kv, call, vals):
    with pytest.raises(TypeError, match=f"vals must be a NumPy array or a torch CPU tensor, not {type(vals).__name__}"):
        CALLS[call](kv, [3], vals)


@pytest.mark.parametrize("call", [name for name in CALLS if not name.startswith("pull")])
def test_none_is_no_value(kv, call):
    with pytest.raises(TypeError, match="not NoneType"):
        CALLS[call](kv, [3], None)


@pytest.mark.parametrize("call", READS)
def test_values_are_not_pulled_into_lists(kv, call):
    with pytest.raises(TypeError, match="not list"):
        CALLS[call](kv, [3], [0.0] * 4)


def test_masked_array(kv):
    with pytest.raises(TypeError, match="masked"):
        kv.push([3], np.ma.masked_array(np.zeros(4, np.float32), mask=[1, 0, 0, 0]))


@calls
def test_tensor_on_another_device(kv, call):
    torch = pytest.importorskip("torch")
    devices = ["cuda"] if torch.cuda.is_available() else []
    for device in [*devices, "meta"]:
        with pytest.raises(TypeError, match=f"vals must be in main memory, but this tensor is on device {device}"):
            CALLS[call](kv, [3], torch.zeros(4, device=device))
        with pytest.raises(TypeError, match="keys must be in main memory"):
            CALLS[call](kv, torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(4))


@pytest.mark.parametrize(("spoil", "instead"), [
    (lambda x: x.to("meta"), ("tensor.cpu()", "one in main memory")),
    (lambda x: x.double(), ("tensor.to(torch.float32)", "one of that dtype")),
    (lambda x: x.numpy().astype("f8"), ("array.astype(numpy.float32)", "one of that dtype")),
    (lambda x: x.repeat(2)[::2], ("tensor.contiguous()", "a contiguous one")),
    (lambda x: x.numpy().repeat(2)[::2], ("numpy.ascontiguousarray(array)", "a contiguous one")),
    (lambda x: x.to_sparse(), ("tensor.to_dense()", "a dense one")),
])
def test_refused_with_the_way_to_do_it(kv, spoil, instead):
    """The advice is right: what is read may be a copy, but what is pulled into a copy would be lost."""
    torch = pytest.importorskip("torch")
    with pytest.raises((TypeError, ValueError), match=": use " + re.escape(instead[0])):
        kv.push([3], spoil(torch.zeros(4)))
    with pytest.raises((TypeError, ValueError), match=f": pull into {instead[1]}, and copy from there$"):
        kv.pull([3], spoil(torch.zeros(4)))


@calls
def test_tensors_without_plain_memory(kv, call):
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="vals must be a dense tensor"):
        CALLS[call](kv, [3], torch.zeros(4).to_sparse())
    with pytest.raises(TypeError, match="vals must be of dtype float32, not bfloat16"):
        CALLS[call](kv, [3], torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"vals .*neg"):
        CALLS[call](kv, [3], torch.zeros(2, 2, dtype=torch.complex64).conj().imag)


@calls
@pytest.mark.parametrize("length", [1, LENGTH])
def test_tensor_that_is_lazily_negated(serve, call, length):
    torch = pytest.importorskip("torch")
    with lapse.Worker(0, serve(length, num_keys=N)) as kv:
        negated = torch.tensor(1 + 2j).conj().imag[None] if length == 1 else torch.zeros(length, dtype=torch.complex64).conj().imag
        for _ in range(2):
            with pytest.raises(TypeError, match=r"vals .*neg"):
                CALLS[call](kv, torch.tensor([3]), negated)


@calls
def test_tensors_whose_memory_is_gone(kv, call):
    """Freed (as by what shards parameters), never there (the zeros of forward-mode differentiation, a tracer's), or too small."""
    torch = pytest.importorskip("torch")

    def resized(number_type, shape, size):
        tensor = torch.zeros(shape, dtype=number_type)
        tensor.untyped_storage().resize_(size)
        return tensor

    keys = torch.tensor([3])
    kv.pull(keys, torch.zeros(4))       # from the first tensor on they are looked at through DLPack
    freed = torch.zeros(12)
    row = freed[8:]
    freed.untyped_storage().resize_(0)
    for wrong in (resized(torch.float32, (4,), 0), row, torch.nn.Parameter(resized(torch.float32, (1, 4), 8), requires_grad=False),
                  torch._efficientzerotensor(4)):
        with pytest.raises(TypeError, match=r"vals is a tensor .*without memory"):
            CALLS[call](kv, keys, wrong)
    for wrong in (resized(torch.int64, (1,), 0), torch._efficientzerotensor(1, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"keys is a tensor .*without memory"):
            CALLS[call](kv, wrong, torch.zeros(4))

    def traced(tensor):
        with pytest.raises(TypeError, match="vals is a tensor without memory"):
            CALLS[call](kv, keys, tensor)
        return tensor

    torch.func.functionalize(traced)(torch.zeros(4))


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("n", [2, 40])
def test_values_that_are_pulled_over_their_keys(serve, library, call, n):
    with lapse.Worker(0, serve(2, num_keys=N, dtype="int64")) as kv:
        kv.set(np.arange(N), np.full((N, 2), 2**60))
        both = array(library, range(3 * n), np.int64)
        for keys, vals in ((both[:n], both[:2 * n]), (both[n:2 * n], both[n:].reshape(n, 2)),
                           (both[:n], both[n - 1:3 * n - 1])):      # the last key is the first value
            with pytest.raises(ValueError, match="keys and vals share memory"):
                CALLS[call](kv, keys, vals)
        assert both.tolist() == list(range(3 * n))
        CALLS[call](kv, both[:n], both[n:])         # neighbours are apart
        kv.waitall()
        assert both.tolist() == [*range(n), *2 * n * [2**60]]
        kv.push(both[:1], both[:2])                 # nothing is written there


class Trap:
    """An argument that ends the Worker while it is looked at."""

    def __init__(self, worker):
        self.worker = worker

    def __bool__(self):
        self.worker.finalize()
        return False

    def __float__(self):
        self.worker.finalize()
        return 1.0

    def __index__(self):
        self.worker.finalize()
        return 1


@pytest.mark.parametrize("call", [
    lambda kv, trap: kv.pull([1], None, trap), lambda kv, trap: kv.push([1], np.zeros(4, np.float32), timeout=trap),
    lambda kv, trap: kv.localize(range(50), trap), lambda kv, trap: kv.waitall(trap), lambda kv, trap: kv.wait(trap),
    lambda kv, trap: kv.finalize(trap), lambda kv, trap: kv.prepare_sample(trap), lambda kv, trap: kv.finish_sample(trap),
    lambda kv, trap: kv.pull_sample(trap, np.zeros(1, np.int64)),
])
def test_a_worker_that_its_own_arguments_finalize(serve, call):
    server = serve(LENGTH, num_keys=N)
    server.enable_sampling_support()
    kv = lapse.Worker(0, server)
    with pytest.raises(RuntimeError, match="finalized"):
        call(kv, Trap(kv))
    with lapse.Worker(0, server) as after:      # the slot is free, and not in use
        after.push([1], np.zeros(4, np.float32))


@calls
def test_tensor_that_requires_grad(kv, call):
    torch = pytest.importorskip("torch")
    for tensor in (torch.nn.Parameter(torch.zeros(4)), torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True) * 2):
        for _ in range(2):
            with pytest.raises(TypeError, match=r"vals is a tensor that requires grad.*: use tensor.detach\(\), which shares its memory"):
                CALLS[call](kv, torch.tensor([3]), tensor)


def test_detached_parameter_shares_its_memory(server):
    torch = pytest.importorskip("torch")
    with lapse.Worker(0, server) as kv:
        parameter = torch.nn.Parameter(torch.full((2, 4), 3.0))
        kv.push([3, 4], parameter.detach())
        kv.push([3, 4], parameter.detach())
        kv.pull([3, 4], parameter.detach())
        assert (parameter.detach() == 6).all() and parameter.requires_grad


def test_tensors_are_looked_at_anew_in_each_call(server):
    """What a tensor was in the call before says nothing."""
    torch = pytest.importorskip("torch")
    with lapse.Worker(0, server) as kv:
        kv.set(np.arange(N), np.arange(N * LENGTH, dtype=np.float32))
        keys, vals = torch.tensor([3]), torch.zeros(LENGTH)
        kv.pull(keys, vals)
        keys.fill_(5)
        kv.pull(keys, vals)
        assert vals.tolist() == [20, 21, 22, 23]
        vals.data = torch.zeros(2, LENGTH)
        with pytest.raises(ValueError, match=r"1 key has 4 values, but vals has values of shape \(2, 4\)"):
            kv.pull(keys, vals)
        vals.data = torch.zeros(2 * LENGTH)[::2]
        with pytest.raises(ValueError, match="vals must be C-contiguous"):
            kv.pull(keys, vals)
        for wrong in (torch.zeros(LENGTH, dtype=torch.int32), torch.zeros(LENGTH, dtype=torch.float64), torch.zeros(1, 1, LENGTH),
                      torch.tensor(0.0)):
            with pytest.raises((TypeError, ValueError), match="vals must"):
                kv.pull(keys, wrong)
        for wrong in (torch.tensor([3], dtype=torch.int32), torch.tensor([[3]]), torch.tensor(3), torch.zeros(1),
                      torch.tensor([3, 0, 4])[::2]):
            with pytest.raises((TypeError, ValueError), match="keys must"):
                kv.pull(wrong, vals)
        with pytest.raises(lapse.KeyRangeError, match="key 100 "):
            kv.pull(torch.tensor([100]), torch.zeros(LENGTH))


def test_tensors_of_an_unfinished_pull_stay_where_they_are(serve):
    """Its memory can be exchanged for another only when the pull no longer writes to it."""
    torch = pytest.importorskip("torch")
    with lapse.Worker(0, serve(LENGTH, num_keys=N, shared_memory=False)) as kv:
        kv.set([3], torch.arange(4.0))
        vals = torch.zeros(LENGTH)
        memory = vals.untyped_storage()
        ts = kv.pull(torch.tensor([3]), vals, True)
        assert ts >= 0
        with pytest.raises(RuntimeError, match="resiz"):
            vals.resize_(1000 * LENGTH)
        vals.data = torch.zeros(LENGTH)
        kv.wait(ts)
        assert torch.tensor([], dtype=torch.float32).set_(memory).tolist() == [0, 1, 2, 3]


def test_views_and_empty_tensors(server):
    torch = pytest.importorskip("torch")
    with lapse.Worker(0, server) as kv:
        table = torch.zeros(3, 2, LENGTH)
        kv.push(torch.tensor([[1, 2], [3, 4]])[1], torch.ones(2, LENGTH))
        kv.pull(torch.tensor([[1, 2], [3, 4]])[1], table[1])
        assert table.sum((1, 2)).tolist() == [0, 2 * LENGTH, 0]
        assert kv.pull(torch.tensor([], dtype=torch.int64), torch.zeros(0, LENGTH)) == -1
        assert kv.push(torch.tensor([], dtype=torch.int64), torch.zeros(0)) == -1
        assert kv.is_local(torch.tensor([3, 4])).all()
        kv.localize(torch.tensor([3, 4]))


# --- arguments

@pytest.mark.parametrize("call", [lambda kv, **more: kv.pull([1], **more), lambda kv, **more: kv.localize([1], **more)])
def test_unknown_keyword(kv, call):
    with pytest.raises(TypeError, match="unexpected keyword argument 'asink'"):
        call(kv, asink=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        call(kv, **{"async": True, "x": 1})
    with pytest.raises(TypeError, match="both"):
        call(kv, asynchronous=True, **{"async": True})


@pytest.mark.parametrize("timeout", [-1, float("nan"), -1e-9])
def test_wrong_timeout(kv, server, timeout):
    for call in (lambda: kv.pull([1], timeout=timeout), lambda: kv.waitall(timeout), lambda: kv.finalize(timeout),
                 lambda: kv.barrier(timeout), lambda: server.barrier(timeout)):
        with pytest.raises(ValueError, match="timeout must be"):
            call()
    with pytest.raises(ValueError, match="timeout is for synchronous calls"):
        kv.pull([1], None, True, timeout=1)


# --- timestamps

def test_unknown_timestamp(serve):
    server = serve(threads=2, shared_memory=False)
    kv, other = lapse.Worker(0, server), lapse.Worker(1, server)
    ts = kv.push([1], np.zeros(4, np.float32), True)
    assert ts >= 0
    for wrong in (ts + 1, 2**62, -2, -2**62):
        with pytest.raises(ValueError, match="timestamp"):
            kv.wait(wrong)
        with pytest.raises(ValueError, match="timestamp"):
            kv.is_finished(wrong)
    with pytest.raises(ValueError, match="another Worker"):
        other.wait(ts)
    for wrong in (None, "1", 1.5):
        with pytest.raises((TypeError, AttributeError)):
            kv.wait(wrong)
    kv.wait(ts)
    kv = other = None


# --- states

def test_after_shutdown(serve):
    server = serve(threads=2)
    kv = lapse.Worker(0, server)
    server.shutdown()
    vals = np.zeros(4, np.float32)
    for call in (lambda: kv.pull([1]), lambda: kv.push([1], vals), lambda: kv.set([1], vals), lambda: kv.localize([1]),
                 lambda: kv.pull_if_local([1]), lambda: kv.barrier(), lambda: server.barrier(), lambda: server.owner(1),
                 lambda: server.is_local([1]), lambda: kv.begin_setup(), lambda: kv.pull(np.arange(50)),
                 lambda: kv.push([1], vals, True)):
        with pytest.raises(RuntimeError, match="shut down"):
            call()
    with pytest.raises(RuntimeError, match="shut down"):
        lapse.Worker(1, server)
    kv.finalize()                       # in either order with shutdown
    server.shutdown()


def test_after_finalize(server):
    kv = lapse.Worker(0, server)
    kv.finalize()
    kv.finalize()
    for call in (lambda: kv.pull([1]), lambda: kv.localize([1]), lambda: kv.barrier(), lambda: kv.waitall(), lambda: kv.num_keys):
        with pytest.raises(RuntimeError, match="finalized"):
            call()


def test_timeout_of_a_barrier(serve):
    server = serve(threads=2)
    kv = lapse.Worker(0, server)
    with pytest.raises(TimeoutError):
        kv.barrier(timeout=0.01)
    with pytest.raises(TimeoutError):
        kv.finalize(timeout=0.01)
    other = lapse.Worker(1, server)
    thread = threading.Thread(target=other.finalize)
    thread.start()
    kv.finalize()
    thread.join()


def test_timeout_of_an_operation(run_program):
    """The other node is frozen for a while: TimeoutError, and the pull arrives in its array all the same."""
    done = run_program("""
        import os, signal, time
        import numpy as np, lapse
        lapse.setup(10, 1, heartbeat=(20, 60))
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
            while open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.01)
            out = np.zeros(3, np.float32)
            for call in (lambda: kv.pull([9], out, timeout=0.05), lambda: kv.wait(kv.pull([9], out, True), 0.05),
                         lambda: kv.waitall(0.05), lambda: kv.waitall(timeout=0)):
                try:
                    call()
                except TimeoutError:
                    continue
                raise AssertionError("no TimeoutError")
            assert not out.any()
            os.kill(pid, signal.SIGCONT)
            kv.waitall()
            assert (out == 7).all(), out
        kv.finalize()
        server.shutdown()
        """, nodes=2)
    assert "Traceback" not in done.stderr


def test_node_that_dies(run_program):
    """All calls raise NodeFailure that names the node, also those that were waiting; so does shutdown."""
    done = run_program("""
        import os, signal, threading
        import numpy as np, lapse
        lapse.setup(10, 2)
        server = lapse.Server(3)
        rank = server.my_rank()
        caught = []
        def work(index):
            kv = lapse.Worker(index, server)
            kv.barrier()
            if rank == 1:
                kv.barrier()
            try:
                if index == 0:
                    while True:
                        kv.pull([9])
                kv.barrier()
            except lapse.NodeFailure as error:
                caught.append(error)
            for call in (lambda: kv.pull([1]), lambda: kv.pull([9]), kv.barrier, kv.finalize):
                try:
                    call()
                except lapse.NodeFailure as error:
                    caught.append(error)
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads: thread.start()
        if rank == 1:
            import time; time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        for thread in threads: thread.join()
        try:
            server.shutdown()
        except lapse.NodeFailure as error:
            caught.append(error)
        server.shutdown()
        assert len(caught) == 11, caught
        assert all(error.rank == 1 and isinstance(error, RuntimeError) for error in caught), caught
        print("caught", caught[0])
        """, nodes=2, check=137)
    assert "caught node 1" in done.stdout, done.stdout + done.stderr


# --- one thread at a time

def test_two_threads_on_one_worker(serve):
    server = serve(threads=2)
    kv = lapse.Worker(0, server)
    other = lapse.Worker(1, server)
    inside = threading.Event()

    def wait_at_barrier():
        inside.set()
        kv.barrier()

    thread = threading.Thread(target=wait_at_barrier)
    thread.start()
    inside.wait()
    seen = None
    while seen is None and thread.is_alive():       # until the thread is inside of barrier
        try:
            kv.pull([1])
        except RuntimeError as error:
            seen = error
    assert "in use by another thread" in str(seen)
    for call in (lambda: kv.push([1], np.zeros(4, np.float32)), lambda: kv.waitall(), lambda: kv.finalize(), lambda: kv.barrier(),
                 lambda: kv.pull_if_local([1])):
        with pytest.raises(RuntimeError, match="in use by another thread"):
            call()
    other.barrier()
    thread.join()
    assert kv.pull([1]).tolist() == [[0] * 4]
    kv = other = None


# --- defects of the former bindings that are no row of the table

def test_finalize_in_two_threads(serve):
    server = serve(threads=2)
    threads = [threading.Thread(target=lapse.Worker(i, server).finalize) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_asynchronous_pull_holds_its_arrays(serve):
    server = serve(shared_memory=False, threads=1, num_keys=1000)
    kv = lapse.Worker(0, server)
    kv.set(np.arange(1000), np.ones((1000, 4), np.float32))
    keys, vals = np.arange(1000), np.zeros((1000, 4), np.float32)
    key_ref, val_ref = weakref.ref(keys), weakref.ref(vals)
    ts = kv.pull(keys, vals, True)
    assert ts >= 0
    del keys, vals
    gc.collect()
    assert key_ref() is not None
    assert val_ref() is not None
    kv.wait(ts)
    assert val_ref() is None
    assert key_ref() is None
    kv.finalize()


def test_push_and_set_have_copied(serve):
    server = serve(shared_memory=False)
    kv = lapse.Worker(0, server)
    vals = np.ones(4, np.float32)
    references = sys.getrefcount(vals)
    for call in (kv.set, kv.push):
        vals[:] = 1
        call([5], vals, True)
        vals[:] = 99
    assert sys.getrefcount(vals) == references
    kv.waitall()
    assert kv.pull([5]).tolist() == [[2] * 4]
    kv.finalize()


def test_bookkeeping_does_not_grow(serve):
    server = serve(shared_memory=False, credit_ops=64)
    kv = lapse.Worker(0, server)
    vals = np.zeros(4, np.float32)
    last = -1
    for _ in range(20_000):
        ts = kv.pull([5], vals, True)
        assert ts > last
        last = ts
        assert len(kv.buffers) <= 3 * 64
    kv.wait(0)                          # an old one: at once
    kv.waitall()
    assert len(kv.buffers) == 0
    assert last == 19_999
    kv.finalize()
