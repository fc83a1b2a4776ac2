"""What the simulation's actors are: greenlets, or threads of which one at a time has the turn.

Both give the same schedules and the same traces. Threads are slower by far, but have each a stack of its own, which is what a sanitizer
can follow: greenlets move pieces of one stack, so a sanitizer's build uses threads.
"""
from __future__ import annotations

import threading
from collections.abc import Callable

from lapse import _build

KINDS = ("greenlets", "threads")
DEFAULT = "threads" if _build.kind in ("asan", "tsan") else "greenlets"

_here = threading.local()


def actors_of(kind: str | None = None) -> tuple[Callable, Callable]:
    """The class of an actor, and the function that says who runs now. kind: one of KINDS; None: DEFAULT."""
    kind = kind or DEFAULT
    if kind not in KINDS:
        raise ValueError(f"actors {kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "threads":
        return Actor, current_actor
    try:
        from greenlet import getcurrent, greenlet
    except ModuleNotFoundError as error:
        if error.name != "greenlet":
            raise
        raise ModuleNotFoundError("the simulation needs greenlet: pip install lapse[testing]", name="greenlet") from error
    return greenlet, getcurrent


class Actor:
    """A thread that goes on only when somebody switches to it; as much of a greenlet's interface as the simulation uses.

    When its function returns, whoever made it goes on, and gets what the function raised. An actor that never ends does not keep the
    process alive.
    """

    def __init__(self, run: Callable[[], object] | None = None):
        self.parent = current_actor() if run is not None else None
        self.run, self.dead = run, False
        self.mine = threading.Semaphore(0)          # this actor's turn
        self.thread: threading.Thread | None = None
        self.ended: Actor | None = None             # who has just given the turn back by ending, and what it raised
        self.error: BaseException | None = None

    def switch(self) -> None:
        """Give the turn to this actor; comes back when the caller has it again."""
        me = current_actor()
        if me is self:
            return
        if self.run is not None and self.thread is None:
            self.thread = threading.Thread(target=self._live, daemon=True)
            self.thread.start()
        self.mine.release()
        me._await()

    def _await(self) -> None:
        interrupt = None
        while True:
            try:
                self.mine.acquire()
                break
            except KeyboardInterrupt as error:      # somebody else has the turn still
                interrupt = error
        ended, self.ended = self.ended, None
        if ended is not None:
            ended.thread.join()
        error = interrupt or (ended.error if ended is not None else None)
        if error is not None:
            raise error

    def _live(self) -> None:
        _here.actor = self
        self._await()
        try:
            self.run()
        except BaseException as error:
            self.error = error
        self.dead = True
        self.parent.ended = self
        self.parent.mine.release()


def current_actor() -> Actor:
    if not hasattr(_here, "actor"):
        _here.actor = Actor()
    return _here.actor
