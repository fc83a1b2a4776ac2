"""The frame of an application: its exit code and one sentence for whatever goes wrong, the report of its epochs, its memory."""
import contextlib
import json
import math
import resource
import sys
from dataclasses import asdict
from pathlib import Path

import lapse
from apps.common.files import InputError
from lapse.options import system_settings

__all__ = ["Report", "TrainingError", "log_peak_memory", "peak_memory", "run_application", "say_end", "set_up"]


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


def set_up(num_keys, args):
    """Set the job up as the command line says. False in the scheduler, whose part is over then. Blocking there."""
    lapse.setup(num_keys, args.num_threads, **system_settings(args))
    if lapse.is_scheduler():
        lapse.scheduler(num_keys, args.num_threads)
        return False
    return True


def say_end(name, trained, num_nodes, threads):
    """Write the closing line of the job; for its first node."""
    last = trained.epochs[-1] if trained.epochs else None
    sys.stdout.write(f"{name}: {'stopped by --max_runtime' if trained.stopped else 'OK'} ({num_nodes} nodes x {threads} workers, "
                     f"{last.epoch if last else 0} epochs, {last.total_seconds if last else 0:.2f} s)\n")


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

    def write(self, line):
        try:
            with self.path.open("a") as file:
                file.write(line)
        except OSError as error:
            error.filename = str(self.path)         # a full disk does not say where
            raise

    def __call__(self, result):
        if self.path:
            self.write(json.dumps({name: None if isinstance(value, float) and not math.isfinite(value) else value
                                   for name, value in asdict(result).items()}) + "\n")
        if not self.quiet:
            sys.stdout.write(result.line() + "\n")
            sys.stdout.flush()


def peak_memory():
    """Return the most bytes that this process has had in memory."""
    with contextlib.suppress(OSError, StopIteration):
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss      # bytes on macOS, which has no /proc


def log_peak_memory(log, rank):
    """Say in the log what a node has needed."""
    log.info("node %d had at most %.0f MiB in memory", rank, peak_memory() / 2**20)
