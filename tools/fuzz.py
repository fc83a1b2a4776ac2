"""Fuzz what a node does with frames, by libFuzzer: `fuzz.py --executions 10000000 --seed 1`; design: tests/fuzz/_bed.pyx.

What the node is made of, and the beds, are compiled by clang for fuzzing, AddressSanitizer and UndefinedBehaviorSanitizer, in a tree of
their own (build/fuzz). The inputs to begin with are real messages (tests/fuzz/states.py). Exits 0 when every execution kept every promise,
and no sanitizer had anything to say. An input that broke one is kept in build/fuzz/found: give it to build/fuzz/target to see it again.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "fuzz"
CLANGS = ("clang-14", "clang", *(f"clang-{version}" for version in range(21, 14, -1)))
SANITIZERS = "-fsanitize=fuzzer,address,undefined"
OTHERS = ("tests/fuzz/target.cpp", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "lapse/_version.py")
INPUT = 4096                    # bytes of the longest input
OPTIONS = {"ASAN_OPTIONS": "allocator_may_return_null=1:quarantine_size_mb=32", "UBSAN_OPTIONS": "print_stacktrace=1",
           "PYTHONMALLOC": "malloc"}


def find_clang() -> str | None:
    """A clang that has libFuzzer, or None."""
    for name in filter(None, (os.environ.get("CLANG"), *CLANGS)):
        path = shutil.which(name)
        if path is None:
            continue
        asked = subprocess.run([path, "-print-file-name=libclang_rt.fuzzer-x86_64.a" if os.uname().machine == "x86_64" else
                                f"-print-file-name=libclang_rt.fuzzer-{os.uname().machine}.a"], capture_output=True, text=True, check=False)
        if Path(asked.stdout.strip()).is_absolute():
            return path
    return None


def needed() -> list[Path]:
    """The .pyx that the beds use, and what those use."""
    found: set[Path] = set()
    ahead = sorted((ROOT / "tests" / "fuzz").glob("*.pyx"))
    while ahead:
        path = ahead.pop()
        found.add(path)
        text = "".join(each.read_text(encoding="utf-8") for each in (path, path.with_suffix(".pxd")) if each.exists())
        for module in re.findall(r"^from (lapse\.\w+) c?import", text, re.MULTILINE):
            other = ROOT / (module.replace(".", "/") + ".pyx")
            if other.exists() and other not in found:
                ahead.append(other)
    return sorted(found)


def copy(source: Path) -> None:
    target = TREE / source.relative_to(ROOT)
    if not target.exists() or target.read_bytes() != source.read_bytes():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


def build(clang: str) -> None:
    wanted = [*needed(), *ROOT.glob("lapse/*.pxd"), *ROOT.glob("tests/fuzz/*.p*"), *(ROOT / name for name in OTHERS)]
    kept = {TREE / path.relative_to(ROOT) for path in wanted}
    for path in [*TREE.glob("lapse/*.p*"), *TREE.glob("tests/fuzz/*.p*")]:
        if path not in kept and path.name != "__init__.py":
            path.unlink()
    for path in wanted:
        copy(path)
    (TREE / "lapse" / "__init__.py").write_text('"""The core alone."""\n')
    environment = {**os.environ, "CC": clang, "LDSHARED": f"{clang} -shared", "LAPSE_BUILD": "fuzz", "LAPSE_ROOTS": "lapse tests"}
    environment.pop("LAPSE_WERROR", None)
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=TREE, env=environment, check=True)
    get = sysconfig.get_config_var
    subprocess.run([clang, "-g", "-O1", SANITIZERS, "-fno-sanitize=function", "-rdynamic",
                    f'-DFUZZ_PYTHON="{sys.executable}"', f'-DFUZZ_TREE="{TREE}"',
                    f"-I{sysconfig.get_path('include')}", "tests/fuzz/target.cpp", "-o", "target", f"-L{get('LIBDIR')}",
                    f"-Wl,-rpath,{get('LIBDIR')}", f"-lpython{get('LDVERSION')}", *get("LIBS").split(), *get("SYSLIBS").split()],
                   cwd=TREE, check=True)


def run(arguments, process: int) -> tuple[subprocess.Popen, Path]:
    log = TREE / f"log-{process}"
    executions = -(-arguments.executions // arguments.processes)
    command = [str(TREE / "target"), f"-runs={executions}", f"-seed={arguments.seed + process}", f"-max_len={INPUT}", "-timeout=10",
               f"-rss_limit_mb={arguments.rss_mb}", f"-malloc_limit_mb={arguments.malloc_mb}", "-detect_leaks=1", "-print_final_stats=1",
               f"-artifact_prefix={TREE}/found/", "-reload=0" if arguments.processes == 1 else "-reload=30", *arguments.more,
               str(TREE / "corpus")]
    if arguments.seconds:
        command.insert(1, f"-max_total_time={arguments.seconds}")
    with log.open("w") as output:
        return subprocess.Popen(command, cwd=TREE, env={**os.environ, **OPTIONS}, stdout=output, stderr=subprocess.STDOUT), log


def number(log: str, name: str) -> int:
    found = re.findall(rf"stat::{name}:\s*(\d+)", log)
    return int(found[-1]) if found else 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="tools/fuzz.py", description=__doc__.splitlines()[0])
    parser.add_argument("--executions", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=0, help="stop after so long, whatever has been done")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rss-mb", type=int, default=1024, help="the limit of a process's memory")
    parser.add_argument("--malloc-mb", type=int, default=64, help="the limit of one piece of memory")
    parser.add_argument("--if-possible", action="store_true", help="without a clang with libFuzzer, do nothing")
    parser.add_argument("--fresh", action="store_true", help="forget the inputs that earlier runs found")
    parser.add_argument("more", nargs="*", help="more options for libFuzzer, after --")
    arguments = parser.parse_args(argv)
    clang = find_clang()
    if clang is None and arguments.if_possible:
        print("fuzz: left out, there is no clang with libFuzzer")
        return 0
    if clang is None:
        print("fuzz: needs a clang with libFuzzer (Debian: clang-14 and libclang-rt-14-dev); CLANG names it", file=sys.stderr)
        return 2
    build(clang)
    if arguments.fresh:
        shutil.rmtree(TREE / "corpus", ignore_errors=True)
    (TREE / "found").mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-m", "tests.fuzz.states", str(TREE / "corpus")], cwd=ROOT, check=True)
    started = time.monotonic()
    runs = [run(arguments, process) for process in range(arguments.processes)]
    try:
        codes = [process.wait() for process, _ in runs]
    except BaseException:
        for process, _ in runs:
            process.terminate()
        raise
    took = time.monotonic() - started
    logs = [log.read_text(errors="replace") for _, log in runs]
    for code, log in zip(codes, logs, strict=True):
        if code:
            print(log[-6000:])
    done = sum(number(log, "number_of_executed_units") for log in logs)
    cover = max((int(match) for log in logs for match in re.findall(r"cov: (\d+)", log)), default=0)
    failed = sum(code != 0 for code in codes)
    counted = [pair for log in logs for pair in re.findall(r"fuzz: (\d+) frames accepted, (\d+) refused", log)]
    frames = [sum(int(pair[at]) for pair in counted) for at in (0, 1)]
    print(f"fuzz: {done:,} executions, seed {arguments.seed}, {done / took:,.0f}/s; {frames[0]:,} frames accepted, {frames[1]:,} refused; "
          f"{cover} edges, {len(list((TREE / 'corpus').iterdir()))} inputs, {max(number(log, 'peak_rss_mb') for log in logs)} MB; "
          f"{'nothing found' if not failed else f'{failed} processes found something: build/fuzz/found'}")
    return 1 if failed or done == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
