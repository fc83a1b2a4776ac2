"""The checker of histories: good ones pass, and each thing that the guarantee forbids is seen."""
import numpy as np
import pytest

from lapse.testing import History, Recorder, check, check_registers


def history(num_workers, *calls):
    """calls: (worker, order, key, begin, end) for a push, with what it saw behind that for a pull."""
    reads = [call[:5] for call in calls if len(call) == 6]
    seen = [call[5] for call in calls if len(call) == 6]
    writes = [call for call in calls if len(call) == 5]
    return History(np.array(reads, np.int64).reshape(-1, 5), np.array(seen, np.int64).reshape(-1, num_workers),
                   np.array(writes, np.int64).reshape(-1, 5))


def rules(*args, **kwargs):
    return {finding.rule for finding in check(*args, **kwargs)}


def test_nothing_happened():
    assert check(history(2)) == []
    assert check(history(2, (0, 0, 7, 0, 1))) == []
    assert check_registers(np.empty((0, 8), np.int64)) == []


def test_good_history():
    good = history(
        2,
        (0, 0, 5, 0, 4), (1, 0, 5, 1, 5),                       # both push key 5
        (0, 1, 5, 6, 8, [1, 1]), (1, 1, 5, 6, 9, [1, 1]),
        (1, 2, 5, 10, 20), (0, 2, 5, 12, 14, [1, 1]),           # overlaps the push, does not see it yet
        (0, 3, 5, 15, 16, [1, 2]), (0, 4, 9, 17, 18, [0, 0]),
    )
    assert check(good) == []
    assert check(good, base=np.zeros((10, 2))) == []


def test_duplicate_keys():
    # both positions of one push count, and those of one pull have no order among each other
    assert check(history(2, (0, 0, 1, 0, 1), (0, 0, 1, 0, 1), (0, 1, 1, 2, 9, [2, 1]), (0, 1, 1, 2, 9, [2, 0]), (1, 0, 1, 3, 8),
                         (0, 2, 1, 10, 11, [2, 1]))) == []


def test_base():
    late = history(2, (0, 0, 3, 0, 1), (0, 1, 3, 2, 3, [5, 7]))
    base = np.array([[0, 0]] * 3 + [[4, 7]])
    assert check(late, base=base) == []
    assert "own pushes" in rules(late)


@pytest.mark.parametrize("own", [0, 1, 3])
def test_own_reads_are_exact(own):
    bad = history(1, (0, 0, 1, -1, -1), (0, 1, 1, -1, -1), (0, 2, 1, -1, -1, [own]), (0, 3, 1, -1, -1))
    assert rules(bad) == {"own pushes"}
    assert "call 2 of worker 0" in check(bad)[0].text
    assert check(bad)[0].key == 1


def test_reads_never_go_back():
    assert rules(history(2, (0, 0, 1, 0, 90), (0, 1, 1, 0, 90), (1, 0, 1, 1, 50, [2, 0]), (1, 1, 1, 2, 51, [1, 0]))) == {"reads go back"}


def test_reads_go_back_only_per_key_and_worker():
    assert check(history(2, (0, 0, 1, 0, 90), (1, 0, 1, 1, 50, [1, 0]), (1, 1, 2, 2, 51, [0, 0]), (0, 1, 2, 95, 96, [0, 0]))) == []


def test_no_chain():
    bad = history(4, (0, 0, 1, 0, 90), (1, 0, 1, 0, 90), (2, 0, 1, 1, 50, [1, 0, 0, 0]), (3, 0, 1, 1, 50, [0, 1, 0, 0]))
    assert rules(bad) == {"no chain"}


def test_misses_a_finished_push():
    assert rules(history(2, (0, 0, 1, 0, 5), (1, 0, 1, 6, 7, [0, 0]))) == {"misses a finished push"}
    assert check(history(2, (0, 0, 1, 0, 5), (1, 0, 1, 5, 7, [0, 0]))) == []            # at the same time is not before
    assert check(history(2, (0, 0, 1, 0, -1), (1, 0, 1, 6, 7, [0, 0]))) == []           # not known when it finished
    assert check(history(2, (0, 0, 1, 0, 5), (1, 0, 1, 6, 7, [0, 0])), real_time=False) == []


def test_from_the_future():
    assert rules(history(2, (1, 0, 1, 0, 5, [1, 0]), (0, 0, 1, 6, 7))) == {"from the future"}
    assert check(history(2, (1, 0, 1, 0, 6, [1, 0]), (0, 0, 1, 6, 7))) == []
    assert rules(history(2, (1, 0, 1, 0, 5, [1, 0]))) == {"from the future"}            # nobody ever pushed it


def test_older_than_a_finished_pull():
    bad = history(3, (0, 0, 1, 0, 90), (1, 0, 1, 1, 10, [1, 0, 0]), (2, 0, 1, 11, 20, [0, 0, 0]))
    assert rules(bad) == {"older than a finished pull"}
    other_key = history(3, (0, 0, 1, 0, 90), (1, 0, 1, 1, 10, [1, 0, 0]), (2, 0, 2, 11, 20, [0, 0, 0]))
    assert check(other_key) == []


def test_number_of_findings_is_limited():
    bad = history(1, *[(0, i, i, -1, -1, [1]) for i in range(100)])
    assert len(check(bad, limit=3)) == 3


def serial(seed, workers=3, keys=4, calls=200):
    """A history of operations that were done one after the other, each at an instant between its begin and its end."""
    rng = np.random.default_rng(seed)
    values = np.zeros((keys, workers), np.int64)
    orders = [0] * workers
    busy_until = [0] * workers
    made = []
    for now in range(10, 10 * calls, 10):
        worker, key = int(rng.integers(workers)), int(rng.integers(keys))
        begin = max(busy_until[worker] + 1, now - int(rng.integers(1, 40)))
        if begin > now:
            continue
        busy_until[worker] = now + int(rng.integers(1, 40))
        call = (worker, orders[worker], key, begin, busy_until[worker])
        orders[worker] += 1
        if rng.integers(2):
            values[key, worker] += 1
            made.append(call)
        else:
            made.append((*call, values[key].tolist()))
    return made, workers


@pytest.mark.parametrize("seed", range(20))
def test_serial_histories_pass(seed):
    made, workers = serial(seed)
    assert check(history(workers, *made)) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_changed_number_is_seen(seed):
    made, workers = serial(seed)
    rng = np.random.default_rng(seed)
    pulls = [i for i, call in enumerate(made) if len(call) == 6]
    i = int(rng.choice(pulls))
    worker = made[i][0]
    made[i][5][worker] += int(rng.choice([-1, 1]))
    assert "own pushes" in rules(history(workers, *made))


def test_recorder(tmp_path):
    clock = iter(range(100)).__next__
    one, two = Recorder(0, 2, clock), Recorder(1, 2, clock)
    values = np.zeros((2, 3), np.float32)
    call = one.push([4, 4, 5])
    one.finished(call)
    unfinished = two.pull([4], values[:1])
    call = one.pull([4, 5], values)
    values[:] = [[2, 0, 99], [1, 0, 99]]
    one.finished(call)
    values[:] = -1                                  # the buffer is free again
    both = History.joined([one.history(), two.history()])
    assert both.seen.tolist() == [[2, 0], [1, 0]]
    assert both.writes[:, 2].tolist() == [4, 4, 5]
    assert check(both) == []
    both.save(tmp_path / "history.npz")
    assert all((a == b).all() for a, b in zip(History.load(tmp_path / "history.npz"), both))
    values[0, :2] = [1, 0]
    two.finished(unfinished)                        # saw one of the two pushes that finished before it began
    assert rules(History.joined([one.history(), two.history()])) == {"misses a finished push"}


# --- registers: worker, order, position, key, is set, value, begin, end -----------------------------------------------------------

def registers(*rows):
    return {finding.rule for finding in check_registers(np.array(rows, np.int64))}


def test_good_registers():
    assert registers(
        (0, 0, 0, 7, 1, 11, 0, 3), (1, 0, 0, 7, 1, 21, 1, 5), (2, 0, 0, 7, 0, 21, 2, 6), (2, 1, 0, 7, 0, 11, 7, 8),
        (0, 1, 0, 7, 0, 11, 9, 10), (2, 2, 0, 9, 0, 0, 11, 12),
    ) == set()


def test_registers_the_last_position_of_a_call_wins():
    assert registers((0, 0, 0, 1, 1, 5, 0, 9), (0, 0, 1, 1, 1, 6, 0, 9), (0, 1, 0, 1, 0, 6, 10, 11)) == set()
    assert registers((0, 0, 0, 1, 1, 5, 0, 9), (0, 0, 1, 1, 1, 6, 0, 9), (0, 1, 0, 1, 0, 5, 10, 11)) == {"no order"}


def test_registers_positions_of_a_pull_have_no_order():
    assert registers((0, 0, 0, 1, 1, 5, 0, 9), (1, 0, 0, 1, 0, 5, 0, 9), (1, 0, 1, 1, 0, 0, 0, 9)) == set()


@pytest.mark.parametrize("times", [True, False])
@pytest.mark.parametrize("rows", [
    pytest.param([(0, 0, 0, 1, 1, 5), (0, 1, 0, 1, 0, 0)], id="own set not seen"),
    pytest.param([(0, 0, 0, 1, 1, 5), (1, 0, 0, 1, 0, 5), (1, 1, 0, 1, 0, 0)], id="read goes back to the beginning"),
    pytest.param([(0, 0, 0, 1, 1, 5), (0, 1, 0, 1, 1, 6), (1, 0, 0, 1, 0, 6), (1, 1, 0, 1, 0, 5)], id="against the writer's order"),
    pytest.param([(0, 0, 0, 1, 1, 5), (1, 0, 0, 1, 1, 6), (2, 0, 0, 1, 0, 5), (2, 1, 0, 1, 0, 6), (3, 0, 0, 1, 0, 6), (3, 1, 0, 1, 0, 5)],
                 id="two readers disagree"),
])
def test_registers_no_order(rows, times):
    assert registers(*[(*row, *((0, 99) if times else (-1, -1))) for row in rows]) == {"no order"}


def test_registers_real_time():
    rows = [(0, 0, 0, 1, 1, 5, 0, 3), (1, 0, 0, 1, 1, 6, 4, 6)]
    assert registers(*rows, (2, 0, 0, 1, 0, 6, 7, 8)) == set()
    assert registers(*rows, (2, 0, 0, 1, 0, 5, 7, 8)) == {"no order"}
    assert registers(*rows, (2, 0, 0, 1, 0, 5, 6, 8)) == set()
    assert registers(*rows, (2, 0, 0, 1, 0, 0, 4, 8)) == {"no order"}


def test_registers_never_set_and_from_the_future():
    assert registers((0, 0, 0, 1, 0, 5, 0, 3)) == {"never set"}
    assert registers((0, 0, 0, 1, 0, 5, 0, 3), (1, 0, 0, 1, 1, 5, 4, 6)) == {"from the future"}
    assert registers((0, 0, 0, 1, 0, 5, 0, 9), (0, 1, 0, 1, 1, 5, 0, 9)) == {"from the future"}
