"""What the peers' scripts have in common. They run in environments of their own, so nothing of this project is imported."""
import argparse
import json
import resource
import sys
import time
from importlib import metadata
from pathlib import Path


class Clock:
    """`with Clock() as clock:`; clock.wall and clock.cpu are the seconds it took; cpu is of this process and its ended children."""

    def __enter__(self):
        self._wall, self._cpu = time.perf_counter(), used()
        return self

    def __exit__(self, *_):
        self.wall, self.cpu = time.perf_counter() - self._wall, used() - self._cpu


def used():
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def parser(text, *data):
    """An ArgumentParser for the script whose docstring is `text`, with positional paths."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, help in data:
        made.add_argument(name, type=Path, help=help)
    return made


def answer(package, clock, **figures):
    """Print the figures as the last line of standard output."""
    head = {"version": metadata.version(package), "wall": round(clock.wall, 3), "cpu": round(clock.cpu, 3)}
    sys.stdout.write(json.dumps({**head, **figures}) + "\n")
