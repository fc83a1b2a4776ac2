"""`python -m benchmarks.peers NAME DATA… [options]`: run a peer and print its figures as one line of JSON."""
import argparse
import json
import sys

from benchmarks import peers


def parse(arguments):
    """Split a command line into data and options; every option has a value."""
    data, options, left = [], {}, list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            data.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if not equals and not left:
            raise peers.PeerError(f"the option --{name} has no value")
        options[name] = value if equals else left.pop(0)
    return data, options


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=peers.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=peers.PEERS, metavar="NAME", help=", ".join(peers.PEERS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its data and options; --help lists them")
    given = parser.parse_args()
    try:
        if {"-h", "--help"} & set(given.arguments):
            print(peers.script(given.peer, ["--help"]), end="")
        else:
            data, options = parse(given.arguments)
            print(json.dumps(peers.run(given.peer, *data, **options)))
    except peers.PeerError as error:
        sys.exit(f"peers: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
