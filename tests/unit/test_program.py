import threading

import pytest

from lapse.errors import Interrupted, LapseError
from lapse.program import run_program, run_workers

DEADLINE = 30


def test_results_come_in_order():
    turns = [threading.Event() for _ in range(4)]

    def work(index):        # the last one finishes first
        if index < 3:
            assert turns[index + 1].wait(DEADLINE)
        turns[index].set()
        return 10 * index

    assert run_workers(4, work) == [0, 10, 20, 30]


def test_a_failure_does_not_wait_for_the_others():
    never, started = threading.Event(), threading.Event()

    def work(index):
        if index == 0:
            started.set()
            never.wait(DEADLINE)
        else:
            assert started.wait(DEADLINE)
            raise ZeroDivisionError("worker 1")

    try:
        with pytest.raises(ZeroDivisionError, match="worker 1"):
            run_workers(2, work)
        assert any(thread.name == "worker 0" for thread in threading.enumerate())
    finally:
        never.set()


def failing(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize(("main", "code"), [(lambda: None, 0), (lambda: 0, 0), (lambda: 1, 1), (lambda: 3, 3),
                                            (failing(LapseError("it rains")), 1), (failing(KeyboardInterrupt()), 130),
                                            (failing(Interrupted("stop")), 130)])
def test_exit_codes(main, code, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(main)
    assert ended.value.code == code
    err = capsys.readouterr().err
    assert err == ("LapseError: it rains\n" if code == 1 and "it rains" in err else "")


def test_other_exceptions_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_program(failing(ZeroDivisionError()))
