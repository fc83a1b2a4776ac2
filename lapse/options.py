"""The command line of a program on Lapse: its parser, the options that every program takes, and what they mean to `setup`.

Command lines that were written for the C++ programs run unchanged: a boolean takes a value, names may be shortened as long
as they stay unambiguous, and `--opt value`, `--opt=value`, `-r 2` and `-r2` say the same. A wrong option ends with two lines
on stderr and exit code 2, `--help` with 0. Nothing here imports the core.
"""
import argparse
import difflib
import math
import re

__all__ = ["add_dtype", "add_replicate", "add_shared_memory", "boolean", "non_negative", "non_negative_int", "positive", "positive_int",
           "program_parser", "sampling_settings", "seconds", "seed", "system_settings", "whole"]

TRANSPORTS = ("auto", "ipc", "tcp")
SAMPLING_SCHEMES = ("naive", "preloc", "pool", "local")
DTYPES = ("float32", "float64", "int32", "int64")
MOST = 2**31 - 1                # of a number that counts something, if nothing else is said
MOST_GROUP, MOST_USES = 2**24, 2**28        # as in lapse/sampling.py, which imports the core
LONGEST = 1e9                   # seconds

# Options of the C++ programs that belong to replication and intent. A name that ends in a dot stands for all that begin so.
RESERVED = ("--rep.", "--sys.sync.", "--sys.timing.", "--sys.techniques", "--sys.channels", "--sys.time_intent_actions",
            "--sys.keep_unused", "--downsample_replicated_negatives")

_BOOLEANS = {"0": False, "false": False, "no": False, "off": False, "1": True, "true": True, "yes": True, "on": True}
_TRACE_KEYS = re.compile(r"all|random-\d+-seed-\d+-range-\d+-\d+|\d+(,\d+)*|")


# --- converters: text to value, for `type=` of add_argument -------------------------------------------------------------------

def boolean(text):
    """Return the truth value of 0/1, true/false, yes/no or on/off, in any case."""
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a truth value: say 0/1, true/false, yes/no or on/off") from None


def whole(least, most=MOST):
    """Return a converter of whole numbers in [least, most]."""
    def convert(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small: the least is {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is too large: the most is {most}")
        return value
    return convert


def positive_int(text):
    """Return the whole number in [1, 2**31) that `text` spells."""
    return whole(1)(text)


def non_negative_int(text):
    """Return the whole number in [0, 2**31) that `text` spells."""
    return whole(0)(text)


def seed(text):
    """Return the whole number in [0, 2**64) that `text` spells."""
    return whole(0, 2**64 - 1)(text)


def positive(text):
    """Return the number > 0 that `text` spells."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0, or not a finite number")
    return value


def non_negative(text):
    """Return the number >= 0 that `text` spells."""
    return 0.0 if text.strip() in ("0", "0.0") else positive(text)


def seconds(text):
    """Return the number of seconds that `text` spells, at most 30 years, which is as good as more; none: None."""
    return None if text.lower() == "none" else min(positive(text), LONGEST)


def _trace_keys(text):
    if not _TRACE_KEYS.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} names no keys: say 12,3421 or all or random-10-seed-7-range-0-100")
    return text


def _scheme(text):
    scheme = "local" if text == "onlylocal" else text
    if scheme not in SAMPLING_SCHEMES:
        raise argparse.ArgumentTypeError(f"{text!r} is no sampling scheme: say {', '.join(SAMPLING_SCHEMES)} (= onlylocal)")
    return scheme


# --- the parser ---------------------------------------------------------------------------------------------------------------

class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        # Reserved families have no finite list of names, so they are looked for before argparse sees the line.
        if args is not None:
            for word in args:
                if word == "--":
                    break
                name = word.split("=", 1)[0]
                for reserved in RESERVED:
                    if name == reserved or (reserved.endswith(".") and name.startswith(reserved)):
                        self.refuse(name)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        if args is None:
            from sys import argv
            args = argv[1:]
        self.words = list(args)
        options = super().parse_args(self.words, namespace)
        if options.sampling_group_size * options.sampling_reuse > MOST_USES:
            self.error(f"--sampling.group_size {options.sampling_group_size} and --sampling.reuse {options.sampling_reuse}: their product "
                       f"is at most {MOST_USES}")
        return options

    def error(self, message):
        # argparse looks for missing options first; when one is mistyped, that is what is wrong.
        unknown = [word for word in getattr(self, "words", []) if word.startswith("--") and word != "--"
                   and not any(option.startswith(word.split("=", 1)[0]) for option in self._option_string_actions)]
        if unknown and "required" in message:
            message = f"unrecognized arguments: {' '.join(unknown)}"
        meant = difflib.get_close_matches(unknown[0].split("=", 1)[0], self._option_string_actions, 1) if unknown else []
        if meant and "unrecognized" in message:
            message += f"; {meant[0]}?"
        # Not argparse's usage, in which the sentence would be lost: dozens of lines, from each node.
        self.exit(2, f"usage: {self.prog} [option ...]; {self.prog} --help lists the options\n{self.prog}: error: {message}\n")

    def refuse(self, name):
        """End the program (exit code 2) over an option that belongs to a later version."""
        self.exit(2, f"{self.prog}: {name} is reserved for replication and intent, which this version does not have.\n")


class _Replicate(argparse.Action):
    def __call__(self, parser, namespace, value, option_string=None):
        if value > 0:
            parser.refuse(f"{option_string} {value}")
        setattr(namespace, self.dest, value)


def program_parser(prog, description):
    """Return an argparse parser with the system options; a program adds its own to it.

    `system_settings` and `sampling_settings` read the parsed result; the attributes that these options set begin with
    `sys_` and `sampling_`, so that they never meet a program's own.
    """
    parser = _Parser(prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                     allow_abbrev=True)
    system = parser.add_argument_group("system options")
    system.add_argument("--sys.location_caches", dest="sys_location_caches", type=boolean, default=False, metavar="BOOL",
                        help="remember which node owned a key last")
    system.add_argument("--sys.transport", dest="sys_transport", choices=TRANSPORTS, default="auto",
                        help="how nodes are connected; auto: ipc on one host, tcp between hosts")
    system.add_argument("--sys.zmq_threads", "--sys.nw_threads", dest="sys_zmq_threads", type=positive_int, default=1,
                        metavar="N", help="ZeroMQ I/O threads")
    system.add_argument("--sys.stats.out", dest="sys_stats_out", default="", metavar="FOLDER",
                        help="folder for stats.json: accesses by where keys were, relocations")
    system.add_argument("--sys.trace.keys", dest="sys_trace_keys", type=_trace_keys, default="", metavar="KEYS",
                        help="keys whose relocations are logged: 12,3421 or all or random-10-seed-7-range-0-100")
    sampling = parser.add_argument_group("sampling options")
    sampling.add_argument("--sampling.scheme", "--sampling.strategy", dest="sampling_scheme", type=_scheme, default="naive",
                          metavar="SCHEME", help="naive, preloc, pool or local (= onlylocal)")
    sampling.add_argument("--sampling.group_size", "--sampling.pool_size", dest="sampling_group_size", type=whole(1, MOST_GROUP),
                          default=250, metavar="N", help="pool: keys of one localize")
    sampling.add_argument("--sampling.reuse", dest="sampling_reuse", type=whole(1, MOST_USES), default=1, metavar="N",
                          help="pool: uses of a sample")
    sampling.add_argument("--sampling.postpone", dest="sampling_postpone", type=boolean, default=False, metavar="BOOL",
                          help="pool: use a non-local sample later")
    sampling.add_argument("--sampling.batch_size", dest="sampling_batch_size", type=whole(1, MOST_USES), default=10000,
                          metavar="N", help="draws generated at once")
    sampling.add_argument("--sampling.with_replacement", dest="sampling_with_replacement", type=boolean, default=True,
                          metavar="BOOL", help="a sample may be drawn twice")
    return parser


def add_shared_memory(parser):
    """Add `--shared_memory`, for the programs that take it."""
    parser.add_argument("--shared_memory", type=boolean, default=True, metavar="BOOL",
                        help="workers reach local parameters directly; off: through the server thread")


def add_dtype(parser, default="float32"):
    """Add `--dtype`, for the programs that take it."""
    parser.add_argument("--dtype", choices=DTYPES, default=default, help="number type of the values")


def add_replicate(parser):
    """Add `--replicate`, for the programs that take it; only 0 is accepted so far."""
    parser.add_argument("--replicate", action=_Replicate, type=non_negative_int, default=0, metavar="N",
                        help="number of most frequent keys to replicate (only 0 in this version)")


def system_settings(args):
    """Return the keyword arguments of `lapse.setup` that the system options of `args` ask for.

    A program's own `--location_caches` turns the same on as `--sys.location_caches`; `--shared_memory` counts where the
    program takes it.
    """
    return {
        "location_caches": args.sys_location_caches or getattr(args, "location_caches", False),
        "transport": args.sys_transport,
        "zmq_threads": args.sys_zmq_threads,
        "stats_out": args.sys_stats_out,
        "trace_keys": args.sys_trace_keys,
        "shared_memory": getattr(args, "shared_memory", True),
    }


def sampling_settings(args):
    """Return what the sampling options of `args` say, by name."""
    return {name[len("sampling_"):]: value for name, value in vars(args).items() if name.startswith("sampling_")}
