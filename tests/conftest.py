"""What the tests of programs share."""
import pytest
from launched import Jobs


@pytest.fixture
def jobs():
    """Starts jobs; the test fails when one leaves a process or a file behind."""
    jobs = Jobs()
    yield jobs
    processes, files = jobs.close()
    assert not processes, f"left behind: {processes}"
    assert not files, f"left behind: {files}"
