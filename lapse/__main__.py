"""`python -m lapse`: which versions these are, the head of a bug report; `python -m lapse run …`: start a job; `… keys`: make keys;
`… mf`, `… kge`, `… word2vec` and others: the applications.
"""
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
    from lapse import programs
    if argv[:1] == ["data"]:
        return programs.show_data(argv[1:])
    if argv and argv[0] in programs.PROGRAMS:
        return programs.run_program_file(argv[0], argv[1:])
    commands = {"run": "start a scheduler and nodes on this machine, or over ssh", "keys": "make the keys of a job",
                **{name: program.about for name, program in programs.PROGRAMS.items()},
                "data": "print the folder with the small data sets of the applications"}
    parser = argparse.ArgumentParser(prog="python -m lapse", usage="%(prog)s [-h] [COMMAND ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description="Without a command: print the versions.",
                                     epilog="commands ('python -m lapse COMMAND --help' tells the options of each):\n"
                                            + "\n".join(f"  {name:16} {about}" for name, about in commands.items()))
    parser.add_argument("command", nargs="?", choices=list(commands), metavar="COMMAND", help="one of those below")
    parser.parse_args(argv)
    for name, version in versions().items():
        print(f"{name + ':':10}{version}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
