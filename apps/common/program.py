"""The frame of an application: its exit code and one sentence for whatever goes wrong, the report of its epochs, its memory."""
import contextlib
import json
import math
import resource
import sys
from dataclasses import asdict
from pathlib import Path

from apps.common.files import InputError

__all__ = ["Report", "TrainingError", "peak_memory", "run_application"]


class TrainingError(Exception):
    """What ended the training, in one sentence."""


def run_application(name, prepare, run):
    """Call `run(*prepare())`; return the exit code.

    prepare checks the input, and returns None where there is nothing to run (the scheduler). What is wrong there is one sentence on
    stderr and exit code 2, what goes wrong in run the same with 1. Failures of the job itself are the caller's (`run_program`).
    """
    code = 2
    try:
        job = prepare()
        if job is None:
            return 0
        code = 1
        return run(*job) or 0
    except (InputError, TrainingError) as error:
        sentence = str(error)
    except MemoryError as error:
        sentence = f"out of memory: {error}" if str(error) else "out of memory"
    except OSError as error:
        if error.strerror is None:
            raise
        sentence = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    sys.stdout.flush()
    sys.stderr.write(f"{name}: {sentence}\n")
    return code


class Report:
    """What the first worker of the job calls after each epoch, with a dataclass that has line(): a line on stdout (not if `quiet`), one in
    a file.

    The file (none if `path` is empty) has one JSON object per line; what is not a number is null there. OSError when it cannot be
    written.
    """

    def __init__(self, path, quiet=False):
        self.path, self.quiet = Path(path) if path else None, quiet
        if self.path:
            self.path.write_text("")

    def __call__(self, result):
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({name: None if isinstance(value, float) and not math.isfinite(value) else value
                                       for name, value in asdict(result).items()}) + "\n")
        if not self.quiet:
            sys.stdout.write(result.line() + "\n")
            sys.stdout.flush()


def peak_memory():
    """Return the most bytes that this process has had in memory."""
    with contextlib.suppress(OSError, StopIteration):
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss      # bytes on macOS, which has no /proc
