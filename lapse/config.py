"""The settings of one node. This module is the only reader of os.environ.

Settings come from the caller of `lapse.setup`, then from the environment (docs/env.md), then from the defaults below.
"""
from __future__ import annotations

import operator
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, fields

from lapse import hosts
from lapse.control import MAX_THREADS
from lapse.keys import Keys, read_file

CLUSTER_VARIABLES = ("DMLC_ROLE", "DMLC_NUM_SERVER", "DMLC_PS_ROOT_URI", "DMLC_PS_ROOT_PORT")
MAX_NODES = 65534
MIB = 1 << 20

SECRETS = ("LAPSE_TOKEN", "LAPSE_SECRET_KEYS")

_taken: dict[tuple, dict[str, str]] = {}  # (root host, root port) -> the secrets that were taken out of os.environ


@dataclass(frozen=True)
class Config:
    """One frozen record, made once, handed to everything that needs a setting."""

    num_keys: int
    num_threads: int                        # worker slots of this node
    role: str = "local"                     # local: one node, no scheduler; server: a node of a cluster; scheduler
    num_nodes: int = 1
    root_host: str = "127.0.0.1"            # where the scheduler listens
    root_port: int = 0
    node_host: str | None = None            # own address; None: the one that reaches the scheduler
    transport: str = "auto"                 # auto, ipc, tcp
    zmq_threads: int = 1
    location_caches: bool = False
    shared_memory: bool = True
    heartbeat_interval: float = 1.0         # seconds; 0: no heartbeats
    heartbeat_timeout: float = 3.0
    op_timeout: float | None = 600.0        # None: never
    join_timeout: float = 60.0
    barrier_warning: float = 30.0
    credit_ops: int = 1024                  # per worker
    credit_bytes: int = 64 * MIB
    port_range: tuple[int, int] | None = None
    security: str | None = None             # curve, token, none; None: curve where there are keys, token where there is one
    token: str | None = field(default=None, repr=False)
    keys: Keys | None = field(default=None, repr=False)
    stats_out: str = ""
    trace_keys: str = ""
    verbose: int = 0
    attempt: int = 0                        # which restart of the job this is
    rank_hint: int | None = None            # the rank that the launcher's output prefix shows
    ipc_dir: str | None = None              # an existing 0700 folder; None: make one

    def __post_init__(self):
        _check_whole("num_keys", self.num_keys, 1, 2**63 - 1)
        _check_whole("num_threads", self.num_threads, 1, MAX_THREADS)
        _check_whole("num_nodes", self.num_nodes, 1, MAX_NODES)
        _check_whole("root_port", self.root_port, 0, 65535)
        _check_whole("zmq_threads", self.zmq_threads, 1, 1024)
        _check_whole("credit_ops", self.credit_ops, 1, 2**31 - 1)
        _check_whole("credit_bytes", self.credit_bytes, 1, 2**63 - 1)
        _check_choice("role", self.role, ("local", "server", "scheduler"))
        _check_choice("transport", self.transport, ("auto", "ipc", "tcp"))
        _check_choice("security", self.security, (None, "curve", "token", "none"))
        for name in ("heartbeat_interval", "heartbeat_timeout", "op_timeout", "join_timeout", "barrier_warning"):
            value = getattr(self, name)
            if name == "op_timeout" and value is None:
                continue
            least = "at least 0" if name == "heartbeat_interval" else "above 0"
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6 or (
                    value == 0 and name != "heartbeat_interval"):
                raise ValueError(f"{name} is a number of seconds {least}, not {value!r}")
        if self.role == "local" and self.num_nodes != 1:
            raise ValueError(f"num_nodes is {self.num_nodes} without a cluster (DMLC_ROLE is not set)")
        if self.rank_hint is not None:
            _check_whole("rank_hint", self.rank_hint, 0, self.num_nodes - 1)
        if self.token is not None and not 8 <= len(self.token.encode()) <= 255:
            raise ValueError("the token must have 8 to 255 bytes")
        if self.security == "token" and self.role != "local" and self.token is None:
            raise ValueError("security 'token' needs the job's token in LAPSE_TOKEN")
        if self.role != "local" and self.mode == "curve":
            self._check_keys()
        if self.port_range is not None:
            low, high = self.port_range
            if not 1 <= low <= high <= 65535:
                raise ValueError(f"port_range {low}-{high} is not a range of ports")

    def _check_keys(self) -> None:
        keys = self.keys
        if keys is None:
            raise ValueError("security 'curve' needs keys: LAPSE_KEYS names the file of this member (python -m lapse keys makes them)")
        if (keys.rank is None) != (self.role == "scheduler"):
            raise ValueError(f"the keys are those of {'the scheduler' if keys.rank is None else f'node {keys.rank}'}, "
                             f"this is a {self.role} (DMLC_ROLE)")
        if keys.rank is None and len(keys.nodes) != self.num_nodes:
            raise ValueError(f"the keys are for a job of {len(keys.nodes)} nodes, not of {self.num_nodes}")
        if keys.rank is not None and self.rank_hint != keys.rank:
            raise ValueError(f"the keys are those of node {keys.rank}, this is to be node {self.rank_hint} (LAPSE_RANK)")

    @property
    def mode(self) -> str:
        """How members prove that they belong to the job: curve (and everything is encrypted), token, or none."""
        return self.security or ("curve" if self.keys else "token" if self.token else "none")

    @property
    def authenticated(self) -> bool:
        """Whether members prove that they belong to the job."""
        return self.mode != "none"

    @classmethod
    def make(cls, num_keys: int, num_threads: int, *, environ: Mapping[str, str] | None = None, **overrides) -> Config:
        """Read the environment once and put the caller's settings over it; a setting that is None counts as not given.

        `heartbeat` is short for both heartbeat settings: an interval (the timeout is three of them), or a pair.
        """
        known = {f.name for f in fields(cls)} | {"heartbeat"}
        for name in overrides:
            if name not in known:
                raise TypeError(f"unknown setting {name!r}")
        settings = _from_environment(os.environ if environ is None else environ)
        op_timeout = {"op_timeout": None} if "op_timeout" in overrides else {}  # None is a value there
        overrides = {name: value for name, value in overrides.items() if value is not None}
        heartbeat = overrides.pop("heartbeat", None)
        if heartbeat is not None:
            interval, timeout = heartbeat if isinstance(heartbeat, (tuple, list)) else (heartbeat, 3 * heartbeat or 3.0)
            settings.update(heartbeat_interval=interval, heartbeat_timeout=timeout)
        numbers = {"num_keys": num_keys, "num_threads": num_threads}
        for name, value in numbers.items():
            if hasattr(value, "__index__") and not isinstance(value, bool):  # NumPy's integers too
                numbers[name] = operator.index(value)
        return cls(**numbers, **{**settings, **op_timeout, **overrides})


def _from_environment(environ: Mapping[str, str]) -> dict:
    settings: dict = {}
    given = {name: environ.get(name, "").strip() for name in CLUSTER_VARIABLES}
    missing = [name for name in CLUSTER_VARIABLES if not given[name]]
    if missing and len(missing) < len(CLUSTER_VARIABLES):
        here = [name for name in CLUSTER_VARIABLES if given[name]]
        raise ValueError(f"the environment describes a cluster in part: {', '.join(here)} set, {', '.join(missing)} missing")
    if not missing:
        role = given["DMLC_ROLE"]
        if role == "worker":
            raise ValueError("DMLC_ROLE worker: Lapse's workers are threads of the servers; start servers only (-n 0)")
        if role not in ("server", "scheduler"):
            raise ValueError(f"DMLC_ROLE is server or scheduler, not {role!r}")
        settings.update(role=role, num_nodes=_whole(given, "DMLC_NUM_SERVER"), root_host=given["DMLC_PS_ROOT_URI"],
                        root_port=_whole(given, "DMLC_PS_ROOT_PORT"))
        if settings["root_port"] == 0:
            raise ValueError("DMLC_PS_ROOT_PORT is 0")
        if environ.get("LAPSE_RANK"):
            settings["rank_hint"] = _whole(environ, "LAPSE_RANK")
    if environ.get("DMLC_NODE_HOST"):
        settings["node_host"] = environ["DMLC_NODE_HOST"]
    elif environ.get("DMLC_INTERFACE"):
        settings["node_host"] = hosts.interface_address(environ["DMLC_INTERFACE"])
    if environ.get("DMLC_LOCAL", "0") not in ("", "0"):
        settings["transport"] = "ipc"
    if environ.get("PS_VERBOSE"):
        settings["verbose"] = _whole(environ, "PS_VERBOSE")
    if environ.get("DMLC_NUM_ATTEMPT"):
        settings["attempt"] = _whole(environ, "DMLC_NUM_ATTEMPT")
    if environ.get("PS_HEARTBEAT_INTERVAL"):
        interval = settings["heartbeat_interval"] = _seconds(environ, "PS_HEARTBEAT_INTERVAL")
        settings["heartbeat_timeout"] = 3 * interval or 3.0
    if environ.get("PS_HEARTBEAT_TIMEOUT"):
        settings["heartbeat_timeout"] = _seconds(environ, "PS_HEARTBEAT_TIMEOUT")
    if environ.get("LAPSE_PORT_RANGE"):
        low, dash, high = environ["LAPSE_PORT_RANGE"].partition("-")
        if not (dash and low.strip().isdecimal() and high.strip().isdecimal()):
            raise ValueError(f"LAPSE_PORT_RANGE is lo-hi, not {environ['LAPSE_PORT_RANGE']!r}")
        settings["port_range"] = int(low), int(high)
    if environ.get("LAPSE_SECURITY"):
        settings["security"] = environ["LAPSE_SECURITY"]
    if environ.get("LAPSE_IPC_DIR"):
        settings["ipc_dir"] = environ["LAPSE_IPC_DIR"]
    secrets = _take_secrets(environ, (given["DMLC_PS_ROOT_URI"], given["DMLC_PS_ROOT_PORT"]))
    if "LAPSE_TOKEN" in secrets:
        settings["token"] = secrets["LAPSE_TOKEN"]
    if not missing and ("LAPSE_SECRET_KEYS" in secrets or environ.get("LAPSE_KEYS")):
        text = secrets.get("LAPSE_SECRET_KEYS")
        keys = settings["keys"] = Keys.parse(text, "LAPSE_SECRET_KEYS") if text else read_file(environ["LAPSE_KEYS"])
        if keys.rank is not None:
            settings.setdefault("rank_hint", keys.rank)
    return settings


def _take_secrets(environ: Mapping[str, str], root: tuple) -> dict[str, str]:
    """The job's secrets; they leave os.environ, so that processes which this one starts do not inherit them."""
    found = {name: environ[name] for name in SECRETS if environ.get(name)}
    if environ is not os.environ:
        return found
    if found and isinstance(environ, MutableMapping):
        for name in found:
            del environ[name]
        _taken.clear()
        _taken[root] = found
    return _taken.get(root, {})


def _whole(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name} is a whole number, not {environ[name]!r}") from None


def _seconds(environ: Mapping[str, str], name: str) -> float:
    try:
        return float(environ[name])
    except ValueError:
        raise ValueError(f"{name} is a number of seconds, not {environ[name]!r}") from None


def _check_whole(name: str, value, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, must be in [{low}, {high}]")


def _check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(str(c) for c in choices if c)}, not {value!r}")
