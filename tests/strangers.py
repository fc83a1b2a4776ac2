"""Strangers and traitors at a job of real processes.

    python tests/strangers.py --shots 1000000 --mode token --transport tcp      a million handshakes and frames at every socket of a job
    python tests/strangers.py --traitors 200 --mode curve                       so many jobs, in each of which a member sends mutated frames

The strangers are processes of their own, with plain sockets: mutated handshakes of every mechanism with frames behind them, HTTP, TLS, SSH,
a port scanner. What the job computes must be exact. How fast it is, is compared, in turn, with the time that the same strangers spend at
another job that does nothing: they and their victims take the same processor time there, and only what disturbs the job itself is left.
"""
from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import logging
import multiprocessing
import os
import random
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import zmq

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import lapse  # noqa: E402
from lapse import control  # noqa: E402
from lapse._exec import die_with_parent  # noqa: E402
from lapse.errors import NodeFailure, WorkerError  # noqa: E402
from lapse.launch import _Launch  # noqa: E402
from tests.fuzz import _mutator, states  # noqa: E402

NUM_KEYS, LENGTH, NODES = 60, 2, 2
MAGIC = 0x4553504C
PATIENCE = 60.0
OPEN, EARLY = 64, 16            # connections that a stranger keeps, and those of them whose handshake may not have been answered yet
IDLE, JOB, OTHER, STOP = range(4)           # whom the strangers are at
PHASE, SHOTS_JOB, SHOTS_OTHER, FAILED, CONNECTED = range(5)         # places of the board; the last one counts those to the job
PLACES = 16


def board(folder: str | Path) -> np.ndarray:
    """Numbers that all processes see."""
    path = Path(folder) / "board"
    if not path.exists():
        path.write_bytes(bytes(8 * PLACES))
    return np.memmap(path, np.int64, "r+", shape=(PLACES,))


# -- what strangers send

def greeting(mechanism: bytes, draw: random.Random) -> bytes:
    return b"\xff" + bytes(8) + b"\x7f\x03" + bytes([draw.choice([0, 1])]) + mechanism.ljust(20, b"\0") + bytes(32)


def command(name: bytes, body: bytes) -> bytes:
    data = bytes([len(name)]) + name + body
    return (b"\x04" + bytes([len(data)]) if len(data) < 256 else b"\x06" + struct.pack(">Q", len(data))) + data


def message(body: bytes) -> bytes:
    if body == b"huge":
        return b"\x02" + struct.pack(">Q", 1 << 40)         # more than follows, and than is allowed
    return (b"\0" + bytes([len(body)]) if len(body) < 256 else b"\x02" + struct.pack(">Q", len(body))) + body


def metadata(**properties: bytes) -> bytes:
    return b"".join(bytes([len(name)]) + name.encode().replace(b"_", b"-") + struct.pack(">I", len(value)) + value
                    for name, value in properties.items())


def tls_hello() -> bytes:
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(into, out, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


def others() -> list[bytes]:
    """The first words of clients that are at the wrong port."""
    return [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"POST /x HTTP/1.0\r\nContent-Length: 9\r\n\r\n{\"a\": 1}\n", tls_hello(),
            b"SSH-2.0-OpenSSH_9.6\r\n", b"*1\r\n$4\r\nPING\r\n", b"\x01\x00\x06\x00hello", b"", b"\xff" * 64, b"\0",
            b"\xffSMBr\0\0\0\0", b"EHLO scanner\r\n", b"\x16\x03\x01" + bytes(600)]


def split(data: bytes) -> list[bytes]:
    """The frames of an input of the fuzzer."""
    frames, at = [], 1
    while at + 3 <= len(data):
        size = data[at + 1] | data[at + 2] << 8
        frames.append(data[at + 3:at + 3 + size])
        at += 3 + size
    return frames


def mutated_control(draw: random.Random) -> bytes:
    """A message to the scheduler with something wrong in it, or nothing."""
    kind = draw.choice(list(control._SCHEMA))
    odd = [None, True, -1, 2**64, 1e400, "", "x" * 5000, [], {}, [[[]]], {"a": {}}, "0/0", "workers", 0, 1, float("nan")]
    fields = {name: draw.choice(odd) for name in control._SCHEMA[kind]}
    text = bytearray(json.dumps({"type": kind, **fields}).encode())
    if draw.random() < 0.5:
        text[draw.randrange(len(text))] = draw.randrange(256)
    return draw.choice([bytes(text), bytes(text), b"[" * draw.randrange(1, 3000), bytes(text[:draw.randrange(len(text))])])


def make_shots(draw: random.Random, corpus: list[bytes], number: int, most: int) -> list[tuple[bytes, bytes, int]]:
    """(what one connection sends, and what once its handshake may have been answered; how many handshakes and frames that is)"""
    words, shots = others(), []
    for _ in range(number):
        if draw.random() < 0.15:
            shots.append((draw.choice(words), b"", 1))
            continue
        frames = []
        while len(frames) < most:
            frames += split(_mutator.mutate(draw.choice(corpus), draw.getrandbits(64), draw.randint(0, 3)))
        frames = frames[:most]
        if draw.random() < 0.1:
            frames[-1] = b"huge"
        if draw.random() < 0.3:
            frames[:4] = [mutated_control(draw) for _ in range(4)]
        mechanism = draw.choice([b"NULL", b"NULL", b"PLAIN", b"CURVE"])
        kind = draw.choice([b"PUSH", b"DEALER"])
        data = greeting(mechanism, draw)
        if mechanism == b"NULL":
            data += command(b"READY", metadata(Socket_Type=kind, Identity=draw.choice([b"", b"node"])))
        elif mechanism == b"PLAIN":
            user = draw.choice([b"0", b"1", b"node", b"x" * 255])
            data += command(b"HELLO", bytes([len(user)]) + user + b"\x08" + draw.randbytes(8))
            data += command(b"INITIATE", metadata(Socket_Type=kind))
        else:
            data += command(b"HELLO", b"\x01\0" + bytes(72) + draw.randbytes(32) + bytes(8) + draw.randbytes(80))
            data += command(b"INITIATE", draw.randbytes(250))
        later = b"".join(map(message, frames))
        if mechanism != b"NULL" or draw.random() < 0.2:         # they are not answered, or do not care
            data, later = data + later, b""
        if draw.random() < 0.4:
            data, later = flipped(data, draw), flipped(later, draw)
        shots.append((data, later, 1 + len(frames)))
    return shots


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 6) if data else 0):
        changed[draw.choice([draw.randrange(min(len(data), 160)), draw.randrange(len(data))])] = draw.randrange(256)
    return bytes(changed)


def connect(endpoint: str, draw: random.Random) -> socket.socket:
    """A connection; over tcp from an address of the loopback network that was not used just now, or ports would run out."""
    if endpoint.startswith("ipc://"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(1.0)
        sock.connect(endpoint.removeprefix("ipc://"))
        return sock
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    sock = socket.socket()
    sock.settimeout(1.0)
    if sys.platform == "linux":
        sock.bind((f"127.{draw.randrange(1, 255)}.{draw.randrange(256)}.{draw.randrange(1, 255)}", 0))
    sock.connect((host, int(port)))
    return sock


def wrong_port(endpoint: str) -> None:
    """A web browser, a TLS client, an SSH client, a port scanner and others at one port: nobody gets an answer of his kind."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    draw = random.Random(1)
    if endpoint.startswith("tcp://"):
        browser = http.client.HTTPConnection(host, int(port), timeout=0.5)
        try:
            browser.request("GET", "/")
            raise AssertionError(f"{endpoint} answers HTTP: {browser.getresponse().status}")
        except (OSError, http.client.HTTPException):
            browser.close()
        tls = ssl.create_default_context()
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 0.5) as sock, tls.wrap_socket(sock):
            raise AssertionError(f"{endpoint} speaks TLS")
    for word in others():
        for _ in range(3):
            with contextlib.suppress(OSError), connect(endpoint, draw) as sock:
                sock.sendall(word)


def attack(folder: str, number: int, most: int, pace: float) -> None:
    """A stranger: go for whom the board names, until it says to stop. `pace`: connections per second, 0 for as many as there can be."""
    seen = board(folder)
    draw = random.Random(number)
    states.make_places()
    shots = make_shots(draw, states.corpus(1), 2000, most)
    targets = {phase: json.loads((Path(folder) / name).read_text()) for phase, name in ((JOB, "job"), (OTHER, "other"))}
    early: deque[tuple[socket.socket, bytes]] = deque()
    open_: deque[socket.socket] = deque()
    due = 0.0
    for endpoint in targets[JOB]:
        wrong_port(endpoint)
    (Path(folder) / f"stranger-{number}").touch()
    while seen[PHASE] != STOP:
        phase = int(seen[PHASE])
        if phase == IDLE:
            for sock in [*open_, *(sock for sock, _ in early)]:
                sock.close()
            open_.clear()
            early.clear()
            time.sleep(0.005)
            continue
        if pace and (left := due - time.monotonic()) > 0:
            time.sleep(min(left, 0.005))
            continue
        due = max(due, time.monotonic() - 0.1) + 1 / pace if pace else 0.0
        data, later, count = draw.choice(shots)
        try:
            sock = connect(draw.choice(targets[phase]), draw)
        except OSError:             # the queue of connections is full
            continue
        try:
            early.append((sock, later))
            sock.sendall(data)
            if len(early) > EARLY:
                sock, later = early.popleft()
                open_.append(sock)
                sock.sendall(later)
        except OSError:
            seen[FAILED] += phase == JOB       # it was cut off before it had said everything
        seen[SHOTS_JOB if phase == JOB else SHOTS_OTHER] += count
        seen[CONNECTED] += phase == JOB
        if len(open_) > OPEN:
            open_.popleft().close()


# -- the jobs

def endpoints_of(node) -> list[str]:
    """All sockets of a job that somebody could connect to, as node 0 sees them."""
    config = node.cluster.config
    pushes = [push.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode() for push in node.cluster.push[1:]]
    pull = node.cluster._link._ipc or node.cluster.pull.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
    return [f"tcp://127.0.0.1:{config.root_port}", *pushes, *([pull] if not pull.startswith("inproc") else [])]


def tell_endpoints(worker, folder: str, name: str, transport: str) -> None:
    """Every node writes where it listens; node 0 puts it together."""
    node = lapse.node._node
    rank = node.rank
    folder_ = Path(folder)
    if rank < 2:
        seen = [push.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode() for push in node.cluster.push]
        (folder_ / f"{name}-{rank}").write_text(json.dumps([at for at in seen if not at.startswith("inproc")]))
    worker.barrier()
    if rank == 0:
        found = {at for other in (0, 1) for at in json.loads((folder_ / f"{name}-{other}").read_text())}
        assert len(found) == NODES and all(at.startswith(transport) for at in found), found
        half = folder_ / (name + ".half")
        half.write_text(json.dumps(sorted(found | {f"tcp://127.0.0.1:{node.cluster.config.root_port}"})))
        half.rename(folder_ / name)


def do_nothing(worker, folder: str, transport: str) -> None:
    """The job that the strangers are compared at."""
    tell_endpoints(worker, folder, "other", transport)
    seen = board(folder)
    while seen[PHASE] != STOP:
        time.sleep(0.02)


def chunk(worker, draw, pushed: np.ndarray, calls: int) -> None:
    """Some work: it needs the network all the time, and says at once if a value is not possible."""
    got = np.empty((20, LENGTH), np.float32)
    for at in range(calls):
        keys = draw.choice(NUM_KEYS, 20, replace=False)
        worker.push(keys, np.ones((20, LENGTH), np.float32))
        pushed[keys] += 1
        if at % 4 == 0:
            worker.localize(keys[:5].copy())
        worker.pull(keys, got)
        if not (got >= pushed[keys, None]).all():
            raise AssertionError(f"own pushes are missing: {got[:, 0]} and {pushed[keys]}")
    worker.waitall()


def work(worker, folder: str, transport: str, shots: int, rounds: int, calls: int, strangers: int) -> dict:
    """Work in turn with strangers here, at the other job, and nowhere."""
    tell_endpoints(worker, folder, "job", transport)
    node = lapse.node._node
    seen = board(folder)
    end = time.monotonic() + PATIENCE
    while len(list(Path(folder).glob("stranger-*"))) < strangers:
        if time.monotonic() > end:
            raise AssertionError("the strangers do not come")
        time.sleep(0.01)
    draw = np.random.default_rng(node.rank)
    pushed = np.zeros(NUM_KEYS)
    times: dict[int, list[float]] = {IDLE: [], JOB: [], OTHER: []}
    number, counted = 0, -1
    while True:
        if seen[SHOTS_JOB] > counted:
            counted, end = int(seen[SHOTS_JOB]), time.monotonic() + PATIENCE
        elif time.monotonic() > end:
            raise AssertionError(f"the strangers have stopped after {counted} shots")
        for phase in ((IDLE, JOB, OTHER), (OTHER, JOB, IDLE))[number % 2]:
            worker.barrier()
            if node.rank == 0:
                seen[PHASE] = phase
            time.sleep(0.1)
            worker.barrier()
            begin = time.perf_counter()
            chunk(worker, draw, pushed, calls)
            worker.barrier()
            times[phase].append(time.perf_counter() - begin)
        number += 1
        worker.barrier()
        enough = number >= rounds and seen[SHOTS_JOB] >= shots      # (nobody changes it now but the strangers at the other job)
        worker.barrier()
        if enough:
            break
        if node.rank == 0:
            seen[PHASE] = IDLE
        worker.barrier()
    if node.rank == 0:
        seen[PHASE] = STOP
    worker.barrier()
    got = np.zeros((NUM_KEYS, LENGTH), np.float32)
    worker.pull(np.arange(NUM_KEYS), got)
    return {"got": got[:, 0].tolist() if (got[:, 0] == got[:, 1]).all() else None, "pushed": pushed.tolist(), "times": times,
            "dropped": node.van.counters()["dropped"], "refused": node.cluster._link._gate.refused}


class Warnings(logging.Handler):
    """The warnings of this process: the scheduler's, whose thread runs here."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def start_job(fn, args: tuple, security: str, transport: str) -> _Launch:
    task = {"fn": fn, "args": args, "workers": 1, "num_keys": NUM_KEYS, "value_length": LENGTH, "dtype": "float32",
            "setup": {"security": security, "transport": transport}}
    return _Launch(NODES, task, multiprocessing.get_context("fork"))


def visit(security: str, transport: str, shots: int, rounds: int, calls: int, strangers: int = 1, most: int = 8, pace: float = 0) -> dict:
    """A job with strangers: what became of it. AssertionError if its result is wrong."""
    with tempfile.TemporaryDirectory(prefix="lt-") as folder:
        board(folder)
        command_ = [sys.executable, str(ROOT / "tests" / "strangers.py"), "--folder", folder, "--mode", security, "--transport", transport,
                    "--most", str(most), "--pace", str(pace / strangers), "--parent", str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started = [subprocess.Popen([*command_, "--role", "other"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
        warnings = Warnings()
        logging.getLogger("lapse").addHandler(warnings)
        try:
            started += [subprocess.Popen([*command_, "--role", "stranger", "--number", str(number)], env=environment)
                        for number in range(strangers)]
            job = start_job(work, (folder, transport, shots, rounds, calls, strangers), security, transport)
            results = [result for result, in job.run()]
            for process in started:
                process.wait(PATIENCE)
        finally:
            logging.getLogger("lapse").removeHandler(warnings)
            board(folder)[PHASE] = STOP
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        codes = [process.returncode for process in started]
        numbers = board(folder).tolist()
    wanted = np.sum([result["pushed"] for result in results], axis=0)
    assert all(result["got"] == wanted.tolist() for result in results), "the job's result is wrong"
    assert not any(codes), f"exit codes {codes} of the strangers and the other job"
    times = {phase: np.array(results[0]["times"][phase]) for phase in (IDLE, JOB, OTHER)}
    return {"shots": numbers[SHOTS_JOB], "connections": numbers[CONNECTED], "cut off": numbers[FAILED],
            "rounds": len(times[JOB]), "against other": float(np.median(times[JOB] / times[OTHER])),
            "against none": float(np.median(times[JOB] / times[IDLE])), "seconds": float(np.median(times[JOB])),
            "dropped": [result["dropped"] for result in results], "refused": [result["refused"] for result in results],
            "scheduler": job._scheduler.strangers, "scheduler refused": job._scheduler._gate.refused, "warnings": warnings.lines}


# -- a member

CHECKED = np.arange(40, 50)     # no number that is near a power of two: the mutated keys do not reach them


def betray(worker, folder: str, seed: int) -> str:
    """Node 0 sends mutated frames in its own name; node 1 looks at keys that none of them is about until the job fails."""
    node = lapse.node._node
    got, expected = np.empty((len(CHECKED), LENGTH), np.float32), 0
    worker.barrier()
    if node.rank == 1:
        note = Path(folder) / "checked"
        note.write_text("nothing was looked at")
        end, said = time.monotonic() + PATIENCE, ""
        while time.monotonic() < end:
            worker.push(CHECKED, np.ones((len(CHECKED), LENGTH), np.float32))
            expected += 1
            worker.pull(CHECKED, got)
            if not said.startswith("wrong"):        # the first one stays
                said = "exact" if (got == expected).all() else f"wrong: {got.tolist()}, expected {expected}"
                note.write_text(said)
        return "nothing happened"
    draw = random.Random(seed)
    if draw.random() < 0.2:
        fields = json.loads(mutated_text(draw))
        kind = fields.pop("type")
        node.cluster._link.command(("send", kind, fields))
    else:
        send_in_own_name(node, draw)
    end = time.monotonic() + 5.0
    while time.monotonic() < end and node.cluster.failure is None:
        time.sleep(0.01)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:       # whatever was sent, there are now two messages with one number
        worker.push(np.arange(NUM_KEYS // 2, NUM_KEYS // 2 + 8), np.zeros((8, LENGTH), np.float32))
        worker.localize(np.arange(NUM_KEYS // 2, NUM_KEYS // 2 + 8))
    return "nothing happened"


def mutated_text(draw: random.Random) -> bytes:
    """A control message that is none, but that a node's own encoder can say."""
    while True:
        text = mutated_control(draw)
        with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
            said = json.loads(text)
            if isinstance(said.get("type"), str):
                try:
                    control.decode([control.encode(said.pop("type"), **said)])
                except control.Malformed:
                    return text


def send_in_own_name(node, draw: random.Random) -> None:
    config, link = node.cluster.config, node.cluster._link
    seq = node.van.last_number(1)
    corpus, sent = states.corpus(1), 0
    with zmq.Context() as context, context.socket(zmq.PUSH) as sock:
        if config.mode == "curve":
            sock.curve_publickey, sock.curve_secretkey = config.keys.public.encode(), config.keys.secret.encode()
            sock.curve_serverkey = link._keys[1].encode()
        elif config.mode == "token":
            sock.plain_username, sock.plain_password = b"0", config.token.encode()
        sock.connect(node.cluster.push[1].getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode())
        wanted = draw.randint(1, 20)
        while sent < wanted:
            for frame in split(_mutator.mutate(draw.choice(corpus), draw.getrandbits(64), draw.randint(1, 3))):
                seq += 1
                if len(frame) >= 64 and draw.random() < 0.95:
                    head = struct.pack("<IHBBQQI", MAGIC, 1, frame[6], frame[7], node.cluster.job_id, seq, 0)
                    frame = head + frame[len(head):]
                sock.send(frame)
                sent += 1
        sock.close(2000)


def traitor(security: str, transport: str, seed: int) -> str:
    """One job with a traitor: how it was reported. AssertionError if it ended in any other way than by naming both nodes."""
    with tempfile.TemporaryDirectory(prefix="lt-") as folder:
        try:
            start_job(betray, (folder, seed), security, transport).run()
        except (NodeFailure, WorkerError) as error:
            text = str(error)
        else:
            raise AssertionError(f"seed {seed}: a mutated frame had no consequence")
        checked = (Path(folder) / "checked").read_text()
    assert checked == "exact", f"seed {seed}: {checked}"
    assert "node 0" in text and ("node 1" in text or "scheduler" in text) and "signal" not in text, f"seed {seed}: {text}"
    return text


# -- the program

def show(security: str, transport: str, found: dict) -> None:
    frames = found["shots"] - found["connections"]
    print(f"{security}, {transport}: result exact; {found['connections']:,} handshakes and {frames:,} frames behind them, "
          f"{found['cut off']:,} were cut off while they spoke; {found['rounds']} rounds; "
          f"time {found['against other']:.3f} of that with the strangers at another job, {found['against none']:.3f} of that without any; "
          f"dropped {found['dropped']} frames, and the scheduler {found['scheduler']}; refused {found['refused']} connections, and the "
          f"scheduler {found['scheduler refused']}; {len(found['warnings'])} warnings", flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("none", "token", "curve"), action="append")
    parser.add_argument("--transport", choices=("tcp", "ipc"), action="append")
    parser.add_argument("--shots", type=int, default=0, help="handshakes and frames of strangers, per mode and transport")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--calls", type=int, default=60, help="of a round's work")
    parser.add_argument("--strangers", type=int, default=1, help="processes")
    parser.add_argument("--most", type=int, default=8, help="frames of a connection")
    parser.add_argument("--pace", type=float, default=0, help="connections of strangers per second (default: all that one processor can)")
    parser.add_argument("--traitors", type=int, default=0, help="jobs with a traitor, per mode and transport")
    parser.add_argument("--seed", type=int, default=1)
    for name in ("--role", "--folder", "--number", "--parent"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    modes, transports = arguments.mode or ["token", "curve", "none"], arguments.transport or ["tcp", "ipc"]
    if arguments.role:
        die_with_parent(int(arguments.parent))
    if arguments.role == "stranger":
        while not all((Path(arguments.folder) / name).exists() for name in ("job", "other")):
            time.sleep(0.01)
        attack(arguments.folder, int(arguments.number), arguments.most, arguments.pace)
        return 0
    if arguments.role == "other":
        start_job(do_nothing, (arguments.folder, transports[0]), modes[0], transports[0]).run()
        return 0
    logging.getLogger("lapse").addHandler(logging.NullHandler())
    for mode in modes:
        for transport in transports:
            if arguments.shots:
                show(mode, transport, visit(mode, transport, arguments.shots, arguments.rounds, arguments.calls, arguments.strangers,
                                            arguments.most, arguments.pace))
            words: dict[str, int] = {}
            for seed in range(arguments.seed, arguments.seed + arguments.traitors):
                text = traitor(mode, transport, seed)
                what = text.partition(": ")[2].partition("; noticed")[0] or text
                words[what] = words.get(what, 0) + 1
            if words:
                print(f"{mode}, {transport}: {arguments.traitors} traitors, all found out", flush=True)
                for what, times in sorted(words.items(), key=lambda pair: -pair[1]):
                    print(f"  {times:5} {what}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        if "--role" not in sys.argv:        # one word is enough
            print("strangers: interrupted", file=sys.stderr)
        sys.exit(130)
