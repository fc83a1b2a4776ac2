"""Lapse: a parameter server whose parameters relocate between nodes while the job runs.

    lapse.setup(num_keys, num_threads)
    server = lapse.Server(values_per_key)
    kv = lapse.Worker(0, server)
    kv.push([1, 3, 5], values); kv.localize([1, 3, 5]); values = kv.pull([1, 3, 5])
    kv.finalize(); server.shutdown()

Lapse: Renz-Wieland et al., Dynamic Parameter Allocation in Parameter Servers, PVLDB 13(11), 2020.
"""
try:
    from lapse import _build  # noqa: F401
except ImportError as error:
    raise ImportError(f"the compiled modules of Lapse are not in {__path__[0]}. In the source tree, run `make ps` or `pip install -e .` "
                      "first, or leave it to use an installed Lapse") from error
from lapse._version import __version__
from lapse.errors import Interrupted, KeyRangeError, LapseError, NodeFailure, WorkerError
from lapse.launch import launch
from lapse.node import Server, is_scheduler, scheduler, setup
from lapse.worker import Timestamp, Worker

__all__ = ["Interrupted", "KeyRangeError", "LapseError", "NodeFailure", "Server", "Timestamp", "Worker",
           "WorkerError", "__version__", "is_scheduler", "launch", "scheduler", "setup"]
