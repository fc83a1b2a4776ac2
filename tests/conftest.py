"""What the tests of programs share."""
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
