"""Creating and configuring ZeroMQ sockets: limits, heartbeats, endpoints, who may connect, and what the monitors tell."""
from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

import zmq

from lapse import hosts, keys
from lapse.config import Config
from lapse.errors import LapseError

log = logging.getLogger("lapse.cluster")

HANDSHAKE_MS = 5000
IPC_PATH_BYTES = 100     # sockaddr_un has 108 with the NUL, 104 on some systems
CONTROL_USER = b"node"
DATA_DOMAIN = b"lapse-data"
CONTROL_DOMAIN = b"lapse-control"

# A handshake that ended before the Gate was asked: a scanner, a browser, a peer that left
UNFINISHED = (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
_HANDSHAKE_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
EVENTS = (zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED
          | zmq.EVENT_HANDSHAKE_SUCCEEDED | _HANDSHAKE_FAILED)


def make(context: zmq.Context, kind: int, config: Config, *, max_bytes: int) -> zmq.Socket:
    """A socket with this library's limits; no security yet, bound and connected nowhere."""
    sock = context.socket(kind)
    sock.setsockopt(zmq.SNDHWM, 0)     # a send never blocks; what bounds memory are the workers' credits
    sock.setsockopt(zmq.RCVHWM, 0)
    sock.setsockopt(zmq.LINGER, 1000)
    sock.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    if config.heartbeat_interval > 0:
        timeout = max(1, round(config.heartbeat_timeout * 1000))
        sock.setsockopt(zmq.HEARTBEAT_IVL, max(1, round(config.heartbeat_interval * 1000)))
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, timeout)
        sock.setsockopt(zmq.HEARTBEAT_TTL, min(timeout, 6_553_500))
    return sock


def serve(sock: zmq.Socket, config: Config, domain: bytes) -> None:
    """Ask the context's Gate about whoever connects (also without a token: libzmq then refuses peers older than ZMTP 3)."""
    sock.setsockopt(zmq.ZAP_DOMAIN, domain)
    if config.mode == "curve":
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, config.keys.secret.encode())
    elif config.mode == "token":
        sock.setsockopt(zmq.PLAIN_SERVER, 1)


def identify(sock: zmq.Socket, config: Config, user: bytes, server_key: str) -> None:
    """Say who this is to the peer that it will connect to: `user` and the token, or the key. The peer has the public key `server_key`."""
    if config.mode == "curve":
        sock.setsockopt(zmq.CURVE_PUBLICKEY, config.keys.public.encode())
        sock.setsockopt(zmq.CURVE_SECRETKEY, config.keys.secret.encode())
        sock.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode())
    elif config.mode == "token":
        sock.setsockopt(zmq.PLAIN_USERNAME, user)
        sock.setsockopt(zmq.PLAIN_PASSWORD, config.token.encode())


def no_reconnect(sock: zmq.Socket) -> None:
    """A lost connection stays lost: libzmq drops messages silently when it reconnects."""
    sock.setsockopt(zmq.RECONNECT_IVL, -1)


def endpoint(address: str, port: int | str) -> str:
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _bound_socket(address: str) -> socket.socket:
    """A socket at a port that the system chooses; libzmq's may be bound there, too."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, 0))
    except OSError:
        sock.close()
        raise
    return sock


def reserve_source(address: str, port: int) -> socket.socket | None:
    """Where `address` is this host's: a bound socket, from whose port connections to `port` are to come. None elsewhere, or without one.

    As long as nobody listens on a port of the system's ephemeral range, each attempt to connect to it may be given that very port as its
    own end, and then reaches itself (TCP's simultaneous open): the handshake fails for good, and nobody can listen there any more.
    """
    try:
        own = hosts.address_towards(address)
        if own != address and not hosts.is_loopback(own):
            return None
        source = _bound_socket(own)
        if source.getsockname()[1] != port:
            return source
        with source:            # as long as it is there, the next one gets another port
            return _bound_socket(own)
    except (LapseError, OSError) as error:
        log.debug("no port of its own to connect to %s from: %s", address, error)
        return None


def endpoint_from(source: socket.socket | None, to: str) -> str:
    """The endpoint for a connection to `to` that comes from the port that `source` holds."""
    return to if source is None else f"{endpoint(*source.getsockname()[:2])};{to.removeprefix('tcp://')}"


def check_beyond_loopback(what: str, address: str, config: Config) -> None:
    """Raise LapseError where connections would leave this machine without encryption, unless that was asked for."""
    if hosts.is_loopback(address) or config.mode == "curve" or config.security == "none":
        return
    raise LapseError(
        f"{what}: beyond loopback the connections would not be encrypted; launch the job with LAPSE_SECURITY=curve, or give each process "
        "its keys in LAPSE_KEYS (python -m lapse keys makes them; docs/deployment.md); LAPSE_SECURITY=none allows it in a network "
        "that you trust")


def bind_tcp(sock: zmq.Socket, address: str, config: Config, port: int = 0) -> str:
    """Bind to one address, at `port`, or out of the port range, or where the system likes; the endpoint with its port."""
    check_beyond_loopback(f"refusing to listen on {address}", address, config)
    sock.setsockopt(zmq.IPV6, ":" in address)
    if port:
        ports: tuple | range = (port,)
    elif config.port_range:
        ports = range(config.port_range[0], config.port_range[1] + 1)
    else:
        ports = ("*",)
    for candidate in ports:
        try:
            sock.bind(endpoint(address, candidate))
            break
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise LapseError(f"cannot listen on {address}, port {candidate}: {error.strerror}") from None
    else:
        where = f"port {port} of" if port else f"any port of {config.port_range[0]}-{config.port_range[1]} on"
        raise LapseError(f"cannot listen on {where} {address}: in use")
    return sock.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()


def bind_ipc(sock: zmq.Socket, folder: str, name: str) -> str:
    path = str(Path(folder).absolute() / name)
    if len(path.encode()) > IPC_PATH_BYTES:
        raise LapseError(f"the path of the socket {path} is longer than {IPC_PATH_BYTES} bytes; set LAPSE_IPC_DIR to a shorter folder")
    try:
        sock.bind("ipc://" + path)
    except zmq.ZMQError as error:
        raise LapseError(f"cannot listen on {path}: {error.strerror}") from None
    return "ipc://" + path


class Monitor:
    """The events of one socket. Its queue has no limit: libzmq's I/O thread would block on a full one."""

    def __init__(self, sock: zmq.Socket):
        name = f"inproc://monitor-{id(sock):x}"
        sock.monitor(name, EVENTS)
        self.pair = sock.context.socket(zmq.PAIR)
        self.pair.setsockopt(zmq.RCVHWM, 0)
        self.pair.setsockopt(zmq.LINGER, 0)
        self.pair.connect(name)

    def events(self):
        """All (event, value) that are there; the value is the connection's descriptor, or what was wrong."""
        while True:
            try:
                head, _ = self.pair.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            yield struct.unpack("=HI", head)

    def close(self) -> None:
        self.pair.close(0)


class Gate:
    """The door-keeper of one context (ZAP, RFC 27): members have the token, or one of the job's keys; a data connection's user is its rank.

    With keys, the rank is the key's, on the control connection too, and what the peer says of itself does not count.

    One Gate per context, created before any server socket listens; `serve` is called by the thread that polls `sock`.
    """

    def __init__(self, context: zmq.Context, config: Config):
        self.refused = 0
        self._mode = config.mode
        self._token = config.token.encode() if self._mode == "token" else b""
        self._users: dict[bytes, bytes] = {}    # with keys: the public key of a member -> its rank
        self._own_rank: int | None = None
        self._num_nodes = config.num_nodes
        self.sock = context.socket(zmq.REP)
        self.sock.setsockopt(zmq.LINGER, 0)
        self.sock.bind("inproc://zeromq.zap.01")
        if self._mode == "curve":
            self._admit_keys(config.keys.nodes)     # the scheduler's

    def admit_ranks(self, own_rank: int, num_nodes: int, public: list[str]) -> None:
        """Admit the other nodes of the job, whose public keys, by rank, these are. Without security by keys they do not matter."""
        self._own_rank, self._num_nodes = own_rank, num_nodes
        if self._mode == "curve":
            self._admit_keys(public)

    def _admit_keys(self, public: Sequence[str]) -> None:
        self._users = {keys.decode(key): b"%d" % rank for rank, key in enumerate(public) if rank != self._own_rank}

    def serve(self) -> None:
        """Answer all requests that wait."""
        while True:
            try:
                request = self.sock.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            user = self._user(request)
            if user is None:
                address = request[3].decode(errors="replace") if len(request) > 3 else "?"
                self.refuse(f" from {address or 'a local process'}", "it does not belong to this job")
            status = (b"400", b"refused", b"") if user is None else (b"200", b"", user)
            self.sock.send_multipart([b"1.0", request[1] if len(request) > 1 else b"", *status, b""])

    def refuse(self, whence: str = "", why: str = "it does not speak as this job's do") -> None:
        """Count a connection that is none of this job's, and log the 1st, 2nd, 4th, 8th, ... of them."""
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:
            log.warning("refused a connection%s: %s (%d so far)", whence, why, self.refused)

    def _user(self, request: list[bytes]) -> bytes | None:
        if len(request) < 6 or request[0] != b"1.0":
            return None
        domain, mechanism, credentials = request[2], request[5], request[6:]
        if self._mode == "none":
            return b"" if mechanism == b"NULL" else None
        if self._mode == "curve":
            return self._users.get(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else None
        if mechanism != b"PLAIN" or len(credentials) != 2 or not hmac.compare_digest(credentials[1], self._token):
            return None
        user = credentials[0]
        if domain == CONTROL_DOMAIN:
            return user if user == CONTROL_USER else None
        if domain != DATA_DOMAIN or not user.isdigit() or len(user) > 5:
            return None
        rank = int(user)
        return user if rank < self._num_nodes and rank != self._own_rank and str(rank).encode() == user else None


def refused_by(event: int, mode: str) -> str | None:
    """Why a handshake failed, as far as the monitor's event tells."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return f"it refused this node's {'key (LAPSE_KEYS)' if mode == 'curve' else 'token (LAPSE_TOKEN)'}"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        return "what listens there speaks another protocol or another security mode"
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        return "the handshake failed" + ("; are the keys those of this job?" if mode == "curve" else "")
    return None


class Waker:
    """Wakes a thread that polls `fd`. `wake` may be called from any thread at any time, and never blocks."""

    def __init__(self):
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)
        # Against writing to a descriptor that has been closed and given to another file. Signal handlers wake, too: reentrant.
        self._lock = threading.RLock()
        self._closed = False

    def wake(self) -> None:
        with self._lock:
            if not self._closed:
                with contextlib.suppress(BlockingIOError):  # full: it wakes already
                    os.write(self._write, b"x")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self.fd, 4096)) == 4096:
                pass

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.fd)
                os.close(self._write)
