"""Strangers at every socket of a running job, and members that send mutated frames: in seconds. The long run is `make strangers`."""
from __future__ import annotations

import os
import random

import pytest
import zmq

import lapse
from lapse import control
from lapse import keys as lapse_keys
from lapse.config import Config
from lapse.scheduler import Scheduler
from tests import strangers

pytestmark = pytest.mark.skipif(not zmq.has("curve"), reason="libzmq without CURVE")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("DMLC_", "LAPSE_", "PS_"))]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("security", "transport"), [("token", "tcp"), ("curve", "tcp"), ("none", "tcp"), ("token", "ipc")])
def test_strangers_change_nothing(security, transport):
    """The sums of a job are exact (visit looks), and who was there is counted and logged."""
    found = strangers.visit(security, transport, shots=3000, rounds=1, calls=30)
    assert found["connections"] > 300
    if security == "none":
        assert min(found["dropped"]) > 0 and found["scheduler"] > 0
        assert any(line.startswith("dropped a frame from") for line in found["warnings"])
    else:
        assert found["dropped"] == [0, 0] and found["scheduler"] == 0       # not one frame of theirs got that far
    assert min(found["refused"]) > 0 and found["scheduler refused"] > 0
    assert any(line.startswith("refused a connection") for line in found["warnings"])


@pytest.mark.parametrize(("security", "transport", "seed"), [
    ("token", "tcp", 1), ("token", "ipc", 2), ("curve", "tcp", 3), ("curve", "ipc", 4), ("token", "tcp", 5), ("curve", "tcp", 6)])
def test_a_traitor_ends_the_job_and_is_named(security, transport, seed):
    """Both nodes are named, no process crashes, and no value that the other node reads is wrong (traitor looks)."""
    strangers.traitor(security, transport, seed)


def limits(sock) -> tuple:
    return (sock.getsockopt(zmq.MAXMSGSIZE), sock.getsockopt(zmq.HANDSHAKE_IVL), sock.getsockopt(zmq.ZAP_DOMAIN).rstrip(b"\0"),
            sock.getsockopt(zmq.MECHANISM))


def limits_of_all(worker) -> list:
    cluster = lapse.node._node.cluster
    return [limits(sock) for sock in (cluster.pull, cluster._link._dealer, *cluster.push)]


@pytest.mark.parametrize(("security", "mechanism"), [("none", zmq.NULL), ("token", zmq.PLAIN), ("curve", zmq.CURVE)])
def test_every_socket_has_its_limits_and_asks_who_is_there(security, mechanism):
    """No frame above the limit, no handshake that takes longer than five seconds, a ZAP domain where somebody may connect."""
    results = lapse.launch(limits_of_all, 2, num_keys=1, value_length=1, security=security, transport="tcp")
    for rank, (result,) in enumerate(results):
        pull, dealer, *pushes = result
        data = pull[0]
        assert 1 << 24 < data < (1 << 24) + (1 << 16)
        assert pull == (data, 5000, b"lapse-data", mechanism)
        assert dealer == (control.MAX_BYTES, 5000, b"", mechanism)
        assert pushes[1 - rank] == (data, 5000, b"", mechanism)
        assert pushes[rank][:2] == (data, 5000)         # inproc
    scheduler = Scheduler(Config(num_keys=1, num_threads=1, role="scheduler", num_nodes=2, security="none" if security == "none" else None,
                                 token="0123456789" if security == "token" else None,
                                 keys=lapse_keys.make(2)[1] if security == "curve" else None), launched=True)
    try:
        assert limits(scheduler._router) == (control.MAX_BYTES, 5000, b"lapse-control", mechanism)
    finally:
        scheduler.close()


def test_what_strangers_send_is_of_every_kind():
    draw = random.Random(1)
    shots = strangers.make_shots(draw, strangers.states.corpus(1), 300, 4)
    mechanisms = {name for name in (b"NULL", b"PLAIN", b"CURVE") if any(name in data[:32] for data, _, _ in shots)}
    assert len(mechanisms) == 3 and any(b"HTTP" in data for data, _, _ in shots)
    assert sum(count for _, _, count in shots) > 1000
    kinds = set()
    for _ in range(500):
        try:
            kinds.add(control.decode([strangers.mutated_control(draw)])["type"])
        except control.Malformed as error:
            kinds.add(str(error).split()[-1])
    assert len(kinds) > 10
