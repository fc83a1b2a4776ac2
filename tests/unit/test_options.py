import argparse

import pytest

from lapse.options import (
    RESERVED,
    add_dtype,
    add_replicate,
    add_shared_memory,
    boolean,
    non_negative_int,
    positive_int,
    program_parser,
    sampling_settings,
    seconds,
    seed,
    system_settings,
)

# name, alias, attribute, default, accepted texts and what they mean, refused texts
BOOLEAN = ({"1": True, "true": True, "YES": True, "on": True, "0": False, "False": False, "no": False, "off": False},
           ["2", "", "ja", "-1", "none"])
COUNT = ({"1": 1, "7": 7, "1000000": 1_000_000}, ["0", "-1", "1.5", "x", ""])
TABLE = [
    ("--sys.location_caches", None, "sys_location_caches", False, *BOOLEAN),
    ("--sys.transport", None, "sys_transport", "auto", {"auto": "auto", "ipc": "ipc", "tcp": "tcp"}, ["udp", "", "TCP"]),
    ("--sys.zmq_threads", "--sys.nw_threads", "sys_zmq_threads", 1, *COUNT),
    ("--sys.stats.out", None, "sys_stats_out", "", {"folder": "folder", "": "", "a b": "a b"}, []),
    ("--sys.trace.keys", None, "sys_trace_keys", "",
     {text: text for text in ("12,3421", "5", "all", "random-10-seed-7-range-0-100", "")},
     ["some", "1,,2", "1, 2", "-3", "random-10", "all,3"]),
    ("--sampling.scheme", "--sampling.strategy", "sampling_scheme", "naive",
     {"naive": "naive", "preloc": "preloc", "pool": "pool", "local": "local", "onlylocal": "local"}, ["best", ""]),
    ("--sampling.group_size", "--sampling.pool_size", "sampling_group_size", 250, *COUNT),
    ("--sampling.reuse", None, "sampling_reuse", 1, *COUNT),
    ("--sampling.postpone", None, "sampling_postpone", False, *BOOLEAN),
    ("--sampling.batch_size", None, "sampling_batch_size", 10_000, *COUNT),
    ("--sampling.with_replacement", None, "sampling_with_replacement", True, *BOOLEAN),
]
NAMES = [(name, row[2], row) for row in TABLE for name in row[:2] if name]


@pytest.fixture
def parser():
    parser = program_parser("program", "A program.")
    parser.add_argument("-r", "--rank", type=positive_int, default=10)
    parser.add_argument("--max_N", type=int, default=-1)
    add_shared_memory(parser)
    add_dtype(parser)
    add_replicate(parser)
    return parser


def refused(parser, capsys, *words):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(list(words))
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize(("name", "attribute", "row"), NAMES, ids=[name for name, _, _ in NAMES])
def test_a_system_option(parser, capsys, name, attribute, row):
    _, _, _, default, accepted, wrong = row
    assert getattr(parser.parse_args([]), attribute) == default
    assert accepted
    for text, value in accepted.items():
        for words in ([name, text], [f"{name}={text}"]):
            assert getattr(parser.parse_args(words), attribute) == value
            assert type(getattr(parser.parse_args(words), attribute)) is type(value)
    for text in wrong:
        error = refused(parser, capsys, f"{name}={text}")
        assert error.startswith("usage: program") and name in error
    assert "expected one argument" in refused(parser, capsys, name)


@pytest.mark.parametrize("name", [name for name, _, _ in NAMES])
def test_unambiguous_prefixes_of_a_name(parser, name):
    names = [option for option in parser._option_string_actions if option.startswith("--")]
    for end in range(len("--s"), len(name)):
        prefix = name[:end]
        if [option for option in names if option.startswith(prefix)] == [name]:
            text = next(iter(next(row for option, _, row in NAMES if option == name)[4]))
            assert vars(parser.parse_args([prefix, text])) == vars(parser.parse_args([name, text]))


def test_an_ambiguous_prefix_is_refused(parser, capsys):
    assert "ambiguous" in refused(parser, capsys, "--sampling.re", "1", "--sys", "1")


@pytest.mark.parametrize("words", [["-r", "2"], ["-r2"], ["--rank", "2"], ["--rank=2"], ["--ran", "2"], ["-r=2"]])
def test_spellings_of_an_own_option(parser, words):
    assert parser.parse_args(words).rank == 2


def test_negative_values(parser):
    assert parser.parse_args(["--max_N", "-5"]).max_N == -5


@pytest.mark.parametrize("words", [["--nothing"], ["--nothing", "3"], ["-z"], ["word"], ["--rank", "0"], ["--rank", "1e3"],
                                   ["--rank"], ["--dtype", "float16"], ["--shared_memory", "2"], ["--shared_memory"]])
def test_wrong_options_end_with_two_lines_and_2(parser, capsys, words):
    first, second = refused(parser, capsys, *words).splitlines()
    assert first.startswith("usage: program") and second.startswith("program: error: ")


def test_a_typo_in_an_option(parser, capsys):
    for words in (["--rnak", "2"], ["--rnak=2"], ["--rank", "2", "--rnak"]):
        assert refused(parser, capsys, *words).endswith("; --rank?\n"), words
    assert refused(parser, capsys, "--nothing").endswith("unrecognized arguments: --nothing\n")


def test_help_ends_with_0(parser, capsys):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name, _, _ in NAMES:
        assert name in out


@pytest.mark.parametrize("name", [name + "anything" if name.endswith(".") else name for name in RESERVED])
def test_reserved_options_are_refused_in_one_sentence(parser, capsys, name):
    for words in ([name], [name, "1"], [f"{name}=1"], ["--rank", "3", name, "0"]):
        error = refused(parser, capsys, *words)
        assert name in error and "replication and intent" in error
        assert error.count("\n") == 1 and error.endswith(".\n")


def test_replicate_is_refused_above_0(parser, capsys):
    assert parser.parse_args([]).replicate == 0
    assert parser.parse_args(["--replicate", "0"]).replicate == 0
    assert "replication and intent" in refused(parser, capsys, "--replicate", "5")
    assert refused(parser, capsys, "--replicate", "-1").startswith("usage: program")


def test_the_command_line_of_the_process_is_read(parser, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program", "-r5"])
    assert parser.parse_args().rank == 5
    monkeypatch.setattr("sys.argv", ["program", "--rep.sync", "1"])
    with pytest.raises(SystemExit) as ended:
        parser.parse_args()
    assert ended.value.code == 2


def test_system_settings(parser):
    assert system_settings(parser.parse_args([])) == {
        "location_caches": False, "transport": "auto", "zmq_threads": 1, "stats_out": "", "trace_keys": "",
        "shared_memory": True}
    args = parser.parse_args(["--sys.location_caches", "1", "--sys.transport=tcp", "--sys.nw_threads", "2", "--sys.stats.out",
                              "f", "--sys.trace.keys", "all", "--shared_memory", "off"])
    assert system_settings(args) == {"location_caches": True, "transport": "tcp", "zmq_threads": 2, "stats_out": "f",
                                     "trace_keys": "all", "shared_memory": False}
    assert system_settings(program_parser("p", "").parse_args([]))["shared_memory"] is True


def test_an_own_location_caches_option_turns_the_same_on(parser):
    parser.add_argument("--location_caches", type=boolean, default=False)
    assert system_settings(parser.parse_args(["--location_caches", "1"]))["location_caches"] is True
    assert system_settings(parser.parse_args(["--sys.location_caches", "1"]))["location_caches"] is True
    assert system_settings(parser.parse_args([]))["location_caches"] is False


@pytest.mark.parametrize("words", [["--rank", 2**31], ["--sampling.group_size", 2**24 + 1], ["--sampling.batch_size", 2**40],
                                   ["--sampling.reuse", 2**29], ["--sys.zmq_threads", 10**30]])
def test_numbers_that_are_too_large(parser, capsys, words):
    error = refused(parser, capsys, *map(str, words))
    assert error.startswith("usage: program") and f"{words[1]} is too large: the most is " in error


def test_a_pool_that_is_too_large(parser, capsys):
    assert "their product is at most 268435456" in refused(parser, capsys, "--sampling.group_size", "65536", "--sampling.reuse", "4097")


def test_limits_are_those_of_the_core(serve, parser):
    server = serve(1)
    settings = sampling_settings(parser.parse_args(["--sampling.group_size", "16777216", "--sampling.reuse", "16",
                                                    "--sampling.batch_size", "268435456"]))
    server.enable_sampling_support(**settings)


@pytest.mark.parametrize(("text", "value"), [("none", None), ("1.5", 1.5), ("1e300", 1e9)])
def test_seconds(text, value):
    assert seconds(text) == value


def test_seeds():
    assert seed("0") == 0 and seed(str(2**64 - 1)) == 2**64 - 1
    for text in "-1", str(2**64), "x":
        with pytest.raises(argparse.ArgumentTypeError):
            seed(text)


def test_sampling_settings(parser):
    assert sampling_settings(parser.parse_args(["--sampling.scheme", "pool", "--sampling.reuse", "4"])) == {
        "scheme": "pool", "group_size": 250, "reuse": 4, "postpone": False, "batch_size": 10_000, "with_replacement": True}


@pytest.mark.parametrize(("convert", "text"), [(boolean, "maybe"), (positive_int, "0"), (non_negative_int, "-1")])
def test_converters_say_what_is_wrong(convert, text):
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        convert(text)


def test_a_mistyped_option_is_named_rather_than_what_is_missing_then(capsys):
    parser = program_parser("p", "")
    parser.add_argument("--epochs", required=True)
    for line, said in ((["--epochz", "3"], "unrecognized arguments: --epochz"), ([], "required: --epochs"),
                       (["--epochs", "3", "--rank=2"], "unrecognized arguments: --rank=2")):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(line)
        assert end.value.code == 2 and said in capsys.readouterr().err
