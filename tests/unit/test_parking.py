"""Nobody sleeps through a wake: the fences of the source, tried out in every order that a weak memory allows.

A processor may let others see a thread's stores late and in another order, but for those in front of a fence; x86 hardly does, and here a
locked instruction or the kernel's own barrier stands beside each fence, so that no run of the program can show that one is missing. So this
reads the words of each sleeper and of each waker out of the source, and runs them in all interleavings. The futex compares its word with
the memory, and promises nothing about the sleeper's other stores.
"""
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = [       # what stands in the source -> what it does
    (r"seen = load_u32\(&[\w.]*event\)", "see"),
    (r"store_u32\(&[\w.]*sleeping, 1\)|add_u32\(&[\w.]*waiting, 1\)", "say"),
    (r"(?<!\w)fence\(\)", "fence"),
    (r"(?<!un)park\(&[\w.]*event, seen", "park"),
    (r"add_u32\(&[\w.]*event, 1\)", "count"),
    (r"if load_u32\(&[\w.]*(?:sleeping|waiting)\)", "look"),
    (r"unpark\(&[\w.]*event\)", "wake"),
]
SLEEPERS = {"Worker.block": ("_worker.pyx", "cdef int block("), "Worker.await_pool": ("_worker.pyx", "cdef int await_pool("),
            "the pool's thread": ("_refill.pyx", "cdef int fill("), "Waiter.run": ("worker.pyx", "    def run(self):")}
WAKERS = {"Van.wake": ("_van.pyx", "cdef void wake("), "the pool's rouse": ("_pool.pyx", "cdef void rouse(")}
PAIRS = [("Worker.block", "Van.wake"), ("the pool's thread", "Van.wake"), ("Waiter.run", "Van.wake"),
         ("Worker.await_pool", "the pool's rouse")]


def words_of(file, head):
    """The words of a function, in the order of its lines."""
    text = (ROOT / "lapse" / file).read_text(encoding="utf-8")
    lines = text[text.rindex("\n", 0, text.index(head)) + 1:].splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    body = itertools.takewhile(lambda line: not line.strip() or len(line) - len(line.lstrip()) > indent, lines[1:])
    found = []
    for line in body:
        code = re.sub(r"(^|\s)#.*", "", line)
        found += [word for pattern, word in WORDS if re.search(pattern, code)]
    return found


def slept_through(sleeper, waker):
    """Can the sleeper be asleep in the end, though the waker has done its part? All orders are tried."""
    done, asleep = len(sleeper), len(sleeper) + 1
    # the sleeper's place, the waker's, their stores under way; in memory: has the event been counted, has the sleeper said that it sleeps
    start = (0, 0, False, False, 0, 0)
    todo, known = [start], {start}
    while todo:
        s, w, mine, his, event, says = todo.pop()
        following = []
        if mine:                                        # a store that is under way arrives at any time
            following.append((s, w, False, his, event, 1))
        if his:
            following.append((s, w, mine, False, 1, says))
        word = sleeper[s] if s < done else None
        if word == "see":                               # whoever sees the event goes on
            following.append((s + 1 if event == 0 else done, w, mine, his, event, says))
        elif word == "say":
            following.append((s + 1, w, True, his, event, says))
        elif word == "park":
            following.append((asleep if event == 0 else done, w, mine, his, event, says))
        elif word == "fence" and not mine:
            following.append((s + 1, w, mine, his, event, says))
        word = waker[w] if w < len(waker) else None
        if word == "count":
            following.append((s, w + 1, mine, True, event, says))
        elif word == "look":
            following.append((s, w + 1 if says else len(waker), mine, his, event, says))
        elif word == "wake":
            following.append((done if s == asleep else s, w + 1, mine, his, event, says))
        elif word == "fence" and not his:
            following.append((s, w + 1, mine, his, event, says))
        if not following and s == asleep:
            return True
        todo += [state for state in following if state not in known]
        known.update(following)
    return False


@pytest.mark.parametrize(("sleeper", "waker"), PAIRS)
def test_no_wake_is_slept_through(sleeper, waker):
    sleeps, wakes = words_of(*SLEEPERS[sleeper]), words_of(*WAKERS[waker])
    assert [word for word in sleeps if word != "fence"] == ["see", "say", "park"], sleeps
    assert [word for word in wakes if word != "fence"] == ["count", "look", "wake"], wakes
    assert not slept_through(sleeps, wakes)


@pytest.mark.parametrize("without", ["sleeper", "waker"])
def test_without_a_fence_one_is(without):
    sleeps, wakes = ["see", "say", "fence", "park"], ["count", "fence", "look", "wake"]
    (sleeps if without == "sleeper" else wakes).remove("fence")
    assert slept_through(sleeps, wakes)
