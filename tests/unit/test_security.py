"""CURVE: keys and their files, jobs of real processes over tcp, and strangers who try to get in."""
from __future__ import annotations

import json
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zmq
from ports import reserved_port

import lapse
from lapse import control, keys, sockets
from lapse.config import Config
from lapse.errors import LapseError, NodeFailure
from lapse.keys import Keys
from lapse.launch import launch
from lapse.scheduler import Scheduler

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0
CLUSTER = {"DMLC_NUM_SERVER": "2", "DMLC_PS_ROOT_URI": "127.0.0.1", "DMLC_PS_ROOT_PORT": "4000"}
NUM_KEYS, LENGTH, ROUNDS = 60, 4, 10
GARBAGE = [b"GET / HTTP/1.1\r\n\r\n", b"\x01\x00\x06\x00hello", bytes.fromhex("16030100c8010000c40303") + bytes(190), b"\xff" * 64]

pytestmark = pytest.mark.skipif(not zmq.has("curve"), reason="libzmq without CURVE")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("DMLC_", "LAPSE_", "PS_"))]:
        monkeypatch.delenv(name)


# -- keys and files

def test_every_member_has_its_own_pair_and_knows_the_others_public_keys():
    nodes, scheduler = keys.make(3)
    assert [member.rank for member in nodes] == [0, 1, 2] and scheduler.rank is None
    assert scheduler.nodes == tuple(member.public for member in nodes)
    assert {member.scheduler for member in nodes} == {scheduler.public}
    assert len({member.secret for member in [*nodes, scheduler]}) == 4
    for member in [*nodes, scheduler]:
        assert Keys.parse(member.to_text(), "x") == member
        assert member.secret not in repr(member)
        assert all(other.secret not in member.to_text() for other in [*nodes, scheduler] if other is not member)


def damaged(change) -> str:
    fields = json.loads(keys.make(2)[0][1].to_text())
    change(fields)
    return json.dumps(fields)


@pytest.mark.parametrize("text", [
    "", "{}", "[]", "null", "[" * 100_000, "\0", '{"public": 1}',
    damaged(lambda f: f.pop("secret")), damaged(lambda f: f.update(rank=-1)), damaged(lambda f: f.update(rank="0")),
    damaged(lambda f: f.update(rank=True)), damaged(lambda f: f.update(more=1)), damaged(lambda f: f.update(secret=f["secret"][:-1])),
    damaged(lambda f: f.update(secret="é" * 40)), damaged(lambda f: f.update(scheduler="~" * 40)), damaged(lambda f: f.update(public=None)),
    damaged(lambda f: f.update(public=f["scheduler"])), damaged(lambda f: f.update(scheduler="#####" * 8)),
])
def test_texts_that_hold_no_keys(text):
    with pytest.raises(ValueError, match=r"^SOURCE does not hold the keys") as error:
        Keys.parse(text, "SOURCE")
    assert "secret\":" not in str(error.value)


def test_two_nodes_with_one_key_are_refused():
    nodes, scheduler = keys.make(2)
    with pytest.raises(ValueError, match="same key"):
        Keys(scheduler.public, scheduler.secret, nodes=(nodes[0].public, nodes[0].public))


def make_keys(*arguments):
    return subprocess.run([sys.executable, "-m", "lapse", "keys", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=60, check=False)


def test_the_command_writes_files_for_their_owner_alone(tmp_path):
    folder = tmp_path / "keys"
    done = make_keys("-s", 3, folder)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["node-0.key", "node-1.key", "node-2.key", "scheduler.key"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o400}
    read = {path.name: keys.read_file(str(path)) for path in folder.iterdir()}
    assert read["scheduler.key"].nodes == tuple(read[f"node-{rank}.key"].public for rank in range(3))
    for member in read.values():
        assert member.secret not in done.stdout + done.stderr
    again = make_keys("-s", 3, folder)
    assert again.returncode == 2 and "scheduler.key is there already" in again.stderr
    assert {path.name: keys.read_file(str(path)) for path in folder.iterdir()} == read


def test_the_command_leaves_nothing_half_written(tmp_path):
    (tmp_path / "node-1.key").write_text("mine")
    assert make_keys("-s", 3, tmp_path).returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["node-1.key"]
    assert (tmp_path / "node-1.key").read_text() == "mine"
    for number, folder in ((0, "x"), (None, "x"), (2, "no/where"), (2, "node-1.key")):
        done = make_keys(*(() if number is None else ("-s", number)), tmp_path / folder)
        assert done.returncode == 2 and "lapse keys: error: " in done.stderr
        assert not (tmp_path / "x").exists()


def test_files_that_others_may_read_are_refused(tmp_path):
    path = keys.write_files(str(tmp_path), 2)[1]
    environ = {**CLUSTER, "DMLC_ROLE": "server", "LAPSE_KEYS": str(path)}
    config = Config.make(1, 1, environ=environ)
    assert (config.mode, config.rank_hint, config.authenticated) == ("curve", 0, True)
    assert config.keys.secret not in repr(config)
    for mode in (0o440, 0o404, 0o644):
        path.chmod(mode)
        with pytest.raises(ValueError, match=r"node-0\.key: others than its owner .*chmod 400"):
            Config.make(1, 1, environ=environ)
    path.unlink()
    with pytest.raises(ValueError, match=r"LAPSE_KEYS .*node-0\.key: No such file"):
        Config.make(1, 1, environ=environ)
    with pytest.raises(ValueError, match=r"LAPSE_KEYS /dev/null: not a file"):
        Config.make(1, 1, environ={**environ, "LAPSE_KEYS": "/dev/null"})
    with pytest.raises(ValueError, match="Is a directory"):
        Config.make(1, 1, environ={**environ, "LAPSE_KEYS": str(tmp_path)})


def test_keys_decide_the_mode_and_the_rank():
    nodes, scheduler = keys.make(2)
    server = {**CLUSTER, "DMLC_ROLE": "server"}
    own = {**server, "LAPSE_SECRET_KEYS": nodes[1].to_text()}
    assert Config.make(1, 1, environ={**own, "LAPSE_TOKEN": "0123456789"}).mode == "curve"
    assert Config.make(1, 1, environ={**own, "LAPSE_RANK": "1"}).rank_hint == 1
    assert Config.make(1, 1, environ={**own, "LAPSE_TOKEN": "0123456789"}, security="token").mode == "token"
    assert Config.make(1, 1, environ={**own, "LAPSE_SECURITY": "none"}).mode == "none"
    assert Config.make(1, 1, environ={"LAPSE_SECRET_KEYS": "not of a job"}).keys is None
    for environ, text in (
            ({**server, "LAPSE_SECURITY": "curve"}, "needs keys: LAPSE_KEYS"),
            ({**own, "LAPSE_RANK": "0"}, "keys are those of node 1.*node 0"),
            ({**own, "DMLC_ROLE": "scheduler"}, "keys are those of node 1, this is a scheduler"),
            ({**server, "LAPSE_SECRET_KEYS": scheduler.to_text()}, "keys are those of the scheduler, this is a server"),
            ({**own, "DMLC_NUM_SERVER": "1"}, "rank_hint"),
            ({**server, "DMLC_ROLE": "scheduler", "DMLC_NUM_SERVER": "3", "LAPSE_SECRET_KEYS": scheduler.to_text()}, "2 nodes, not of 3")):
        with pytest.raises(ValueError, match=text):
            Config.make(1, 1, environ=environ)


def test_beyond_loopback_only_with_keys_or_when_told():
    server = {**CLUSTER, "DMLC_ROLE": "server"}
    own = {**server, "LAPSE_SECRET_KEYS": keys.make(2)[0][0].to_text()}
    for environ in (own, {**own, "LAPSE_SECURITY": "curve"}, {**server, "LAPSE_SECURITY": "none"}):
        sockets.check_beyond_loopback("x", "192.0.2.1", Config.make(1, 1, environ=environ))
    for environ in (server, {**server, "LAPSE_TOKEN": "0123456789"}, {**own, "LAPSE_TOKEN": "0123456789", "LAPSE_SECURITY": "token"}):
        config = Config.make(1, 1, environ=environ)
        sockets.check_beyond_loopback("x", "127.0.0.1", config)
        with pytest.raises(LapseError, match=r"^x: .*not be encrypted; .*LAPSE_SECURITY=curve.*LAPSE_KEYS.*LAPSE_SECURITY=none"):
            sockets.check_beyond_loopback("x", "192.0.2.1", config)


def test_without_curve_in_libzmq(monkeypatch):
    monkeypatch.setattr(zmq, "has", lambda name: False)
    with pytest.raises(LapseError, match="built without CURVE; install pyzmq from a wheel"):
        keys.make(1)


def test_keys_are_public_keys_in_the_welcome_and_nothing_else():
    def message(key):
        return json.dumps({"type": "welcome", "rank": 0, "job": 1, "pid": 1,
                           "members": [{"rank": 0, "host": "h", "place": "p", "pid": 1, "key": key}]}).encode()

    for key in ("", keys.make(1)[0][0].public):
        assert control.decode([message(key)])["members"][0]["key"] == key
    for key in (None, 1, "short", "~" * 40, "é" * 40, "0" * 41):
        with pytest.raises(control.Malformed, match="bad members"):
            control.decode([message(key)])


# -- jobs

def run_job(transport="tcp", attack=None) -> list[dict]:
    """What `add` returns on each of three nodes."""
    return [result for result, in launch(add, 3, num_keys=NUM_KEYS, value_length=LENGTH, security="curve", transport=transport,
                                         args=(attack,))]


def add(worker, attack):
    """Add ones to all keys in rounds, move keys around, and after `attack` (node 0) look at sums and counters."""
    node = lapse.node._node
    rank, everything = node.rank, np.arange(NUM_KEYS)
    worker.localize(everything[rank::3].copy())
    for _ in range(ROUNDS):
        worker.push(everything, np.ones((NUM_KEYS, LENGTH), np.float32))
    worker.waitall()
    worker.barrier()
    before = node.van.counters()
    worker.barrier()
    tried = attack(node) if attack is not None and rank == 0 else None
    worker.barrier()
    after = node.van.counters()
    worker.barrier()
    got = np.zeros((NUM_KEYS, LENGTH), np.float32)
    worker.pull(everything, got)
    return {"exact": bool((got == 3 * ROUNDS).all()), "before": before, "after": after, "tried": tried, "refused": node.cluster.refused,
            "mode": node.cluster.config.mode, "environ": "".join(os.environ.values()), "secret": node.cluster.config.keys.secret,
            "cmdline": Path("/proc/self/cmdline").read_text(),
            "ways": {push.getsockopt(zmq.LAST_ENDPOINT).decode().partition(":")[0] for push in node.cluster.push}}


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_job_with_keys(transport):
    results = run_job(transport)
    for result in results:
        assert result["exact"] and result["mode"] == "curve"
        assert result["ways"] == {"inproc", transport}
        assert result["after"]["received_messages"] > 0
        assert not any(other["secret"] in result["environ"] + result["cmdline"] for other in results)
    assert len({result["secret"] for result in results}) == 3


@pytest.mark.parametrize(("variable", "expected"), [("", "token"), ("token", "token"), ("curve", "curve"), ("none", "none")])
def test_the_launchers_go_by_the_environment(monkeypatch, variable, expected):
    monkeypatch.setenv("LAPSE_SECURITY", variable)
    assert launch(lambda worker: lapse.node._node.cluster.config.mode, 2, num_keys=1, value_length=1) == [[expected]] * 2
    program = ("import lapse; lapse.setup(1, 1); server = lapse.Server(1); print('mode', lapse.node._node.config.mode, flush=True); "
               "server.shutdown()")
    done = subprocess.run([sys.executable, "-m", "lapse", "run", "-s", "2", sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                          text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0 and done.stdout.count(f"mode {expected}\n") == 2, done.stderr


def strangers(public: str, member: Keys) -> dict:
    """{what a stranger tries: set it up on a socket}; the server's public key, and a member's keys for what needs them."""
    own_public, own_secret = zmq.curve_keypair()
    wrong_public, _ = zmq.curve_keypair()

    def curve(sock, pair, server):
        sock.curve_publickey, sock.curve_secretkey = pair
        sock.curve_serverkey = server

    def plain(sock):
        sock.plain_username, sock.plain_password = b"1", b"0123456789"

    return {
        "no security": lambda sock: None,
        "PLAIN": plain,
        "a key of its own": lambda sock: curve(sock, (own_public, own_secret), public.encode()),
        "a key of its own and the wrong server key": lambda sock: curve(sock, (own_public, own_secret), wrong_public),
        "a member's public key without the secret one": lambda sock: curve(sock, (member.public.encode(), own_secret), public.encode()),
        "a member's keys and the wrong server key": lambda sock: curve(
            sock, (member.public.encode(), member.secret.encode()), wrong_public),
    }


def try_to_enter(endpoint: str, kind: int, prepare, frame: bytes) -> str:
    """What became of an attempt: the monitor's word, or "nothing" when it got no answer at all in time."""
    with zmq.Context() as context:
        sock = context.socket(kind)
        sock.linger = 0
        sock.reconnect_ivl = -1
        monitor = sock.get_monitor_socket(zmq.EVENT_ALL)
        prepare(sock)
        sock.connect(endpoint)
        sock.send(frame)
        fate = "nothing"
        end = time.monotonic() + PATIENCE
        while fate == "nothing" and monitor.poll(max(0, (end - time.monotonic()) * 1000)):
            event = zmq.Event(struct.unpack("=HI", monitor.recv_multipart()[0])[0])
            if event.name.startswith(("HANDSHAKE", "DISCONNECTED")):
                fate = event.name
        sock.disable_monitor()
        monitor.close(0)
        sock.close(0)
    return fate


def attack(node) -> dict:
    """Everything that a stranger on the network could try, at the scheduler and at the other nodes; run by node 0."""
    config = node.cluster.config
    link = node.cluster._link
    frame = struct.pack("<IHBBQQIIIIQQQ", 0x4553504C, 1, 16, 0, node.cluster.job_id, 1, 0, 0, 0, 0, 0, 0, 0)
    join = control.encode("join", version=control.VERSION, nodes=3, threads=1, host="h", place="p", pid=1, hint=0, description={},
                          join_timeout=9, barrier_warning=9)
    targets = [(f"tcp://127.0.0.1:{config.root_port}", zmq.DEALER, join, config.keys.scheduler)]
    targets += [(node.cluster.push[rank].getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode(), zmq.PUSH, frame, link._keys[rank])
                for rank in (1, 2)]
    fates = {}
    for endpoint, kind, message, public in targets:
        for what, prepare in strangers(public, config.keys).items():
            fates[f"{what} at {endpoint}"] = try_to_enter(endpoint, kind, prepare, message)
        port = int(endpoint.rpartition(":")[2])
        for data in GARBAGE:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
                sock.sendall(data)
    return fates


def test_a_stranger_cannot_send_one_message():
    results = run_job(attack=attack)
    fates = results[0]["tried"]
    assert len(fates) == 18
    assert not {what: fate for what, fate in fates.items() if fate in ("HANDSHAKE_SUCCEEDED", "nothing")}
    assert {fate for what, fate in fates.items() if what.startswith("a key of its own at")} == {"HANDSHAKE_FAILED_AUTH"}
    for result in results:
        assert result["exact"]
        assert result["after"] == result["before"], "a stranger's message arrived"
    assert results[0]["refused"] == 0
    assert all(result["refused"] >= len(fates) / 3 for result in results[1:])       # each attempt is counted, and much of the garbage


def test_what_strangers_are_refused_is_what_members_are_granted():
    """The same attempt with the member's keys and the right server key succeeds: the test above would see it."""
    def enter(node):
        config = node.cluster.config
        join = control.encode("leave")

        def prepare(sock):
            sock.curve_publickey, sock.curve_secretkey = config.keys.public.encode(), config.keys.secret.encode()
            sock.curve_serverkey = config.keys.scheduler.encode()

        return try_to_enter(f"tcp://127.0.0.1:{config.root_port}", zmq.DEALER, prepare, join)

    results = run_job(attack=enter)
    assert results[0]["tried"] == "HANDSHAKE_SUCCEEDED"
    assert all(result["exact"] for result in results)


def impersonate(node) -> None:
    """Node 0 connects to node 1 with its own keys, and says in the header that it is node 2."""
    config, link = node.cluster.config, node.cluster._link
    with zmq.Context() as context, context.socket(zmq.PUSH) as sock:
        sock.curve_publickey, sock.curve_secretkey = config.keys.public.encode(), config.keys.secret.encode()
        sock.curve_serverkey = link._keys[1].encode()
        sock.connect(node.cluster.push[1].getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode())
        sock.send(struct.pack("<IHBBQQIIIIQQQ", 0x4553504C, 1, 8, 0, node.cluster.job_id, 2, 2, 2, 0, 0, 1, 0, 0))


def test_a_member_in_the_name_of_another_is_caught_and_named():
    with pytest.raises(NodeFailure, match=r"node 0 .*a frame in the name of another node") as error:
        run_job(attack=impersonate)
    assert error.value.rank == 0
    assert error.value.noticed_by.startswith("node 1")


def test_a_member_that_joins_in_the_name_of_another_is_refused():
    nodes, own = keys.make(2)
    scheduler = Scheduler(Config(num_keys=1, num_threads=1, role="scheduler", num_nodes=2, keys=own), launched=True)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    try:
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.curve_publickey, dealer.curve_secretkey = nodes[0].public.encode(), nodes[0].secret.encode()
            dealer.curve_serverkey = own.public.encode()
            dealer.connect(f"tcp://127.0.0.1:{scheduler.port}")
            for hint, words in ((1, "its key is that of node 0, not of node 1"), (None, "not of node None")):
                dealer.send(control.encode("join", version=control.VERSION, nodes=2, threads=1, host="h", place="p", pid=1, hint=hint,
                                           description={}, join_timeout=10, barrier_warning=10))
                assert dealer.poll(PATIENCE * 1000)
                answer = control.decode(dealer.recv_multipart())
                assert answer["type"] == "refused" and words in answer["reason"]
            assert scheduler.joined == 0
    finally:
        scheduler.stop()
        thread.join(PATIENCE)


# -- started by hand



def by_hand(tmp_path, members: dict, **environ) -> dict:
    """Run the members of a job of 2 nodes (name -> its key file) as three processes; {name: (exit code, output)}."""
    path = tmp_path / "program.py"
    path.write_text("""
import os, sys, numpy, lapse
lapse.setup(20, 1, join_timeout=4)
if os.environ["DMLC_ROLE"] == "scheduler":
    lapse.scheduler(20, 1, join_timeout=4)
    sys.exit(print("scheduler done"))
server = lapse.Server(2)
worker = lapse.Worker(0, server)
worker.push(numpy.arange(20), numpy.ones((20, 2), numpy.float32))
worker.barrier()
got = numpy.zeros((20, 2), numpy.float32)
worker.pull(numpy.arange(20), got)
print("sum", got.sum())
worker.finalize()
server.shutdown()
""")
    processes = {}
    with reserved_port() as port:
        for name, file in members.items():
            env = {**os.environ, "DMLC_ROLE": "scheduler" if name == "scheduler" else "server", "DMLC_NUM_SERVER": "2",
                   "DMLC_PS_ROOT_URI": "127.0.0.1", "DMLC_PS_ROOT_PORT": str(port), "PYTHONPATH": str(ROOT),
                   "TMPDIR": str(tmp_path), **environ}
            if file is not None:
                env["LAPSE_KEYS"] = str(file)
            processes[name] = subprocess.Popen([sys.executable, path], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            outputs = {name: process.communicate(timeout=PATIENCE)[0] for name, process in processes.items()}
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()
    return {name: (processes[name].returncode, output) for name, output in outputs.items()}


@pytest.fixture
def files(tmp_path):
    paths = keys.write_files(str(tmp_path / "keys"), 2)
    return dict(zip(("scheduler", "node 0", "node 1"), paths, strict=True))


def test_processes_started_by_hand_with_key_files(tmp_path, files):
    results = by_hand(tmp_path, files)
    assert {code for code, _ in results.values()} == {0}, results
    assert "sum 80.0" in results["node 0"][1] and "sum 80.0" in results["node 1"][1]


def test_keys_of_another_job_are_refused_with_words(tmp_path, files):
    other = keys.write_files(str(tmp_path / "other"), 2)
    results = by_hand(tmp_path, {**files, "node 1": other[2]})
    assert all(code for code, _ in results.values())
    assert "are the keys those of this job?" in results["node 1"][1]


def test_a_node_without_keys_is_refused(tmp_path, files):
    results = by_hand(tmp_path, {**files, "node 1": None})
    assert all(code for code, _ in results.values())
    assert "cannot reach the scheduler" in results["node 1"][1] and "another security mode" in results["node 1"][1]


def test_the_key_of_one_node_does_not_make_another(tmp_path, files):
    """Twice the same file: the second one is refused, whatever it says of itself."""
    results = by_hand(tmp_path, {**files, "node 1": files["node 0"]})
    assert "rank 0 is taken" in results["node 0"][1] + results["node 1"][1]
