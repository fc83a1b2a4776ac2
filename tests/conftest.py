"""What the tests of programs share, and how tests are spread over processes."""
import os
import signal

import pytest
from launched import Jobs

# A job in the background of a script ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def jobs():
    """Starts jobs; the test fails when one leaves a process or a file behind."""
    jobs = Jobs()
    yield jobs
    processes, files = jobs.close()
    assert not processes, f"left behind: {processes}"
    assert not files, f"left behind: {files}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """`-n auto`: one process more than there are cores, since tests wait a lot. With -s there are no others, whose output would be lost."""
    if config.option.capture == "no":
        return 0
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or (os.cpu_count() or 1) + 1)
