"""What the tests of programs share, the deadline of all tests, and how they are spread over processes."""
import faulthandler
import os
import signal

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key, get_timeout_config_value
from launched import Jobs
from ports import reserved_port

# A job in the background of a script ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Under nohup, they would inherit that a hang-up is ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """Set the deadline (pyproject.toml) again: pytest has cancelled it if the test has failed, and then a fixture could wait forever."""
    if (seconds := get_timeout_config_value(item.config)) > 0:
        faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[fault_handler_stderr_fd_key])
    return (yield)


@pytest.fixture
def jobs():
    """Starts jobs; the test fails when one leaves a process or a file behind."""
    jobs = Jobs()
    yield jobs
    processes, files = jobs.close()
    assert not processes, f"left behind: {processes}"
    assert not files, f"left behind: {files}"


@pytest.fixture
def port():
    """A port of loopback for a scheduler that the test starts."""
    with reserved_port() as number:
        yield number


# Modules whose tests run in one process, since they share something that takes long to make; all others go where there is room.
TOGETHER = ("tests/packaging/test_install.py", "tests/packaging/test_site.py", "tests/unit/test_c_level.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if (module := nodeid.partition("::")[0]) not in TOGETHER else module

        # What follows mends pytest-xdist 3.8, with which a run whose process dies in a test never ends.

        def remove_node(self, node):
            """A process is gone, maybe in a test: that one has failed, and is not for another process to try."""
            unfinished = [(scope, nodeid) for scope, unit in self.assigned_work[node].items() for nodeid, done in unit.items() if not done]
            if not unfinished:
                return super().remove_node(node)
            scope, crashed = unfinished[0]
            workload = self.assigned_work.pop(node)
            workload[scope][crashed] = True
            self.workqueue.update({scope: unit for scope, unit in workload.items() if not all(unit.values())})
            for other in self.assigned_work:
                self._reschedule(other)
            return crashed

        def _reschedule(self, node):
            """A process keeps its last test until it has another one or is told to stop, so one alone would wait forever."""
            if node not in self.registered_collections:     # it replaces another one, and will be asked again when it knows the tests
                return
            try:
                super()._reschedule(node)
                while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
                    super()._reschedule(node)
            except OSError:         # this process has died, too, which will be told in a moment; it did not get its last unit
                scope, unit = self.assigned_work[node].popitem()
                self.workqueue[scope] = unit

    config.option.loadscopereorder = True       # what stays together begins first
    return Scheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """`-n auto`: one process more than there are cores, since tests wait a lot. With -s there are no others, whose output would be lost."""
    if config.option.capture == "no":
        return 0
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or (os.cpu_count() or 1) + 1)
