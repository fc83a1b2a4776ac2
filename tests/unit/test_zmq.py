"""lapse._zmq: the functions are those of pyzmq's own libzmq, and they work on pyzmq's sockets."""
import subprocess
import sys
import time

import pytest
import zmq

from lapse import _zmq
from tests.unit import zmq_probe

PATIENCE = 10_000                      # milliseconds


@pytest.fixture
def pair(tmp_path):
    """A PUSH and a PULL socket, connected over tcp on a port that the system chose."""
    with zmq.Context() as context, context.socket(zmq.PULL) as pull, context.socket(zmq.PUSH) as push:
        pull.linger = push.linger = 0
        push.connect(f"tcp://127.0.0.1:{pull.bind_to_random_port('tcp://127.0.0.1')}")
        yield push, pull


def test_version_is_pyzmqs():
    assert _zmq.libzmq_version == zmq.zmq_version_info()
    assert _zmq.libzmq_version >= _zmq.OLDEST


def test_message_is_64_bytes():
    assert zmq_probe.message_size() == 64


@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("size", [0, 1, 29, 30, 1_000_000])
def test_send_and_receive(pair, size, move, zero_copy):
    push, pull = pair
    payload = bytes(i % 251 for i in range(size))
    before = zmq_probe.released_buffers()
    assert zmq_probe.send(push.underlying, payload, zero_copy=zero_copy, move=move) == size
    assert zmq_probe.receive(pull.underlying, PATIENCE) == (payload, "PUSH")
    if zero_copy:                      # libzmq's I/O thread gives the buffer back when the frame has left
        deadline = time.monotonic() + PATIENCE / 1000
        while zmq_probe.released_buffers() == before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert zmq_probe.released_buffers() == before + 1


def test_talks_to_pyzmq(pair):
    push, pull = pair
    push.send(b"from pyzmq")
    assert zmq_probe.receive(pull.underlying, PATIENCE)[0] == b"from pyzmq"
    zmq_probe.send(push.underlying, b"to pyzmq")
    assert pull.poll(PATIENCE) and pull.recv() == b"to pyzmq"


def test_nothing_there(pair):
    _, pull = pair
    assert zmq_probe.receive(pull.underlying, 0) is None
    assert zmq_probe.error_of_empty_receive(pull.underlying) == (True, "Resource temporarily unavailable")


def test_options(pair):
    push, _ = pair
    push.sndhwm = 7
    assert zmq_probe.swap_option(push.underlying, zmq.SNDHWM, 9) == 7
    assert push.sndhwm == 9


@pytest.mark.parametrize(("backend", "sentence"), [
    (_zmq.__file__, "has no function zmq_version"),        # a compiled module that is not linked to libzmq
    ("nowhere", "cannot find pyzmq's library"),
    ("", "needs pyzmq >= 26"),
])
def test_a_pyzmq_without_libzmq_is_named(backend, sentence):
    """The import fails with one sentence, in a process whose pyzmq is not the real one (and that has nothing else of lapse)."""
    program = """if True:
        import importlib.util, sys, types
        path, backend_path = sys.argv[1:]
        for name in ("zmq", "zmq.backend", "zmq.backend.cython"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = []
        if backend_path:
            backend = types.ModuleType("zmq.backend.cython._zmq")
            backend.__file__ = backend_path
            sys.modules["zmq.backend.cython._zmq"] = sys.modules["zmq.backend.cython"]._zmq = backend
        spec = importlib.util.spec_from_file_location("lapse._zmq", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    """
    command = [sys.executable, "-c", program, _zmq.__file__, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "ImportError: lapse: " in done.stderr and sentence in done.stderr
