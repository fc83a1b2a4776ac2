"""The documentation says what the code does: options, settings, environment, public names, files, links, examples."""
import argparse
import importlib.util
import inspect
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import lapse
import lapse.errors
from lapse import stats
from lapse._build import kind
from lapse.config import Config
from lapse.options import RESERVED, program_parser

if kind in ("asan", "tsan"):
    pytest.skip("the copy of the tree that the sanitizers use has no documentation", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bindings/*.md")])
FROM_ENVIRONMENT = {"role", "num_nodes", "root_host", "root_port", "token", "keys", "attempt", "rank_hint", "ipc_dir"}
PROGRAMS = {path.stem: path for path in sorted([*ROOT.glob("apps/*.py"), *ROOT.glob("tests/cluster/test_*.py")])
            if "__main__" in path.read_text(encoding="utf-8")}
TESTS = [name for name, path in PROGRAMS.items() if path.parent.name == "cluster"]
COMMON = {"--quick", "--seed", "--num_threads", "-t", "--num_iterations", "-i", "--shared_memory", "--dtype"}
LIBRARY = [path for path in sorted((ROOT / "lapse").rglob("*")) if path.suffix in (".py", ".pyx", ".pxd")]


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def section(name, heading):
    """The text below a heading, as far as the next of its level."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |\Z)", page(name), re.MULTILINE | re.DOTALL)
    assert found, f"{name} has no section {heading!r}"
    return found[2]


def rows(text):
    """The cells of all tables, row by row, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in lines]
    heads = {i - 1 for i, row in enumerate(cells) if all(set(cell.strip()) <= {"-", ":"} and cell.strip() for cell in row)}
    return [[cell.strip() for cell in row] for i, row in enumerate(cells) if i not in heads and i - 1 not in heads]


def code(text):
    return re.findall(r"`([^`\n]+)`", text)


def prose(text):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


# --- options ------------------------------------------------------------------------------------------------------------------

class _Built(Exception):
    pass


def catch(monkeypatch, build):
    """The parser that `build` makes and is about to use."""
    def stop(parser, *args, **kwargs):
        raise _Built(parser)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr("lapse.options._Parser.parse_args", stop)
        with pytest.raises(_Built) as caught:
            build()
    return caught.value.args[0]


def program(monkeypatch, name):
    """The parser of an application or a test program."""
    monkeypatch.syspath_prepend(str(PROGRAMS[name].parent))
    spec = importlib.util.spec_from_file_location(f"documented_{name}", PROGRAMS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return catch(monkeypatch, lambda: getattr(module, "parse", module.main)([]))


def shown(default):
    """A default as the tables write it."""
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default is None or default == [] else '""' if default == "" else str(default)


def options(parser, without=()):
    """{the spellings of an option: its default}"""
    return {tuple(sorted(action.option_strings)): shown(action.default) for action in parser._actions
            if action.option_strings and action.dest != "help" and not set(action.option_strings) & set(without)}


def documented(heading):
    found = {tuple(sorted(code(row[0]))): code(row[1])[0] for row in rows(section("docs/options.md", heading))}
    assert found
    return found


def system_options():
    return {name for action in program_parser("p", "")._actions for name in action.option_strings}


def test_system_and_sampling_options():
    assert {**documented("System options"), **documented("Sampling options")} == options(program_parser("p", ""))


def test_reserved_options():
    names = {name.removesuffix("*") for name in code(section("docs/options.md", "Options of later versions"))}
    assert names - {"--replicate"} == set(RESERVED)


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - set(TESTS)))
def test_options_of_an_application(monkeypatch, name):
    assert documented(name) == options(program(monkeypatch, name), system_options())


@pytest.mark.parametrize("name", TESTS)
def test_options_of_a_test_program(monkeypatch, name):
    told = {row[0].strip("`"): row[1] for row in rows(section("docs/options.md", "The test programs"))}
    assert sorted(told) == sorted(TESTS)
    parser = program(monkeypatch, name)
    own = options(parser, system_options() | COMMON)
    assert {option for names in own for option in names} == set(code(told[name]))
    for names, default in own.items():
        long = max(names, key=len)
        if default not in ("none", '""'):
            assert re.search(rf"`{long}`( `-\w`)? \({default}\)", told[name]), f"{long} has the default {default}"
    assert all(option in section("docs/options.md", "The test programs") for option in COMMON)


def test_options_of_the_launcher(monkeypatch):
    launcher = sys.modules["lapse.launch"]      # (`lapse.launch` is the function)
    monkeypatch.setattr(sys, "executable", "python")
    assert documented("The launcher") == options(catch(monkeypatch, lambda: launcher.main([])))
    assert "--num-workers" in section("docs/options.md", "The launcher")


def test_options_of_the_simulation():
    pytest.importorskip("greenlet")
    from lapse.testing.__main__ import parser
    from lapse.testing.simulation import FAULTS
    assert documented("The simulation") == options(parser())
    faults = {name for row in rows(section("docs/testing.md", "Faults: would it have been found?")) for name in code(row[0])}
    assert faults == set(FAULTS)


def test_settings():
    told = {name: code(row[1])[0] for row in rows(section("docs/options.md", "Settings of lapse.setup")) for name in code(row[0])}
    known = {f.name: repr(f.default).replace("'", '"') for f in fields(Config) if f.default is not MISSING}
    assert told == {name: default for name, default in known.items() if name not in FROM_ENVIRONMENT}
    assert set(known) >= FROM_ENVIRONMENT <= set(code(section("docs/options.md", "Settings of lapse.setup")))


# --- environment --------------------------------------------------------------------------------------------------------------

VARIABLE = re.compile(r"\b(?:DMLC|PS|LAPSE)_[A-Z][A-Z_]*\b")


def test_environment():
    told = {name for row in rows(page("docs/env.md")) for name in VARIABLE.findall(row[0])}
    read = set(re.findall(rf"[\"']({VARIABLE.pattern})[\"']", page("lapse/config.py")))
    build = set(re.findall(rf"environ\.get\(\"({VARIABLE.pattern})\"", page("setup.py")))
    assert read and build
    assert told == read | build


def test_variables_that_are_mentioned_exist():
    sources = "".join(path.read_text(encoding="utf-8") for path in [*LIBRARY, ROOT / "setup.py", ROOT / "Makefile"])
    for path in PAGES:
        assert set(VARIABLE.findall(path.read_text(encoding="utf-8"))) <= set(VARIABLE.findall(sources)), path.name


# --- the API ------------------------------------------------------------------------------------------------------------------

def public(cls):
    return {name for name in vars(cls) if not name.startswith("_")}


def calls(heading):
    """{name: its parameters, None for a property} out of the first column of a section's tables."""
    told = {}
    for row in rows(section("docs/api.md", heading)):
        for text in code(row[0]):
            if found := re.fullmatch(r"([a-z_]+)(?:\((.*)\))?", text):
                told[found[1]] = found[2]
    return told


def parameters(function):
    """The signature as the pages write it: names and defaults, without annotations."""
    written = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not any(w.startswith("*") for w in written):
            written.append("*")
        if p.name != "self":
            star = "**" if p.kind is p.VAR_KEYWORD else "*" if p.kind is p.VAR_POSITIONAL else ""
            default = "" if p.default is p.empty else f'="{p.default}"' if isinstance(p.default, str) else f"={p.default!r}"
            written.append(f"{star}{p.name}{default}")
    return ", ".join(name for name in written if name != "**options")       # (those take **{"async": …} alone)


@pytest.mark.parametrize(("heading", "cls"), [("Server", lapse.Server), ("Worker", lapse.Worker), ("Timestamp", lapse.Timestamp)])
def test_public_methods(heading, cls):
    told = calls(heading)
    assert set(told) == public(cls)
    for name, text in told.items():
        assert text == (parameters(getattr(cls, name)) if callable(getattr(cls, name)) else None), f"{heading}.{name}"


def test_public_names_of_the_module():
    told = calls("Module")
    for name in set(lapse.__all__) - {"Server", "Worker", "Timestamp"}:
        thing = getattr(lapse, name)
        if inspect.isfunction(thing):
            assert told[name] == parameters(thing), name
        else:
            assert name in code(section("docs/api.md", "Module")), name
    assert {"Server(...)", "Worker(...)"} <= set(code(section("docs/api.md", "Module")))
    assert set(told) <= set(lapse.__all__)


def test_errors():
    told = {code(row[0])[0]: row[1].split(", ") for row in rows(section("docs/api.md", "Errors")) if code(row[0]) and len(row) == 3}
    kinds = {name: thing for name, thing in vars(lapse.errors).items() if inspect.isclass(thing) and issubclass(thing, Exception)}
    assert told == {name: [base.__name__ for base in thing.__bases__] for name, thing in kinds.items()}


def test_statistics():
    told = {name for row in rows(section("docs/api.md", "Statistics")) for name in code(row[0])}
    assert told == {f.name for f in fields(stats.NodeStats)}


def test_c_level():
    told = code(section("docs/api.md", "C level"))
    methods = re.findall(r"^    cdef ([\w ]+ \w+)\(self(?:, )?(.*)\) noexcept nogil", page("lapse/_worker.pxd").split("# --- private")[0],
                         re.MULTILINE)
    assert methods
    assert {text for text in told if re.match(r"\w+ \w+\(", text)} == {
        f"{head}({arguments})" for head, arguments in methods}
    exported = set(re.findall(r"ERR_\w+|DONE|ACQUIRE_MAX", page("lapse/__init__.pxd")))
    assert {name for name in told if re.fullmatch(r"ERR_\w+|DONE|ACQUIRE_MAX", name)} == exported


def test_names_in_the_other_pages_exist():
    for path in PAGES:
        text = prose(path.read_text(encoding="utf-8"))
        for owner, name in re.findall(r"`(lapse|Server|Worker|lapse\.Worker|lapse\.Server)\.([a-z]\w*)", text):
            if (ROOT / "lapse" / name).exists() or (ROOT / "lapse" / f"{name}.py").exists():
                continue
            thing = lapse if owner == "lapse" else getattr(lapse, owner.removeprefix("lapse."))
            logger = owner == "lapse" and f'"lapse.{name}"' in "".join(p.read_text(encoding="utf-8") for p in LIBRARY)
            assert hasattr(thing, name) or logger, f"{path.name}: {owner}.{name}"


# --- files and links ----------------------------------------------------------------------------------------------------------

FOLDERS = r"lapse|apps|tests|tools|tracker|docs|benchmarks|examples|bindings|\.ci"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_are_named_exist(path):
    for text in code(path.read_text(encoding="utf-8")):
        for name in re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*<>-]*|[A-Z][\w.]*\.(?:md|cff)|Makefile|setup\.py)", text):
            name = name.rstrip(".")
            if not re.search(r"[*<]", name):
                assert (ROOT / name).exists(), f"{path.name} names {name}"


def anchors(path):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        other = path.parent / name if name else path
        assert other.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(other), f"{path.name} links to {target}"


def test_every_page_is_linked_from_the_readme():
    targets = re.findall(r"\]\(([^)#\s]+)", page("README.md"))
    assert {path.relative_to(ROOT).as_posix() for path in PAGES} - {"README.md"} <= set(targets)


def test_every_module_is_in_the_architecture():
    told = set(code(page("docs/architecture.md")))
    for path in LIBRARY:
        name = path.relative_to(ROOT).as_posix()
        private = path.name == "_version.py" or "testing" in path.parts
        also = path.suffix == ".pxd" and path.with_suffix(".pyx").exists()
        assert name in told or private or also, name


# --- examples -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("language", "name"), [("python", "examples/relocate.py"), ("cython", "examples/kernel.pyx")])
def test_the_examples_of_the_readme_are_files(language, name):
    assert re.findall(rf"^```{language}\n(.*?)^```", page("README.md"), re.MULTILINE | re.DOTALL) == [page(name)]
