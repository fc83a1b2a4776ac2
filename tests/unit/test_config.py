"""lapse.config, lapse.errors, lapse.hosts: settings and where they come from, exceptions and their texts."""
from __future__ import annotations

import copy
import os
import pickle

import numpy as np
import pytest

from lapse import config as config_module
from lapse import errors, hosts
from lapse.config import Config

CLUSTER = {"DMLC_ROLE": "server", "DMLC_NUM_SERVER": "3", "DMLC_PS_ROOT_URI": "127.0.0.1", "DMLC_PS_ROOT_PORT": "4000"}


def make(environ=None, **overrides) -> Config:
    return Config.make(10, 2, environ=environ or {}, **overrides)


def test_defaults_describe_one_node_in_this_process():
    c = make()
    assert (c.role, c.num_nodes, c.num_keys, c.num_threads, c.transport) == ("local", 1, 10, 2, "auto")
    assert (c.heartbeat_interval, c.heartbeat_timeout, c.op_timeout, c.join_timeout) == (1.0, 3.0, 600.0, 60.0)
    assert (c.credit_ops, c.credit_bytes, c.shared_memory, c.location_caches) == (1024, 64 << 20, True, False)


def test_the_environment():
    c = make({**CLUSTER, "DMLC_NODE_HOST": "10.1.2.3", "DMLC_LOCAL": "1", "PS_VERBOSE": "2", "PS_HEARTBEAT_INTERVAL": "0.5",
              "DMLC_NUM_ATTEMPT": "1", "LAPSE_PORT_RANGE": "5000-5010", "LAPSE_TOKEN": "0123456789", "LAPSE_RANK": "2",
              "LAPSE_IPC_DIR": "/x", "LAPSE_SECURITY": "token"})
    assert (c.role, c.num_nodes, c.root_host, c.root_port, c.node_host) == ("server", 3, "127.0.0.1", 4000, "10.1.2.3")
    assert (c.transport, c.verbose, c.heartbeat_interval, c.heartbeat_timeout, c.attempt) == ("ipc", 2, 0.5, 1.5, 1)
    assert (c.port_range, c.token, c.rank_hint, c.ipc_dir, c.security) == ((5000, 5010), "0123456789", 2, "/x", "token")
    assert c.authenticated


def test_the_callers_settings_win_and_none_is_not_given():
    c = make({**CLUSTER, "DMLC_LOCAL": "1", "PS_HEARTBEAT_TIMEOUT": "9"}, transport="tcp", zmq_threads=None, heartbeat=0.2)
    assert (c.transport, c.zmq_threads, c.heartbeat_interval) == ("tcp", 1, 0.2)
    assert c.heartbeat_timeout == pytest.approx(0.6)
    assert make(heartbeat=(0.2, 5)).heartbeat_timeout == 5
    assert make(heartbeat=0).heartbeat_interval == 0
    assert make(op_timeout=None).op_timeout is None
    assert make(op_timeout=5).op_timeout == 5


@pytest.mark.parametrize("missing", sorted(CLUSTER))
@pytest.mark.parametrize("empty", [True, False])
def test_a_cluster_described_in_part_is_an_error_that_names_what_is_missing(missing, empty):
    environ = {**CLUSTER, missing: ""} if empty else {k: v for k, v in CLUSTER.items() if k != missing}
    with pytest.raises(ValueError, match=f"{missing} missing"):
        make(environ)


@pytest.mark.parametrize(("changes", "text"), [
    ({"DMLC_ROLE": "worker"}, "workers are threads"), ({"DMLC_ROLE": "boss"}, "not 'boss'"),
    ({"DMLC_NUM_SERVER": "many"}, "DMLC_NUM_SERVER"), ({"DMLC_NUM_SERVER": "0"}, "num_nodes"), ({"DMLC_NUM_SERVER": "65535"}, "num_nodes"),
    ({"DMLC_PS_ROOT_PORT": "x"}, "DMLC_PS_ROOT_PORT"), ({"DMLC_PS_ROOT_PORT": "0"}, "is 0"), ({"DMLC_PS_ROOT_PORT": "70000"}, "root_port"),
    ({"LAPSE_RANK": "3"}, "rank_hint"), ({"LAPSE_TOKEN": "short"}, "8 to 255"), ({"LAPSE_SECURITY": "strong"}, "security"),
    ({"LAPSE_SECURITY": "token"}, "LAPSE_TOKEN"), ({"LAPSE_PORT_RANGE": "5000"}, "lo-hi"), ({"LAPSE_PORT_RANGE": "9-8"}, "range of ports"),
    ({"PS_HEARTBEAT_INTERVAL": "soon"}, "number of seconds"), ({"PS_HEARTBEAT_TIMEOUT": "0"}, "heartbeat_timeout"),
    ({"DMLC_INTERFACE": "no-such-interface"}, "no-such-interface"),
])
def test_wrong_environments_are_named(changes, text):
    with pytest.raises(ValueError, match=text):
        make({**CLUSTER, **changes})


@pytest.mark.parametrize(("settings", "error"), [
    ({"num_keys": 0}, ValueError), ({"num_keys": -1}, ValueError), ({"num_keys": 1.0}, TypeError), ({"num_keys": True}, TypeError),
    ({"num_keys": "10"}, TypeError), ({"num_threads": 0}, ValueError), ({"num_keys": 2**63}, ValueError),
])
def test_wrong_numbers(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        Config.make(**{"num_keys": 10, "num_threads": 2, "environ": {}, **settings})


@pytest.mark.parametrize("settings", [
    {"transport": "udp"}, {"zmq_threads": 0}, {"join_timeout": 0}, {"join_timeout": "1"}, {"op_timeout": -1}, {"credit_ops": 0},
    {"heartbeat_interval": -1}, {"barrier_warning": float("nan")}, {"num_nodes": 2},
])
def test_wrong_settings(settings):
    with pytest.raises((ValueError, TypeError), match=next(iter(settings))):
        make(**settings)


def test_unknown_settings_are_a_type_error():
    with pytest.raises(TypeError, match="locaton_caches"):
        make(locaton_caches=True)


def test_numpys_integers_are_numbers():
    c = Config.make(np.int64(10), np.int32(2), environ={})
    assert (type(c.num_keys), type(c.num_threads)) == (int, int)


def test_the_token_is_taken_out_of_the_environment_and_never_shown(monkeypatch):
    monkeypatch.setattr(config_module, "_taken", {})
    for name, value in {**CLUSTER, "LAPSE_TOKEN": "very secret token"}.items():
        monkeypatch.setenv(name, value)
    first, second = Config.make(10, 2), Config.make(10, 2)
    assert first.token == second.token == "very secret token"
    assert "LAPSE_TOKEN" not in os.environ
    assert "secret" not in repr(first)
    monkeypatch.setenv("DMLC_PS_ROOT_PORT", "4001")     # another job
    assert Config.make(10, 2).token is None


def test_errors_are_what_a_caller_would_look_for_and_survive_a_process_border():
    key = errors.KeyRangeError.of(-1, 10)
    assert isinstance(key, errors.LapseError)
    assert isinstance(key, ValueError)
    assert isinstance(key, IndexError)
    assert str(key) == "key -1 is not in [0, 10)"
    failure = errors.NodeFailure(2, "hostb", 4711, "killed by signal 9 (SIGKILL)", "node 0")
    assert str(failure) == "node 2 (hostb, pid 4711): killed by signal 9 (SIGKILL); noticed by node 0"
    assert isinstance(failure, RuntimeError)
    worker = errors.WorkerError(1, 0, "ValueError: x", "Traceback ...")
    assert str(worker).startswith("worker 0 of node 1: ValueError: x")
    for error in (key, failure, worker, errors.Interrupted("x")):
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert (type(other), str(other), vars(other)) == (type(error), str(error), vars(error))
    assert errors.failure_text(None, "", 0, "the nodes differ", "") == "the job failed: the nodes differ"


def test_hosts():
    assert hosts.resolve("127.0.0.1") == "127.0.0.1"
    assert hosts.is_loopback(hosts.resolve("localhost"))
    assert hosts.address_towards("127.0.0.1") == "127.0.0.1"
    assert hosts.is_loopback("::1")
    assert not hosts.is_loopback("192.0.2.1")
    assert hosts.place() == hosts.place()
    with pytest.raises(errors.LapseError, match=r"no-such-host\.invalid"):
        hosts.resolve("no-such-host.invalid")
    assert hosts.interface_address("lo") == "127.0.0.1"
    assert hosts.process_state(os.getpid()) is None
    assert hosts.process_state(2**22 + 5) == "the process died"
