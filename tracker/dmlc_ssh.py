#!/usr/bin/env python3
"""Run a command as the nodes of one job on several hosts, over ssh: the command line of the dmlc trackers. Works from a source tree, too.

    python tracker/dmlc_ssh.py -H HOSTFILE -s 3 python apps/simple.py -k 14
"""
import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from lapse.launch import add_options, add_ssh_options, place_of, run_with_options  # (lapse.launch, the attribute, is a function)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="dmlc_ssh.py", allow_abbrev=False, usage="dmlc_ssh.py -H FILE -s N [options] COMMAND [ARGUMENT ...]",
        description="Run COMMAND as the nodes of one job on several hosts; the scheduler runs here. Each line that the nodes write gets "
                    "the prefix [node N HOST]. When one fails, the others are ended, and its exit code is returned.")
    parser.add_argument("-n", "--num-workers", type=int, default=0, metavar="0",
                        help="accepted for the sake of old command lines; workers are threads of the nodes")
    add_options(parser)
    add_ssh_options(parser)
    options = parser.parse_args()
    if options.num_workers != 0:
        parser.error(f"-n {options.num_workers}: Lapse has no worker processes, its workers are threads of the nodes; use -n 0")
    if options.hosts is None:
        parser.error("no host file: -H FILE")
    return run_with_options(parser, options, place_of(parser, options))


if __name__ == "__main__":
    sys.exit(main())
