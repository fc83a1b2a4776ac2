"""Become another program that dies with the launcher: `python -I -S _exec.py PARENT_PID COMMAND …`.

The launcher cannot set the parent-death signal from outside, and running Python between fork and exec (preexec_fn) is not safe
in a process with threads. So this small program does it for itself, and then executes the command. Standard library only, and
nothing of the package: it must start fast.
"""
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Get SIGKILL when the thread that started this process ends; exit if that has happened. Linux; elsewhere nothing."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent(int(sys.argv[1]))
    command = sys.argv[2:]
    for name in ("SIGPIPE", "SIGXFSZ", "SIGXFZ"):  # Python ignores them, and exec hands that on
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        print(f"{command[0]}: not found", file=sys.stderr)
        return 127
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 126


if __name__ == "__main__":
    sys.exit(main())
