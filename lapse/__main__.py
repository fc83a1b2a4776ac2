"""`python -m lapse`: which versions these are, the head of a bug report; `python -m lapse run …`: start a job; `… keys`: make keys."""
from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence


def versions() -> dict[str, str]:
    """What a bug report should begin with."""
    import numpy
    import zmq

    from lapse import _build, _version, _zmq
    return {
        "lapse": _version.__version__,
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "numpy": numpy.__version__,
        "pyzmq": zmq.__version__,
        "libzmq": ".".join(map(str, _zmq.libzmq_version)),
        "curve": "yes" if zmq.has("curve") else "no",
        "build": f"{_build.kind} ({_build.flags}; {_build.compiler})",
        "platform": platform.platform(),
    }


def main(argv: Sequence[str]) -> int:
    """Run one command line, given without the program's name; return the exit code."""
    if argv[:1] == ["run"]:
        from lapse.launch import main as run  # the module; `lapse.launch` as an attribute is the function
        return run(argv[1:])
    if argv[:1] == ["keys"]:
        from lapse.keys import main as make_keys
        return make_keys(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m lapse", usage="%(prog)s [-h] [run ... | keys ...]",
                                     description="Without a command: print the versions.",
                                     epilog="'python -m lapse run --help' tells how to start jobs, "
                                            "'python -m lapse keys --help' how to make keys for one that is started by hand.")
    parser.add_argument("command", nargs="?", choices=["run", "keys"],
                        help="run: start a scheduler and nodes on this machine, or over ssh; keys: make the keys of a job")
    parser.parse_args(argv)
    for name, version in versions().items():
        print(f"{name + ':':10}{version}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
