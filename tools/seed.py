"""`make seed`: every command of the README, and those that scripts of the C++ system came with, on a clean clone; results are checked.

Clones HEAD into build/seed/tree, and runs each command there in a shell, with this Python first on the path and lapse as if it were
installed. One line per command; goes on after a failure, keeps what each one wrote in build/seed, and names all failures at the end:
exit code 1 if there were any. Commands of the README that have no check here (`make demo`, which fetches its data) are run by the tests
of the README.
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
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import readme

FOLDER = readme.ROOT / "build" / "seed"
TIMEOUT = 600           # seconds for one command
SHOWN = 15              # last lines of a failed one

Check = Callable[[str], None]       # of the text that a command wrote; raises AssertionError with what is wrong


def says(*patterns: str, count: int = 1) -> Check:
    """Each pattern is a whole line, in so many lines (count), but for the launcher's prefix."""
    def check(text: str) -> None:
        lines = [re.sub(r"^\[node \d+\] ", "", line) for line in text.splitlines()]
        for pattern in patterns:
            found = sum(re.fullmatch(pattern, line) is not None for line in lines)
            assert found == count, f"{found} lines are {pattern!r}, not {count}"
    return check


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def both(*checks: Check) -> Check:
    def check(text: str) -> None:
        for each in checks:
            each(text)
    return check


def falls(pattern: str, length: int, factor: float = 1.0) -> Check:
    """The numbers that the pattern finds fall all the time, in the end below factor times the first."""
    def check(text: str) -> None:
        found = numbers(pattern, text)
        assert len(found) == length, f"{len(found)} numbers of {pattern!r}, not {length}"
        assert found == sorted(set(found), reverse=True) and found[-1] < factor * found[0], f"{pattern!r} does not fall: {found}"
    return check


def learned(text: str) -> None:
    """Far better than the untrained model, whose MRR among 280 entities is below 0.03."""
    found = numbers(r"epoch 4: (?:valid|test): MRR (\d\.\d+)", text)
    assert len(found) == 2 and min(found) >= 0.5, f"MRR after 4 epochs: {found}"


def trained(text: str) -> None:
    found = re.findall(r"loss (\S+) -> (\S+)", text)
    assert all(float(last) < 0.4 * float(first) for first, last in found), f"losses: {found}"


def sums(nodes: int) -> Check:
    """Every worker's every sum is the expected one."""
    def check(text: str) -> None:
        found = re.findall(r"key \d+: sum (\S+) = expected (\S+)", text)
        assert found and all(got == wanted for got, wanted in found), "a sum is not the expected one"
        says(*(rf"node {node} simple: OK \({nodes} nodes x .*\)" for node in range(nodes)))(text)
    return check


def total(nodes: int, workers: int) -> Check:
    def check(text: str) -> None:
        found = re.findall(r"total (\d+) = expected (\d+)", text)
        assert len(found) == nodes * workers and len(set(found)) == 1 and found[0][0] == found[0][1], f"totals: {found}"
        says(*(rf"node {node} test_dynamic_allocation: OK \({nodes} nodes .*, 0 wrong\)" for node in range(nodes)))(text)
    return check


def relocated(nodes: int) -> Check:
    """What examples/relocate.py and its twin in Cython print: every node has pushed [1, 2]."""
    def check(text: str) -> None:
        words = re.sub(r"[\[\],]", " ", re.sub(r"^\[node \d+\] ", "", text, flags=re.MULTILINE))
        lines = [line.split() for line in words.splitlines()]
        for word in ("pulled", "localized"):
            found = [line[1:] for line in lines if line and line[0] == word]
            assert found == nodes * [3 * [f"{nodes}.0", f"{2 * nodes}.0"]], f"{word}: {found}"
    return check


def usage(*options: str) -> Check:
    def check(text: str) -> None:
        assert text.startswith("usage: "), "no usage"
        for option in options:
            assert re.search(rf"(?<![\w-]){option}\b", text), f"{option} is not in the help"
    return check


def built(*names: str) -> Check:
    def check(text: str) -> None:
        assert "warning:" not in text, "the compiler warns"
        for name in names:
            assert next((FOLDER / "tree").glob(name), None), f"{name} has not been built"
    return check


LOCAL = r"python tracker/dmlc_local\.py"
CHECKS: list[tuple[str, Check]] = [
    (r"make", built("build/apps/*", "build/tests/*", "lapse/worker.*.so")),
    (r"make ps", built("lapse/worker.*.so")),
    (r"make( -j \d+)? tests/test_dynamic_allocation", built("build/tests/test_dynamic_allocation", "tests/cluster/_consistency.*.so")),
    (r"make apps/simple", built("build/apps/simple")),
    (r"make apps/matrix_factorization", built("build/apps/matrix_factorization", "apps/mf/_kernel.*.so")),
    (r"make apps/knowledge_graph_embeddings", built("build/apps/knowledge_graph_embeddings", "apps/kge/_kernel.*.so")),
    (r"make apps/word2vec", built("build/apps/word2vec", "apps/w2v/_kernel.*.so")),
    (r"make help", lambda text: says(r"  make all +\S.*", r"  make seed +\S.*")(text)),
    (r"python -m lapse", says(r"lapse: +\d\S*", r"build: +release .*")),
    (r"python examples/relocate\.py", relocated(1)),
    (r"python -m lapse run -s 3 python examples/relocate\.py", relocated(3)),
    (r"cythonize -q -i examples/kernel\.pyx", built("examples/kernel.*.so")),
    (r"python examples/relocate_in_cython\.py", relocated(1)),
    (r"python -m lapse run -s 3 python examples/relocate_in_cython\.py", relocated(3)),
    (rf"{LOCAL} -s 1 build/apps/simple", sums(1)),
    (rf"{LOCAL} -s 3 build/apps/simple -v 5 -i 10 -k 14 -t 4", sums(3)),
    (r"build/apps/simple --help", usage("-v", "-i", "-k", "-t", r"--sys\.location_caches")),
    (r"build/apps/matrix_factorization --help", usage("--dataset", "--num_rows", "--epochs")),
    (r"build/apps/knowledge_graph_embeddings --help", usage("--dataset", "--num_entities", "--embed_dim")),
    (r"build/apps/word2vec --help", usage("--input_file", "--num_keys", "--window")),
    (r"build/tests/test_dynamic_allocation --help", usage("-i", "--quick")),
    (rf"{LOCAL} --help", usage("-s", "-n")),
    (r"python tracker/dmlc_ssh\.py --help", usage("-s", "-n", "-H", "--sync-dir")),
    (rf"{LOCAL} -s 2 build/apps/matrix_factorization .*--epochs 10",
     both(falls(r"epoch \d+: .*?loss (\S+)", 11, 0.9), says(r"matrix_factorization: OK \(2 nodes x .*, 10 epochs, .*\)"))),
    (rf"{LOCAL} -s 2 build/apps/knowledge_graph_embeddings .*--num_epochs 4 .*",
     both(learned, falls(r"epoch \d+: .*?loss (\S+),", 4, 0.5), says(r"knowledge_graph_embeddings: OK \(2 nodes x .*\)"))),
    (rf"{LOCAL} -s 2 build/apps/word2vec .*--num_iterations 4 .*",
     both(falls(r"epoch \d+: .*?loss (\S+),", 4), says(r"word2vec: OK \(2 nodes x 2 workers, 4 epochs, .*\)"))),
    (rf"{LOCAL} -s 4 build/tests/test_dynamic_allocation", total(4, 2)),
    (r"python -m lapse run -s 2 python bindings/embedding\.py", both(trained, says(r"node \d: loss .*", count=2))),
    (r"python bindings/example\.py", says(*(rf"node {node} worker {worker}: OK" for node in range(4) for worker in range(2)),
                                          r"bindings: OK \(4 nodes x 2 workers\)")),
]
# What the README does not have line by line.
MORE = ["make help", "build/apps/matrix_factorization --help", "build/apps/knowledge_graph_embeddings --help", "build/apps/word2vec --help",
        "build/tests/test_dynamic_allocation --help", "python tracker/dmlc_local.py --help", "python tracker/dmlc_ssh.py --help", "make"]


def bare(command: str) -> str:
    """A command without its comment."""
    return command.split("  #")[0].strip()


def check_of(command: str) -> Check | None:
    """How the result of a command is checked; None: nobody does."""
    return next((check for pattern, check in CHECKS if re.fullmatch(pattern, bare(command))), None)


def plan() -> list[str]:
    """The commands, each once, in the order of the README; the core comes first, since its examples need it."""
    return list(dict.fromkeys(["make ps", *(line for line in readme.commands() if check_of(line)), *MORE]))


def clone(tree: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)
    tree.parent.mkdir(parents=True, exist_ok=True)
    if not (readme.ROOT / ".git").exists():
        sys.exit(f"seed: {readme.ROOT} is no git repository, so there is nothing to clone; run it in one")
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(readme.ROOT), str(tree)], check=True)


def environment(tree: Path) -> dict[str, str]:
    passed = {name: value for name, value in os.environ.items()
              if not name.startswith(("DMLC_", "LAPSE_", "PS_", "MAKE", "MFLAGS", "GNUMAKEFLAGS"))}
    return {**passed, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "PYTHON": sys.executable,
            "PYTHONPATH": str(tree)}


def run(command: str, tree: Path, log: Path) -> str:
    """Run one command, its words in `log`; return what is wrong, or nothing."""
    check = check_of(command)
    assert check is not None, f"no check for {command}"
    with log.open("wb") as output:
        process = subprocess.Popen(["bash", "-euo", "pipefail", "-c", command], cwd=tree, env=environment(tree), stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            return f"did not end in {TIMEOUT} s"
        finally:
            with contextlib.suppress(ProcessLookupError):       # also what it has left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        return f"exit code {code}"
    try:
        check(log.read_text("utf-8", "replace"))
    except AssertionError as error:
        return str(error)
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="seed.py", description="Run the README's commands on a clean clone, and check what they print.")
    parser.add_argument("only", nargs="*", help="commands that contain one of these words; without any, all")
    options = parser.parse_args(arguments)
    chosen = [command for command in plan() if not options.only or any(word in command for word in options.only)]
    if not chosen:
        parser.error(f"no command contains {' or '.join(options.only)}")
    tree, begun, failed = FOLDER / "tree", time.monotonic(), []
    shutil.rmtree(FOLDER, ignore_errors=True)
    clone(tree)
    for number, command in enumerate(chosen):
        log, start = FOLDER / f"{number:02}.log", time.monotonic()
        wrong = run(command, tree, log)
        print(f"{'FAILED' if wrong else 'ok':6} {time.monotonic() - start:6.1f} s  {command}", flush=True)
        if wrong:
            failed.append((command, wrong, log))
            last = log.read_text("utf-8", "replace").splitlines()[-SHOWN:] if log.exists() else []
            print("".join(f"         | {line}\n" for line in last) + f"         {wrong}", flush=True)
    for command, wrong, log in failed:
        print(f"seed: failed: {command}: {wrong} (see {log.relative_to(readme.ROOT)})")
    print(f"seed: {len(chosen) - len(failed)} passed, {len(failed)} failed in {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
