"""A node (or scheduler) that does what its standard input says: one JSON command a line; answers and events as JSON lines.

The argument is a JSON object: `settings` (of Config.make), `description`, `place` (pretend to run on another host), `scheduler`.
Driven by tests/unit/test_cluster.py; it joins with lapse.cluster alone, without the core.
"""
import ctypes
import json
import logging
import os
import sys
import threading

import zmq

from lapse import hosts
from lapse.cluster import Cluster, Scheduler
from lapse.config import Config

_out = threading.Lock()


def say(event: str, **fields) -> None:
    with _out:
        print(json.dumps({"event": event, **fields}), flush=True)


class Log(logging.Handler):
    def emit(self, record):
        say("log", text=record.getMessage(), level=record.levelname)


class Node:
    def __init__(self, options: dict):
        say("joining")
        config = Config.make(100, options.get("threads", 1), **options.get("settings", {}))
        self.descriptors: dict[int, int] = {}       # rank -> of the connection on which it was heard
        self.cluster = Cluster(config, options.get("description", {}), lambda failure: say("failure", **failure._asdict()))

    def describe(self) -> dict:
        c = self.cluster
        return {"rank": c.rank, "num_nodes": c.num_nodes, "job_id": c.job_id, "pid": os.getpid(), "members": c.members,
                "push": [p.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode() for p in c.push],
                "pull": c.pull.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode(), "token": os.environ.get("LAPSE_TOKEN")}

    def do(self, command: dict) -> None:
        """One command; what it does and how it ended is said, whenever that is."""
        name = command.pop("do")
        try:
            result = getattr(self, "do_" + name)(**command)
        except Exception as error:
            say("done", what=name, error=type(error).__name__, text=str(error), **command)
        else:
            say("done", what=name, error=None, result=result, **command)

    def do_ready(self):
        self.cluster.ready()

    def do_barrier(self, group, member, timeout=None):
        self.cluster.barrier(group, member, timeout)

    def do_retire(self, member):
        self.cluster.retire(member)

    def do_enlist(self, member):
        self.cluster.enlist(member)

    def do_compare(self, name, data):
        return self.cluster.compare(name, data)

    def do_fail(self, cause, rank=None):
        self.cluster.fail(cause, rank)

    def do_exchange(self, size, hear=True):
        """Send to every node and receive from every node: who said it was, by text and by User-Id. Without `hear`, do_hear comes later."""
        for push in self.cluster.push:
            push.send(b"%d" % self.cluster.rank + b" " * size)
        heard = {}
        for _ in range(self.cluster.num_nodes):
            if not self.cluster.pull.poll(20_000):
                return heard
            frame = self.cluster.pull.recv(copy=False)
            rank = int(bytes(frame))
            try:
                heard[rank] = frame.get("User-Id")
            except zmq.ZMQError:
                heard[rank] = None
            if rank != self.cluster.rank:
                self.descriptors[rank] = frame.get(zmq.SRCFD)
        if hear:
            self.do_hear()
        return heard

    def do_hear(self):
        for rank, descriptor in self.descriptors.items():
            self.cluster.heard(rank, descriptor)

    def do_flood(self, rank, megabytes):
        for _ in range(megabytes):
            self.cluster.push[rank].send(bytes(1 << 20))

    def do_cut(self, end):
        """Close one end of a data connection with node 0, as a cut between the two would."""
        (self.cluster.pull if end == "pull" else self.cluster.push[0]).close(0)

    def do_hold_gil(self, seconds):
        ctypes.PyDLL(None).sleep(seconds)

    def do_fork(self):
        """In a child: use and close everything; say what was raised."""
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self.cluster.barrier("nodes", str(self.cluster.rank))
                os.write(write, b"nothing")
            except RuntimeError as error:
                os.write(write, str(error).encode())
            self.cluster.fail("from the child")
            self.cluster.close()
            os._exit(0)
        os.close(write)
        os.waitpid(pid, 0)
        text = os.read(read, 1000).decode()
        os.close(read)
        return text

    def do_leave(self):
        self.cluster.expect_goodbyes()
        self.cluster.leave()

    def do_close(self):
        self.cluster.close()


def main() -> None:
    options = json.loads(sys.argv[1])
    logger = logging.getLogger("lapse")
    logger.addHandler(Log())
    logger.setLevel(logging.INFO)
    if "place" in options:
        hosts.place = lambda: options["place"]
    try:
        if options.get("scheduler"):
            scheduler = Scheduler(Config.make(100, 1, **options.get("settings", {})))
            say("listening", port=scheduler.port, pid=os.getpid())
            failure = scheduler.run()
            say("end", failure=failure and failure._asdict())
            return
        node = Node(options)
    except Exception as error:
        say("refused", error=type(error).__name__, text=str(error))
        return
    say("up", **node.describe())
    for line in sys.stdin:
        threading.Thread(target=node.do, args=(json.loads(line),), daemon=True).start()


main()
