"""Nodes for tests: of one process, and of several."""
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30       # seconds for threads to end


@pytest.fixture
def serve(monkeypatch):
    """serve(length, num_keys=, threads=, dtype=, **settings) -> a Server of one node; shut down afterwards, leaving no thread."""
    import lapse
    for name in list(os.environ):
        if name.startswith(("DMLC_", "LAPSE_", "PS_")):
            monkeypatch.delenv(name)
    servers = []

    def make(length=4, *, num_keys=100, threads=1, dtype="float32", stored_lengths=None, **settings):
        lapse.setup(num_keys, threads, **settings)
        servers.append(lapse.Server(length, dtype=dtype, stored_lengths=stored_lengths))
        return servers[-1]

    yield make
    while servers:
        servers.pop().shutdown()
    left = [thread for thread in threading.enumerate() if thread.name in ("lapse-server", "lapse-control", "lapse-errands")]
    for thread in left:         # that of the errands is not waited for when a node is abandoned
        thread.join(PATIENCE)
    assert not [thread.name for thread in left if thread.is_alive()]


@pytest.fixture
def sampler(serve):
    """sampler(scheme, ..., threads=, num_keys=) -> (server, Worker) whose values are their keys; the Worker is finalized afterwards."""
    import numpy as np

    import lapse
    workers = []

    def make(scheme="naive", *arguments, num_keys=50, length=2, seed=1, threads=1, shared_memory=True, **settings):
        server = serve(length, num_keys=num_keys, threads=threads, shared_memory=shared_memory, dtype="float64")
        server.enable_sampling_support(scheme, *arguments, seed=seed, **settings)
        workers.append(lapse.Worker(0, server))
        if isinstance(length, int):
            workers[0].set(range(num_keys), np.repeat(np.arange(num_keys, dtype=float), length))
        return server, workers[0]

    yield make
    for kv in workers:
        if "finalized" not in repr(kv):
            with kv:
                pass


@pytest.fixture
def run_program(tmp_path):
    """run_program(text, nodes=0, check=0) runs a Python program (nodes > 0: as the nodes of a job); returns its CompletedProcess."""
    def run(text, nodes=0, check=0, timeout=90, args=()):
        path = tmp_path / "program.py"
        path.write_text(textwrap.dedent(text))
        command = [sys.executable, str(path), *map(str, args)]
        if nodes:
            command = [sys.executable, "-m", "lapse", "run", "-s", str(nodes), *command]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("DMLC_", "LAPSE_", "PS_"))}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=timeout)
        if check is not None:
            assert done.returncode == check, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done
    return run
