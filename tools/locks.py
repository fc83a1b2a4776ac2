"""Is each lock needed, and would a test notice that it is missing? `tools/locks.py` takes them out, one at a time.

The record is tests/locks.py: what each lock guards, which lines make it, and the test that fails without it. Here the tree is copied to
build/locks/release and build/locks/tsan, the lines of every row are put under a switch (the environment variable WITHOUT_LOCK holds the
number of the row whose lock is off), and each copy is built once. Then each row's test runs twice: with all locks, when it has to pass,
and without the one, when it has to fail, with a report of ThreadSanitizer or with an end that is no test's; a race gets several tries.

    tools/locks.py             the whole table; exit code 1 if a removal is not noticed, a line is not there, or a test fails by itself
    tools/locks.py --check     only whether all lines are there, every lock of the sources has a row, and every test exists
    tools/locks.py 3 channel   only rows by number or by a part of their name
"""
import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.locks import NOT_ROWS, ROWS  # noqa: E402

BUILT = ROOT / "build" / "locks"
TREE = ["Makefile", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "lapse", "apps", "tests", "tracker", "tools",
        "benchmarks", "examples", "bindings"]
PARTS = ["ps", "tests", *(f"build/stamps/{part}" for part in ("tests-cluster", "tests-ext", "tests-unit", "apps-mf"))]
LEFT_OUT = shutil.ignore_patterns("*.so", "*.c", "__pycache__", ".pytest_cache")
DEADLINE = 180                  # seconds for a test; one that hangs without its lock is noticed, too

# In the copy only: which row is off. Read when a module is loaded, before any thread can ask.
SWITCH_C = '''
cdef extern from *:
    """
    #ifndef LAPSE_WITHOUT_H
    #define LAPSE_WITHOUT_H
    #include <stdlib.h>
    static int lapse_without;
    __attribute__((constructor)) static void lapse_read_without(void) {
        const char *text = getenv("WITHOUT_LOCK");
        lapse_without = text ? atoi(text) : 0;
    }
    static inline int lapse_gone(int row) { return row == lapse_without; }
    static inline int64_t lapse_plain_add(int64_t *p, int64_t v) { return *p += v; }
    #endif
    """
    bint gone "lapse_gone"(int) noexcept nogil
    int64_t plain_add "lapse_plain_add"(int64_t*, int64_t) noexcept nogil
'''
SWITCH_PYTHON = '''
class Nothing:
    """In the place of a Lock, an RLock, the lock of a Condition, or an Event."""

    def set(self):
        pass

    def is_set(self):
        return False

    def wait(self, timeout=None):
        return False

    def acquire(self, *args, **kwargs):
        return True

    def release(self):
        pass

    def locked(self):
        return False

    def __enter__(self):
        return True

    def __exit__(self, *what):
        pass

    def _is_owned(self):
        return True

    def _release_save(self):
        return None

    def _acquire_restore(self, state):
        pass
'''

# What makes a lock, a fence, a hand-off: each line of the sources that has one belongs to a row, or to NOT_ROWS with the reason.
C_LOCKS = re.compile(r"\b(pthread_mutex_(?:un)?lock|fence|cas_u64|swap_i32|set_once_i32|store_[iu]\d+|add_[iu]\d+|poke_u16"
                     r"|sink\.(?:un)?lock|self\.(?:un)?lock|_lock)\(")
PYTHON_LOCKS = re.compile(r"threading\.(?:Lock|RLock|Condition|Event|Semaphore|Barrier)\(|flock\(|SimpleQueue\(|deque\(")
DECLARATION = re.compile(r"^\s*(?:from|import|c?def|int|static|[a-z0-9_]+ [a-z0-9_]+ \"|#define)\b|import|noexcept nogil")
SOURCES = ["lapse/*.pyx", "lapse/*.pxd", "lapse/*.py", "apps/**/*.py", "apps/**/*.pyx", "tracker/*.py"]


def lock_lines():
    """(path, number, line) of every line that makes or takes a lock."""
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            wanted = PYTHON_LOCKS if path.suffix == ".py" else re.compile(f"{C_LOCKS.pattern}|{PYTHON_LOCKS.pattern}")
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                code = re.sub(r"(^|\s)#.*", "", line)
                if wanted.search(code) and not DECLARATION.search(code):
                    yield path.relative_to(ROOT).as_posix(), number, line


def without(text, row, path):
    """The text of a file with a row's lines taken out for good."""
    for cut in row.cuts:
        if cut.path == path:
            text = re.sub(rf"(?m)^ *{re.escape(cut.old)}[^\n]*\n" if cut.whole_lines else re.escape(cut.old), cut.new or "", text)
    return text


def switched(text, path, row, cut, where=None):
    """The text with one cut under its switch; ValueError when its lines are not there."""
    old, new = cut.old, cut.new
    pattern = rf"(?m)^(?P<indent> *)(?P<code>{re.escape(old)})(?P<comment>[^\n]*)$" if cut.whole_lines else re.escape(old)
    found = re.findall(pattern, text)
    if len(found) != cut.times:
        raise ValueError(f"{path}: {old!r} is there {len(found)} times, not {cut.times}")
    python = path.endswith(".py")
    gone = f'__import__("os").environ.get("WITHOUT_LOCK") == "{row.number}"' if python else f"gone({row.number})"
    nothing = '__import__("lapse._without", fromlist=["Nothing"]).Nothing()'

    def replaced(match):
        if where is not None:
            where.update(range(text.count("\n", 0, match.start()) + 1, text.count("\n", 0, match.end()) + 2))
        if not cut.whole_lines:
            return new.replace("GONE", gone).replace("NOTHING", nothing)
        indent, code, comment = match["indent"], match["code"], match["comment"]
        if new is None:
            return f"{indent}if not {gone}: {code}{comment}"
        return f"{indent}if {gone}: {new}\n{indent}else: {code}{comment}"

    return re.sub(pattern, replaced, text)


def sources_with_switches():
    """{path: text} of the files that a row cuts."""
    texts, problems = {}, []
    for row in ROWS:
        for cut in row.cuts:
            text = texts.get(cut.path) or (ROOT / cut.path).read_text(encoding="utf-8")
            try:
                found = switched(text, cut.path, row, cut)
                if row.under != "text":
                    texts[cut.path] = found
            except ValueError as error:
                problems.append(f"row {row.number} ({row.name}): {error}")
    for path, text in texts.items():
        if path.endswith("_sync.pxd"):
            texts[path] = text + SWITCH_C
        elif path.endswith((".pyx", ".pxd")):
            texts[path] = re.sub(r"(?m)^(?=from |cimport |import )", "from lapse._sync cimport gone, plain_add\n", text, count=1)
    sync = "lapse/_sync.pxd"
    if sync not in texts:
        texts[sync] = (ROOT / sync).read_text(encoding="utf-8") + SWITCH_C
    texts["lapse/_without.py"] = SWITCH_PYTHON
    return texts, problems


def uncovered():
    """Lines that make a lock, and belong to no row."""
    covered = {}
    for row in ROWS:
        for cut in row.cuts:
            where = covered.setdefault(cut.path, set())
            with contextlib.suppress(ValueError):       # said by others
                switched((ROOT / cut.path).read_text(encoding="utf-8"), cut.path, row, cut, where)
    for path, number, line in lock_lines():
        if number not in covered.get(path, ()) and not any(path == p and part in line for p, part, _ in NOT_ROWS):
            yield f"{path}:{number}: no row has this line: {line.strip()}"


def unknown_tests():
    """Tests of rows that are not there."""
    for row in ROWS:
        path, _, name = row.test.partition("::")
        function = name.partition("[")[0]
        if not (ROOT / path).is_file() or f"def {function}(" not in (ROOT / path).read_text(encoding="utf-8"):
            yield f"row {row.number} ({row.name}): there is no test {row.test}"


def check():
    """All that can be said without building."""
    numbers = [row.number for row in ROWS]
    problems = [] if numbers == sorted(set(numbers)) else ["the rows' numbers are not in order, or not different"]
    for path, part, _ in NOT_ROWS:
        if part not in (ROOT / path).read_text(encoding="utf-8"):
            problems.append(f"{path}: {part!r}, which needs no row, is not there")
    return problems + sources_with_switches()[1] + list(uncovered()) + list(unknown_tests())


def write_if_other(path, text):
    """Write a file, but leave it alone (and what depends on it unbuilt) when it is the same."""
    data = text if isinstance(text, bytes) else text.encode()
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def build(kind):
    """Bring the copy for a kind of build up to date."""
    copy = BUILT / kind
    texts = sources_with_switches()[0] if kind != "text" else {}
    wanted = set()
    for name in TREE:
        source = ROOT / name
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            relative = path.relative_to(ROOT)
            if path.is_file() and not LEFT_OUT(str(path.parent), list(relative.parts)):
                wanted.add(relative.as_posix())
                write_if_other(copy / relative, texts.get(relative.as_posix(), path.read_bytes()))
                (copy / relative).chmod(path.stat().st_mode)
    if kind == "text":
        return
    write_if_other(copy / "lapse/_without.py", texts["lapse/_without.py"])
    for path in copy.glob("lapse/**/*.p[yx]*"):
        if path.relative_to(copy).as_posix() not in wanted | {"lapse/_without.py"}:
            path.unlink()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    print(f"locks: building build/locks/{kind}", flush=True)
    done = subprocess.run(["make", "-C", str(copy), f"PYTHON={sys.executable}", f"LAPSE_BUILD={kind}", *PARTS], env=environment,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}locks: build/locks/{kind} cannot be built")


def library(name):
    return subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def run(row, number):
    """Run a row's test with the lock of that number off (0: none). What was noticed, "" for nothing."""
    copy = BUILT / row.under
    if row.under == "text":             # whole, but for the row's lines
        for path in {cut.path for other in ROWS for cut in other.cuts}:
            text = (ROOT / path).read_text(encoding="utf-8")
            write_if_other(copy / path, without(text, row, path) if number else text)
    environment = {**os.environ, "WITHOUT_LOCK": str(number), "PYTHONDONTWRITEBYTECODE": "1"}
    reports = copy / "build" / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    if row.under == "tsan":
        environment["LD_PRELOAD"] = f"{library('libtsan.so')} {library('libstdc++.so.6')}"
        environment["TSAN_OPTIONS"] = f"suppressions={copy}/tests/tsan.supp die_after_fork=0 exitcode=66 log_path={reports}/report"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-q", row.test]
    with (copy / "build" / "output").open("w+b") as output:
        process = subprocess.Popen(command, cwd=copy, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            code = process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if any(reports.iterdir()):
        return "ThreadSanitizer"
    if code is None:
        return "hangs"
    return "" if code == 0 else f"died of signal {-code}" if code < 0 else "fails" if code == 1 else f"ended with code {code}"


def take_out(row, passed):
    """(what was noticed, tries, seconds) of a row; the test has to pass with all locks."""
    start = time.monotonic()
    if (row.test, row.under) not in passed:
        wrong = run(row, 0)
        passed[row.test, row.under] = wrong
    if passed[row.test, row.under]:
        return f"WRONG: {passed[row.test, row.under]} with all locks", 0, time.monotonic() - start
    for attempt in range(1, row.tries + 1):
        noticed = run(row, row.number)
        if noticed:
            return noticed, attempt, time.monotonic() - start
    return "not noticed, as known" if row.unnoticed else "NOT NOTICED", row.tries, time.monotonic() - start


def table():
    """The rows as docs/testing.md has them."""
    lines = ["| lock | guards | test that fails without it |", "|---|---|---|"]
    for row in ROWS:
        under = {"tsan": ", under ThreadSanitizer", "text": ", which reads the source"}.get(row.under, "")
        path, _, name = row.test.partition("::")
        test = f"`{Path(path).stem}::{name}`{under}" if not row.unnoticed else f"none so far: {row.unnoticed}"
        lines.append(f"| {row.number} {row.name} | {row.guards} | {test} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="tools/locks.py", description="Take out each lock, and see that its test fails.")
    parser.add_argument("rows", nargs="*", help="numbers, or parts of names (default: all)")
    parser.add_argument("--check", action="store_true", help="build and run nothing")
    parser.add_argument("--table", action="store_true", help="print the table of docs/testing.md")
    options = parser.parse_args()
    if options.table:
        print(table())
        return 0
    problems = check()
    print(*(f"locks: {problem}" for problem in problems), sep="\n", end="\n" if problems else "")
    if problems or options.check:
        return 1 if problems else 0
    rows = [row for row in ROWS if not options.rows or any(word == str(row.number) or (not word.isdecimal() and word in row.name)
                                                          for word in options.rows)]
    if not rows:
        sys.exit("locks: no such row")
    for kind in sorted({row.under for row in rows}):
        build(kind)
    passed, wrong, known = {}, 0, 0
    for row in rows:
        noticed, tries, seconds = take_out(row, passed)
        wrong += noticed.startswith(("WRONG", "NOT"))
        known += noticed.startswith("not")
        print(f"{row.number:3} {row.name:44} {row.under:8} {noticed:22} {'' if tries < 2 else f'try {tries}':6} {seconds:5.0f} s  "
              f"{row.test}", flush=True)
    print(f"locks: {len(rows)} removals, {len(rows) - wrong - known} noticed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
