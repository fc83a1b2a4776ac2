"""lapse.cluster with real sockets and real processes: rendezvous, meetings, liveness, strangers. Loopback only, free ports only."""
from __future__ import annotations

import fcntl
import json
import os
import queue
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import zmq
from ports import reserved_port

from lapse import _sweep, control, hosts, ipc, sockets
from lapse.cluster import Cluster, Failure, Scheduler, any_alive
from lapse.config import Config
from lapse.errors import LapseError, NodeFailure

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("cluster_node.py")
PATIENCE = 30.0     # seconds; every wait ends by then
QUICK = {"heartbeat_interval": 0.2, "heartbeat_timeout": 0.8}


class Process:
    """tests/unit/cluster_node.py and what it says."""

    def __init__(self, environ: dict, **options):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DMLC_", "LAPSE_", "PS_"))}
        self.popen = subprocess.Popen([sys.executable, PROGRAM, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      text=True, env={**inherited, "PYTHONPATH": str(ROOT), **environ})
        self.pid = self.popen.pid
        self.events: list[dict] = []
        self._queue: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.popen.stdout:
            self._queue.put(json.loads(line))
        self._queue.put({"event": "eof"})

    def expect(self, event: str, **fields) -> dict:
        """The first event, past or to come, with these fields; each is handed out once."""
        deadline = time.monotonic() + PATIENCE
        while True:
            for i, seen in enumerate(self.events):
                if seen["event"] == event and all(seen.get(k) == v for k, v in fields.items()):
                    return self.events.pop(i)
            try:
                self.events.append(self._queue.get(timeout=max(0.01, deadline - time.monotonic())))
            except queue.Empty:
                pytest.fail(f"no {event} {fields} from process {self.pid} in {PATIENCE} s; it said: {self.events}")
            if self.events[-1]["event"] == "eof" and event != "eof":
                pytest.fail(f"process {self.pid} ended without {event} {fields}; it said: {self.events}")

    def log_with(self, text: str) -> dict:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            entry = self.expect("log")
            if text in entry["text"]:
                return entry
        pytest.fail(f"no log line with {text!r}")

    def tell(self, do: str, **fields) -> None:
        self.popen.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self.popen.stdin.flush()

    def ask(self, do: str, **fields) -> dict:
        self.tell(do, **fields)
        done = self.expect("done", what=do)
        assert done["error"] is None, done
        return done

    def has_said(self, event: str, **fields) -> bool:
        while not self._queue.empty():
            self.events.append(self._queue.get())
        return any(e["event"] == event and all(e.get(k) == v for k, v in fields.items()) for e in self.events)

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self.popen.stdin.close()


class Job:
    """A scheduler in this process (or none), and nodes in others."""

    def __init__(self, num_nodes: int, settings: dict, token: str | None, ipc_dir: str):
        self.num_nodes, self.settings, self.token, self.ipc_dir = num_nodes, settings, token, ipc_dir
        self.processes: list[Process] = []
        self.scheduler: Scheduler | None = None
        self.outcome: list = []
        self.thread: threading.Thread | None = None
        self.port = 0

    def start_scheduler(self, **options) -> Scheduler:
        config = Config(num_keys=100, num_threads=1, role="scheduler", num_nodes=self.num_nodes, token=self.token,
                        **{k: v for k, v in self.settings.items() if k.startswith(("heartbeat", "join", "security"))})
        self.scheduler = Scheduler(config, **options)
        self.port = self.scheduler.port
        self.thread = threading.Thread(target=lambda: self.outcome.append(self.scheduler.run()), daemon=True)
        self.thread.start()
        return self.scheduler

    def start_scheduler_process(self, **options) -> Process:
        scheduler = Process({**self.environment(), "DMLC_ROLE": "scheduler"}, scheduler=True, **options)
        self.processes.append(scheduler)
        return scheduler

    def environment(self, hint: int | None = None) -> dict:
        environ = {"DMLC_ROLE": "server", "DMLC_NUM_SERVER": str(self.num_nodes), "DMLC_PS_ROOT_URI": "127.0.0.1",
                   "DMLC_PS_ROOT_PORT": str(self.port), "LAPSE_IPC_DIR": self.ipc_dir}
        if self.token:
            environ["LAPSE_TOKEN"] = self.token
        return environ if hint is None else {**environ, "LAPSE_RANK": str(hint)}

    def start_node(self, hint: int | None = None, environ: dict | None = None, **options) -> Process:
        options.setdefault("settings", {})
        options["settings"] = {**self.settings, **options["settings"]}
        process = Process({**self.environment(hint), **(environ or {})}, **options)
        self.processes.append(process)
        return process

    def start_nodes(self, **options) -> list[Process]:
        nodes = [self.start_node(rank, **options) for rank in range(self.num_nodes)]
        self.infos = [node.expect("up") for node in nodes]
        return nodes

    def finish(self) -> None:
        """The normal end of all nodes."""
        for node in self.processes:
            node.tell("leave")
        for node in self.processes:
            assert node.expect("done", what="leave")["error"] is None
            node.ask("close")
        assert self.join() is None

    def join(self):
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the scheduler does not end"
        return self.outcome[0]

    def end(self) -> None:
        for process in self.processes:
            process.end()
        if self.thread is not None:
            self.scheduler.stop()
            self.join()


@pytest.fixture
def start(request):
    """start(num_nodes, **settings) -> Job. Nothing of it may be left when the test ends."""
    jobs, folders = [], []

    def begin(num_nodes: int, *, scheduler: bool = True, token: bool = True, **settings) -> Job:
        folder = ipc.Folder()
        folders.append(folder)
        job = Job(num_nodes, {"join_timeout": PATIENCE, **settings}, secrets.token_hex(8) if token else None, folder.path)
        jobs.append(job)
        if scheduler:
            job.start_scheduler()
        return job

    yield begin
    for job in jobs:
        job.end()
    for folder in folders:
        folder.remove()


# -- rendezvous

@pytest.mark.parametrize("transport", ["auto", "ipc", "tcp"])
@pytest.mark.parametrize("num_nodes", [1, 2, 4])
def test_nodes_meet_talk_and_leave(start, num_nodes, transport):
    job = start(num_nodes, transport=transport)
    nodes = job.start_nodes()
    assert [info["rank"] for info in job.infos] == list(range(num_nodes))
    assert len({info["job_id"] for info in job.infos}) == 1
    for info in job.infos:
        assert info["members"] == [[r, hosts.host_name(), node.pid] for r, node in enumerate(nodes)]
        assert info["token"] is None, "the token stays in the environment"
    for node in nodes:
        node.tell("exchange", size=100_000)
    for rank, node in enumerate(nodes):
        heard = node.expect("done", what="exchange")["result"]
        assert heard == {str(peer): None if peer == rank else str(peer) for peer in range(num_nodes)}
    for node in nodes:
        node.tell("ready")
    for node in nodes:
        assert node.expect("done", what="ready")["error"] is None
    job.finish()
    assert [path.name for path in Path(job.ipc_dir).iterdir()] == ["lock"]


def test_ranks_without_hints(start):
    job = start(3)
    nodes = [job.start_node() for _ in range(3)]
    assert sorted(node.expect("up")["rank"] for node in nodes) == [0, 1, 2]
    job.finish()


def test_auto_uses_ipc_within_a_host_and_tcp_between_hosts(start):
    job = start(3)
    nodes = [job.start_node(rank, place=place) for rank, place in enumerate(["a", "a", "b"])]
    infos = [node.expect("up") for node in nodes]
    ways = [[endpoint.partition(":")[0] for endpoint in info["push"]] for info in infos]
    assert ways == [["inproc", "ipc", "tcp"], ["ipc", "inproc", "tcp"], ["tcp", "tcp", "inproc"]]
    job.finish()


def test_ipc_between_hosts_is_refused(start):
    job = start(2, transport="ipc")
    nodes = [job.start_node(rank, place=place) for rank, place in enumerate("ab")]
    for node in nodes:
        assert "do not all run on one host" in node.expect("refused")["text"]


def test_without_a_token(start):
    job = start(2, token=False, transport="tcp")
    nodes = job.start_nodes()
    for node in nodes:
        node.log_with("no token")
        node.tell("exchange", size=10)
    for node in nodes:
        assert set(node.expect("done", what="exchange")["result"]) == {"0", "1"}
    job.finish()


def test_the_own_folder_is_removed(start):
    job = start(2)
    nodes = [job.start_node(rank, environ={"LAPSE_IPC_DIR": ""}) for rank in range(2)]
    folders = [Path(node.expect("up")["push"][1 - rank].removeprefix("ipc://")).parent for rank, node in enumerate(nodes)]
    assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)
    job.finish()
    assert not any(folder.exists() for folder in folders)


def test_two_jobs_at_once_never_meet(start):
    jobs = [start(2), start(2)]
    pairs = [[job.start_node(rank) for rank in range(2)] for job in jobs]
    ids = [{node.expect("up")["job_id"] for node in nodes} for nodes in pairs]
    assert len(ids[0]) == len(ids[1]) == 1
    assert ids[0] != ids[1]
    for job in jobs:
        job.finish()


def start_nodes_first(job):
    """Nodes that have looked for their scheduler for a while when it comes."""
    nodes = [job.start_node(rank) for rank in range(2)]
    for node in nodes:
        node.expect("joining")
    time.sleep(1)
    scheduler = job.start_scheduler_process()
    scheduler.expect("listening")
    for node in nodes:
        node.expect("up")
        node.tell("leave")
    for node in nodes:
        assert node.expect("done", what="leave")["error"] is None
    assert scheduler.expect("end")["failure"] is None


def test_nodes_may_start_before_the_scheduler(start):
    job = start(2, scheduler=False)
    with reserved_port() as job.port:
        start_nodes_first(job)


@pytest.mark.parametrize("token", [True, False])
def test_a_node_that_waits_for_its_scheduler_does_not_reach_itself(jobs, token):
    """The scheduler's port is one of four that the system gives to connections, in a network namespace where it has no more."""
    namespace = ["unshare", "-rn"]
    try:
        subprocess.run([*namespace, "sh", "-c", "echo 40000 40003 > /proc/sys/net/ipv4/ip_local_port_range"], check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace of its own here: {error}")
    jobs.env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    result = jobs.run(*namespace, sys.executable, Path(__file__).with_name("early_nodes.py"), int(token))
    assert result.code == 0, result.text


def test_a_connection_never_comes_from_the_port_that_it_goes_to(monkeypatch):
    """Also when the system offers that one first; what leads to another host needs none of it."""
    with sockets.reserve_source("127.0.0.1", 0) as offered:
        offers = [offered.dup()]
        bound_socket = sockets._bound_socket
        monkeypatch.setattr(sockets, "_bound_socket", lambda address: offers.pop() if offers else bound_socket(address))
        with sockets.reserve_source("127.0.0.1", offered.getsockname()[1]) as source:
            assert not offers and source.getsockname()[1] != offered.getsockname()[1]
    monkeypatch.setattr(hosts, "address_towards", lambda address: "192.0.2.2")
    assert sockets.reserve_source("192.0.2.1", 1) is None


def test_port_range(start):
    job = start(2, transport="tcp")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        low = probe.getsockname()[1]
    high = min(low + 20, 65535)
    nodes = [job.start_node(rank, environ={"LAPSE_PORT_RANGE": f"{low}-{high}"}) for rank in range(2)]
    for rank, node in enumerate(nodes):
        port = int(node.expect("up")["push"][1 - rank].rpartition(":")[2])
        assert low <= port <= high
    job.finish()


def test_exhausted_port_range(start):
    job = start(2, transport="tcp")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        node = job.start_node(0, environ={"LAPSE_PORT_RANGE": f"{port}-{port}"})
        other = job.start_node(1)
        assert f"{port}-{port}" in node.expect("refused")["text"]
        assert f"{port}-{port}" in other.expect("refused")["text"]


# -- refusals

def test_a_differing_description_is_named_with_both_values_and_ranks(start):
    job = start(3)
    nodes = [job.start_node(rank, description={"num_keys": 10 if rank != 1 else 20, "dtype": "float32"}) for rank in range(3)]
    for node in nodes:
        refusal = node.expect("refused")
        assert refusal["error"] == "LapseError"
        assert "differ in num_keys: 10 on node 0" in refusal["text"]
        assert "20 on node 1" in refusal["text"]
    assert "num_keys" in job.join().cause


def test_another_number_of_nodes_is_refused(start):
    job = start(2)
    stray = job.start_node(environ={"DMLC_NUM_SERVER": "3"})
    assert "expects 3 nodes, the scheduler 2" in stray.expect("refused")["text"]


def test_one_node_too_many_is_refused_and_the_job_goes_on(start):
    job = start(2)
    nodes = job.start_nodes()
    extra = job.start_node()
    assert "has its 2 nodes already" in extra.expect("refused")["text"]
    job.processes.remove(extra)
    extra.end()
    for rank, node in enumerate(nodes):
        node.tell("barrier", group="nodes", member=str(rank))
    for node in nodes:
        assert node.expect("done", what="barrier")["error"] is None
    job.finish()


def test_a_taken_rank_is_refused(start):
    job = start(3)
    job.start_node(1)
    deadline = time.monotonic() + PATIENCE
    while job.scheduler.joined < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert job.start_node(1).expect("refused")["text"] == "rank 1 is taken"


@pytest.mark.parametrize("environ", [{"LAPSE_TOKEN": "not the job's token"}, {"LAPSE_TOKEN": ""}])
def test_a_wrong_token_is_refused(start, environ, caplog):
    job = start(2)
    stranger = job.start_node(environ=environ, settings={"join_timeout": 3.0})
    text = stranger.expect("refused")["text"]
    assert f"127.0.0.1:{job.port}" in text
    if environ["LAPSE_TOKEN"]:
        assert "refused this node's token" in text
        assert any("does not belong to this job" in record.getMessage() for record in caplog.records)
    job.processes.remove(stranger)
    stranger.end()
    job.start_nodes()
    job.finish()


def test_an_unreachable_scheduler_is_named(start):
    job = start(2, scheduler=False)
    with reserved_port() as job.port:
        node = job.start_node(settings={"join_timeout": 0.5})
        refusal = node.expect("refused")
    assert refusal["error"] == "LapseError"
    assert f"cannot reach the scheduler at 127.0.0.1:{job.port} within 0.5 s" in refusal["text"]


def test_a_missing_node_is_named(start):
    job = start(3)
    nodes = [job.start_node(rank, settings={"join_timeout": 1.0}) for rank in (0, 2)]
    for node in nodes:
        text = node.expect("refused")["text"]
        assert "node 1 did not join" in text
    assert "node 1 did not join" in job.join().cause


def test_beyond_loopback_only_when_told(start):
    with pytest.raises(LapseError, match="LAPSE_SECURITY=none"):
        Scheduler(Config(num_keys=1, num_threads=1, role="scheduler", root_host="0.0.0.0", token="0123456789"))
    config = Config(num_keys=1, num_threads=1, role="server", root_host="192.0.2.1", root_port=9, token="0123456789")
    with pytest.raises(LapseError, match="beyond loopback"):
        Cluster(config, {}, lambda failure: None)
    job = start(2, transport="tcp")
    nodes = [job.start_node(rank, environ={"DMLC_NODE_HOST": "0.0.0.0"}) for rank in range(2)]
    for node in nodes:
        assert "refusing to listen on 0.0.0.0" in node.expect("refused")["text"]


def test_a_folder_that_others_may_enter_is_refused(start, tmp_path):
    tmp_path.chmod(0o755)
    job = start(1)
    assert "mode 0700" in job.start_node(environ={"LAPSE_IPC_DIR": str(tmp_path)}).expect("refused")["text"]


def test_a_taken_port_is_named(start):
    job = start(1)
    with pytest.raises(LapseError, match=f"port {job.port} of 127.0.0.1: in use"):
        Scheduler(Config(num_keys=1, num_threads=1, role="scheduler", root_port=job.port, token="0123456789"))


# -- meetings

def test_a_barrier_waits_for_the_last_member_and_can_be_resumed(start):
    job = start(2)
    nodes = job.start_nodes(threads=2)
    for member in ("0/0", "0/1"):
        nodes[0].tell("barrier", group="workers", member=member, timeout=0.1)
        assert nodes[0].expect("done", what="barrier", member=member)["error"] == "TimeoutError"
    nodes[1].tell("barrier", group="workers", member="1/0")
    nodes[0].tell("barrier", group="workers", member="0/0")         # the same arrival, not a second one
    nodes[1].tell("barrier", group="workers", member="1/1")
    for node, member in ((nodes[1], "1/0"), (nodes[1], "1/1"), (nodes[0], "0/0")):
        assert node.expect("done", what="barrier", member=member)["error"] is None
    nodes[0].ask("barrier", group="workers", member="0/1")          # released meanwhile: returns at once
    job.finish()


def test_retired_members_count_as_arrived_until_they_are_back(start):
    job = start(2)
    nodes = job.start_nodes(threads=2)
    nodes[1].ask("retire", member="1/1")
    for _ in range(2):
        for node, member in ((nodes[0], "0/0"), (nodes[0], "0/1"), (nodes[1], "1/0")):
            node.tell("barrier", group="workers", member=member)
        for node, member in ((nodes[0], "0/0"), (nodes[0], "0/1"), (nodes[1], "1/0")):
            assert node.expect("done", what="barrier", member=member)["error"] is None
    nodes[0].ask("retire", member="0/0")
    nodes[0].ask("retire", member="0/1")
    nodes[1].ask("enlist", member="1/1")
    nodes[1].tell("barrier", group="workers", member="1/0", timeout=0.3)
    assert nodes[1].expect("done", what="barrier")["error"] == "TimeoutError"
    nodes[1].ask("barrier", group="workers", member="1/1")
    job.finish()


def test_a_retirement_releases_those_who_wait(start):
    job = start(1)
    node, = job.start_nodes(threads=2)
    node.tell("barrier", group="workers", member="0/0")
    node.ask("retire", member="0/1")
    assert node.expect("done", what="barrier")["error"] is None
    job.finish()


def test_missing_members_are_named(start):
    job = start(2, barrier_warning=0.2)
    nodes = job.start_nodes(threads=2)
    nodes[0].tell("barrier", group="workers", member="0/1")
    for node in nodes:
        assert "missing workers (node/worker): 0/0, 1/0, 1/1" in node.log_with("barrier")["text"]
    for node, member in ((nodes[0], "0/0"), (nodes[1], "1/0"), (nodes[1], "1/1")):
        node.tell("barrier", group="workers", member=member)
    assert nodes[0].expect("done", what="barrier", member="0/1")["error"] is None
    job.finish()


@pytest.mark.parametrize(("group", "member"), [("workers", "0/0"), ("workers", "1/0"), ("workers", "0/7"), ("nobody", "0"), ("nodes", "x")])
def test_wrong_arrivals_end_the_job(start, group, member):
    """The same member twice, another node's, one that is none."""
    job = start(2)
    nodes = job.start_nodes()
    nodes[0].tell("barrier", group="workers", member="0/0")
    nodes[0].tell("barrier", group=group, member=member)
    for node in nodes:
        failure = node.expect("failure")
        assert failure["rank"] == 0
        assert "protocol error" in failure["cause"]
    assert nodes[0].expect("done", what="barrier")["error"] == "NodeFailure"


def test_compare_hands_everybodys_data_to_all(start):
    job = start(3)
    nodes = job.start_nodes()
    for rank, node in enumerate(nodes):
        node.tell("compare", name="digest", data={"value": rank * 10, "list": [rank, None, "x"]})
    expected = {str(rank): {"value": rank * 10, "list": [rank, None, "x"]} for rank in range(3)}
    for node in nodes:
        assert node.expect("done", what="compare")["result"] == expected
    job.finish()


# -- failures

def assert_all_get(nodes, **fields) -> Failure:
    """Every node's on_failure is called with the same words, once."""
    verdicts = {tuple(sorted(node.expect("failure").items(), key=str)) for node in nodes}
    assert len(verdicts) == 1, verdicts
    verdict = dict(verdicts.pop())
    assert {name: verdict[name] for name in fields} == fields
    for node in nodes:
        node.tell("barrier", group="nodes", member="0")
        assert node.expect("done", what="barrier")["error"] == "NodeFailure"
        assert not node.has_said("failure")
    return Failure(*(verdict[name] for name in Failure._fields))


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_killed_node_is_named(start, transport):
    job = start(3, transport=transport)
    nodes = job.start_nodes()
    nodes[1].popen.kill()
    failure = assert_all_get([nodes[0], nodes[2]], rank=1, pid=nodes[1].pid, cause="the process died")
    assert failure.host == hosts.host_name()
    assert job.join() == failure


def test_the_scheduler_itself_sees_a_node_die(start):
    job = start(1)
    node, = job.start_nodes()
    node.popen.kill()
    failure = job.join()
    assert (failure.rank, failure.cause, failure.noticed_by) == (0, "the process died", "the scheduler")


def test_a_killed_node_that_waits_in_a_barrier(start):
    job = start(2)
    nodes = job.start_nodes()
    for rank, node in enumerate(nodes[:1]):
        node.tell("barrier", group="nodes", member=str(rank))
    nodes[1].popen.kill()
    assert nodes[0].expect("done", what="barrier")["error"] == "NodeFailure"
    assert nodes[0].expect("failure")["rank"] == 1


def test_a_frozen_node_is_named(start):
    job = start(3, **QUICK)
    nodes = job.start_nodes()
    os.kill(nodes[2].pid, signal.SIGSTOP)
    failure = assert_all_get(nodes[:2], rank=2, pid=nodes[2].pid)
    assert "stopped" in failure.cause
    assert job.join() == failure


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_frozen_node_is_noticed_by_a_sender_with_a_backlog(start, transport):
    """Its own connection to the frozen node tells nothing; the one in the other direction does, and the scheduler's."""
    job = start(2, transport=transport, **QUICK)
    nodes = job.start_nodes()
    for node in nodes:
        node.tell("exchange", size=1)
    for node in nodes:
        node.expect("done", what="exchange")
    os.kill(nodes[1].pid, signal.SIGSTOP)
    nodes[0].ask("flood", rank=1, megabytes=20)
    assert nodes[0].expect("failure")["rank"] == 1


@pytest.mark.parametrize("end", ["pull", "push"])
def test_a_cut_between_two_nodes_is_noticed(start, end):
    """Both are alive and in touch with the scheduler; only their monitors can tell, those of PUSH and those of PULL."""
    job = start(3)
    nodes = job.start_nodes()
    for node in nodes:
        node.tell("exchange", size=1)
    for node in nodes:
        node.expect("done", what="exchange")
    nodes[1].ask("cut", end=end)
    assert "its connection broke" in assert_all_get(nodes, rank=1).cause


def test_a_cut_before_it_is_known_whose_connection_it_is(start):
    """The monitor has told of the end when the first message of that connection is looked at."""
    job = start(3)
    nodes = job.start_nodes()
    for node in nodes:
        node.tell("exchange", size=1, hear=node is not nodes[0])
    for node in nodes:
        node.expect("done", what="exchange")
    nodes[1].ask("cut", end="push")
    time.sleep(0.3)         # its monitor tells in this time; if it does not, the test is the one above
    nodes[0].ask("hear")
    assert "its connection broke" in assert_all_get(nodes, rank=1).cause


def test_a_frozen_scheduler_ends_the_job(start):
    job = start(2, scheduler=False, **QUICK)
    with reserved_port() as job.port:
        scheduler = job.start_scheduler_process(settings=QUICK)
        nodes = job.start_nodes()
    os.kill(scheduler.pid, signal.SIGSTOP)
    for node in nodes:
        failure = node.expect("failure")
        assert failure["rank"] is None
        assert failure["pid"] == scheduler.pid
        assert f"the scheduler at 127.0.0.1:{job.port}" in failure["cause"]


def test_a_killed_scheduler_ends_the_job(start):
    job = start(2, scheduler=False)
    with reserved_port() as job.port:
        scheduler = job.start_scheduler_process()
        nodes = job.start_nodes()
    scheduler.popen.kill()
    for node in nodes:
        assert "the scheduler" in node.expect("failure")["cause"]


def test_held_gil_is_no_failure(start):
    """C code that holds the GIL for longer than the heartbeat timeout: libzmq's threads answer for the node."""
    job = start(2, **QUICK)
    nodes = job.start_nodes()
    nodes[0].ask("hold_gil", seconds=3)
    for rank, node in enumerate(nodes):
        node.tell("barrier", group="nodes", member=str(rank))
    for node in nodes:
        assert node.expect("done", what="barrier")["error"] is None
        assert not node.has_said("failure")
    job.finish()


def test_a_reported_failure_reaches_all(start):
    job = start(3)
    nodes = job.start_nodes()
    nodes[1].tell("fail", cause="interrupted")
    failure = assert_all_get(nodes, rank=1, cause="interrupted", noticed_by="itself")
    assert job.join() == failure


def test_an_accused_node(start):
    job = start(2)
    nodes = job.start_nodes()
    nodes[0].tell("fail", cause="sent a frame with the wrong sequence number", rank=1)
    failure = assert_all_get(nodes, rank=1, pid=nodes[1].pid)
    assert failure.noticed_by.startswith("node 0")


def test_the_launchers_word_wins(start):
    """The broken connection is noticed first; the cause is how the process ended."""
    job = start(2, scheduler=False)
    job.start_scheduler(launched=True)
    nodes = job.start_nodes()
    nodes[1].popen.kill()
    nodes[1].popen.wait()
    job.scheduler.process_ended(1, nodes[1].popen.returncode, nodes[1].pid)
    assert_all_get(nodes[:1], rank=1, cause="killed by signal 9 (SIGKILL)", noticed_by="the launcher")


def test_a_process_that_ends_before_it_joins(start):
    job = start(2, scheduler=False)
    job.start_scheduler(launched=True)
    job.scheduler.process_ended(1, 3, 4711)
    refusal = job.start_node(0).expect("refused")
    assert refusal["error"] == "NodeFailure"
    assert f"node 1 ({hosts.host_name()}, pid 4711): ended with exit code 3 before it joined" in refusal["text"]


def test_a_node_that_dies_while_the_cluster_forms(start):
    job = start(3)
    first = job.start_node(0)
    second = job.start_node(1)
    deadline = time.monotonic() + PATIENCE
    while job.scheduler.joined < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    second.popen.kill()
    refusal = first.expect("refused")
    assert refusal["error"] == "NodeFailure"
    assert "node 1" in refusal["text"]


def test_leaving_without_a_word_is_a_failure(start):
    job = start(2)
    nodes = job.start_nodes()
    nodes[1].popen.stdin.close()    # it ends with exit code 0
    assert nodes[0].expect("failure")["rank"] == 1


def test_a_forked_child_neither_sends_nor_closes(start):
    job = start(2)
    nodes = job.start_nodes()
    assert "forked child" in nodes[0].ask("fork")["result"]
    assert Path(job.infos[1]["push"][0].removeprefix("ipc://")).exists()
    for rank, node in enumerate(nodes):
        node.tell("barrier", group="nodes", member=str(rank))
    for node in nodes:
        assert node.expect("done", what="barrier")["error"] is None
        assert not node.has_said("failure")
    job.finish()


# -- strangers

GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x01\x00\x06\x00hello",                                           # ZMTP 1.0, without a handshake
    bytes.fromhex("16030100c8010000c40303") + bytes(190),               # a TLS ClientHello
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"*1\r\n$4\r\nPING\r\n",
    b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + bytes(48),  # ZMTP 3, another mechanism
    b"",
]


@pytest.mark.parametrize("token", [True, False])
def test_strangers_do_no_harm(start, token):
    job = start(2, transport="tcp", token=token)
    nodes = job.start_nodes()
    ports = [job.port, *(int(job.infos[r]["push"][1 - r].rpartition(":")[2]) for r in range(2))]
    rng = random.Random(7)
    for port in ports:
        for data in [*GARBAGE, *(rng.randbytes(rng.randrange(1, 300)) for _ in range(50))]:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
                sock.sendall(data)
    with zmq.Context() as context:      # a stranger who speaks ZMTP well
        for kind in (zmq.PUSH, zmq.DEALER):
            for port in ports:
                sock = context.socket(kind)
                sock.linger = 100
                sock.connect(f"tcp://127.0.0.1:{port}")
                sock.send(json.dumps({"type": "leave"}).encode())
                sock.send(b"\xff\xfe not json")
                sock.close()
    for node in nodes:
        node.tell("exchange", size=1)
    if token:
        for rank, node in enumerate(nodes):
            heard = node.expect("done", what="exchange")["result"]
            assert heard == {str(peer): None if peer == rank else str(peer) for peer in range(2)}
    for rank, node in enumerate(nodes):
        node.tell("barrier", group="nodes", member=str(rank))
    for node in nodes:
        assert node.expect("done", what="barrier")["error"] is None
        assert not node.has_said("failure")
    job.finish()


def test_a_member_that_sends_garbage_is_named(start):
    """Nothing of the node's code does that; so a member made by hand, which joins and then breaks the protocol."""
    job = start(1)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.plain_username, dealer.plain_password = b"node", job.token.encode()
        dealer.connect(f"tcp://127.0.0.1:{job.port}")
        dealer.send(control.encode("join", version=control.VERSION, nodes=1, threads=1, host="h", place="p", pid=1, hint=None,
                                   description={}, join_timeout=10, barrier_warning=10))
        assert dealer.poll(PATIENCE * 1000)
        assert json.loads(dealer.recv())["type"] == "welcome"
        dealer.send(b'{"type": "arrive", "group": 7}')
        failure = job.join()
        assert failure.rank == 0
        assert "protocol error" in failure.cause
        assert dealer.poll(PATIENCE * 1000)
        assert json.loads(dealer.recv())["type"] == "failed"


# -- one node, no cluster

def alone(threads: int = 1, on_failure=None) -> Cluster:
    return Cluster(Config.make(10, threads, environ={}), {"num_keys": 10}, on_failure or (lambda failure: None))


def test_alone_without_scheduler_port_or_thread():
    before = threading.active_count()
    cluster = alone(threads=2)
    assert (cluster.rank, cluster.num_nodes, threading.active_count()) == (0, 1, before)
    assert any_alive()
    cluster.ready()
    cluster.barrier("nodes", "0")
    with pytest.raises(TimeoutError):
        cluster.barrier("workers", "0/0", timeout=0.05)
    cluster.barrier("workers", "0/1")
    cluster.barrier("workers", "0/0")
    assert cluster.compare("x", {"a": 1}) == {0: {"a": 1}}
    cluster.push[0].send(b"to myself")
    assert cluster.pull.poll(PATIENCE * 1000)
    assert cluster.pull.recv() == b"to myself"
    cluster.leave()
    cluster.close()
    cluster.close()
    assert not any_alive()
    with pytest.raises(RuntimeError):
        cluster.barrier("nodes", "0")


def test_alone_failure_wakes_those_who_wait():
    failures = []
    cluster = alone(threads=2, on_failure=failures.append)
    raised = []

    def wait():
        try:
            cluster.barrier("workers", "0/0")
        except NodeFailure as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    cluster.fail("broken")
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert [failure.cause for failure in failures] == ["broken"]
    assert raised[0].cause == "broken"
    assert raised[0].rank == 0
    cluster.fail("again")
    assert len(failures) == 1
    cluster.close()


def test_start_and_stop_leak_nothing():
    alone().close()
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files(), threading.active_count()
    for _ in range(20):
        cluster = alone()
        cluster.leave()
        cluster.close()
    assert (open_files(), threading.active_count()) == before


@pytest.mark.parametrize("sweeper", ["lives", "dies"])
def test_folders_of_dead_processes_are_swept(monkeypatch, sweeper):
    """A folder whose owner was killed goes at once; when its sweeper was killed, too, with the next one. One that is in use stays."""
    program = ("import os, signal, sys\nfrom lapse import ipc\nfolder = ipc.Folder()\nprint(folder.path, flush=True)\n"
               "open(folder.path + '/socket', 'w').close()\n"
               "if sys.argv[1] == 'dies': folder._sweeper.kill(); folder._sweeper.wait()\nos.kill(os.getpid(), signal.SIGKILL)")
    base = tempfile.mkdtemp(dir="/tmp", prefix="t-")
    monkeypatch.setenv("TMPDIR", base)
    monkeypatch.setattr(tempfile, "tempdir", base)
    dead = subprocess.run([sys.executable, "-c", program, sweeper], capture_output=True, text=True, timeout=PATIENCE, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout.strip()
    assert dead.startswith(base)
    if sweeper == "lives":
        deadline = time.monotonic() + PATIENCE
        while Path(dead).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not Path(dead).exists()
    else:
        assert Path(dead).is_dir()
    mine = ipc.Folder()
    try:
        assert not Path(dead).exists()
        other = ipc.Folder()
        assert Path(mine.path).is_dir()
        other.remove()
        assert not Path(other.path).exists()
    finally:
        mine.remove()
    assert not list(Path(base).iterdir())
    Path(base).rmdir()


def test_the_sweeper_follows_no_link(tmp_path):
    """Once the folder is gone, anybody can give its name to something else."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "lock").touch()
    (theirs / "precious").touch()
    with (ours / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweeper = subprocess.Popen([sys.executable, "-I", "-S", _sweep.__file__, str(ours)])
        deadline = time.monotonic() + PATIENCE
        while not any(str(sweeper.pid) in line.split() for line in Path("/proc/locks").read_text().splitlines()):    # it waits
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ours.rename(tmp_path / "moved")
        ours.symlink_to(theirs)
    assert sweeper.wait(PATIENCE) == 0
    assert sorted(path.name for path in theirs.iterdir()) == ["lock", "precious"]
    assert not list((tmp_path / "moved").iterdir())


def test_a_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(ipc, "BASE_BYTES", 1000)
    with pytest.raises(LapseError, match=f"cannot make a folder for ipc sockets in {tmp_path}/missing: No such file"):
        ipc.Folder()
