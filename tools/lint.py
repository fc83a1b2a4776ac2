"""The rules of this code base that ruff does not know: `tools/lint.py` exits 1 and names each line that breaks one.

Each check takes the files to look at and yields findings. One that finds nothing to check is itself an error.
"""
import graphlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A lower layer never cimports a higher one; what is not named here is above all of these.
LAYERS = [{"_build", "_types", "_sync", "_zmq", "_wire"},
          {"_store", "_directory", "_transfers", "_operations", "_pins", "_trace", "_answers", "_counters", "_draws", "_here", "_turns",
           "_pool"},
          {"_sink"}, {"_node_state"}, {"_routing", "_schemes", "_sampling"}, {"_protocol"}, {"_van"}, {"_worker"}]

FORBIDDEN = re.compile(r"import\s+\w*[pP]ickle|\bpickle\.\w|from\s+\w*[pP]ickle\s|recv_pyobj|send_pyobj|(?<![\w.])(?:eval|exec)\("
                       r"|yaml\.load\b|shell\s*=\s*True|os\.system\(|os\.popen\(")


def files(*patterns):
    """The files of the tree that match; an error when a pattern matches none."""
    found = []
    for pattern in patterns:
        matches = sorted(path for path in ROOT.glob(pattern) if path.is_file())
        if not matches:
            sys.exit(f"lint: nothing to check: no file matches {pattern}")
        found += matches
    return found


def lines(path):
    """Numbered lines of a file, without comments."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        yield number, re.sub(r"(^|\s)#.*", "", line)


def name(path):
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def check_forbidden(paths):
    """No pickle, no eval, no shell."""
    for path in paths:
        for number, line in lines(path):
            if found := FORBIDDEN.search(line):
                yield f"{name(path)}:{number}: {found[0]!r} is forbidden here"


def check_exceptions(paths):
    """Every nogil function says what it does about errors: `noexcept nogil` or `except … nogil`."""
    for path in paths:
        for number, line in lines(path):
            if re.search(r"\)\s*nogil\b(?!.*except)", line):
                yield f"{name(path)}:{number}: a nogil function that is neither noexcept nor except"


def check_layers(paths):
    """No module cimports one of a higher layer, and no two modules cimport each other."""
    def layer(module):
        return next((i for i, modules in enumerate(LAYERS) if module in modules), len(LAYERS))

    graph = {}
    for path in paths:
        module = ".".join(path.relative_to(ROOT / "lapse").with_suffix("").parts)
        for number, line in lines(path):
            found = re.match(r"\s*(?:from\s+lapse\.([\w.]+)\s+cimport|cimport\s+lapse\.([\w.]+))", line)
            if not found or (target := found[1] or found[2]) == module:
                continue
            graph.setdefault(module, set()).add(target)
            if layer(target) > layer(module):
                yield f"{name(path)}:{number}: lapse.{module} cimports lapse.{target}, which is of a higher layer"
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield f"lapse: a circle of cimports: {' -> '.join(error.args[1])}"


def check_cython(paths):
    """Cython compiles each file, and gives no hint that a nogil call takes the GIL."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        def compile_one(numbered):
            number, path = numbered
            command = [sys.executable, "-m", "cython", "-3", "-I", str(ROOT), "-o", f"{folder}/{number}.c", name(path)]
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        for path, done in zip(paths, pool.map(compile_one, enumerate(paths)), strict=True):
            output = done.stdout + done.stderr
            hints = [line for line in output.splitlines() if "require the GIL" in line or "GIL to be acquired" in line]
            if done.returncode:
                yield f"{name(path)}: Cython fails:\n{output}"
            yield from dict.fromkeys(hints)


SOURCES = ["lapse/**/*.pyx", "lapse/**/*.pxd"]
CHECKS = {                             # check: what must be there to look at, and what is looked at where there is some
    check_forbidden: ([*SOURCES, "lapse/**/*.py", "apps/**/*.py", "tracker/**/*.py"], ["apps/**/*.pyx", "apps/**/*.pxd"]),
    check_exceptions: (SOURCES, ["apps/**/*.pyx", "apps/**/*.pxd"]),
    check_layers: (SOURCES, []),
    check_cython: (["lapse/**/*.pyx"], ["apps/**/*.pyx"]),
}


def main():
    findings = []
    for check, (required, optional) in CHECKS.items():
        paths = files(*required) + [path for pattern in optional for path in sorted(ROOT.glob(pattern))]
        found = list(check(paths))
        print(f"lint: {check.__name__.removeprefix('check_')}: {len(paths)} files, {len(found)} findings")
        findings += found
    print(*findings, sep="\n", end="\n" if findings else "")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
