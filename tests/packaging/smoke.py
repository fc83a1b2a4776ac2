"""Tries an installed Lapse as its user would, without a compiler: `PYTHON tests/packaging/smoke.py`; exit code 0 when all is right.

PYTHON is that of an environment with nothing but the wheel and what it needs. Runs in a temporary folder, with no other program on PATH
than those of that environment. Needs no pytest; this is also the test command of cibuildwheel.
"""
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BIN = Path(sys.executable).parent
ENVIRONMENT = {**{name: value for name, value in os.environ.items() if not name.startswith(("LAPSE_", "DMLC_", "PYTHON", "PIP_"))},
               "PATH": str(BIN), "CC": "/bin/false", "CXX": "/bin/false"}
SCRIPT = """
import lapse
lapse.setup(10, 1)
with lapse.Server(2) as server:
    kv = lapse.Worker(0, server)
    kv.push([1, 3], [[1, 2], [3, 4]])
    kv.barrier()
    kv.localize([1, 3])
    print("sum", kv.pull([1, 3]).sum())
    kv.finalize()
"""
TOYS = {
    "mf": ["-d", "{data}/mf", "-r", "2", "-e", "10"],
    "kge": ["--dataset", "{data}/kge", "--num_entities", "280", "--num_relations", "112", "--num_epochs", "2", "--embed_dim", "10"],
    "word2vec": ["--input_file", "{data}/lm/small.txt", "--num_keys", "4970", "--embed_dim", "10", "--num_iterations", "1", "--data_words",
                 "10000", "--write_results", "0"],
}


def run(*command, code=0):
    """Run a command line; return what it printed. The job goes in a process group of the launcher's own making."""
    done = subprocess.run([str(word) for word in command], env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=180, check=False)
    if done.returncode != code:
        sys.exit(f"smoke: exit code {done.returncode} of {' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def expect(condition, what):
    if not condition:
        sys.exit(f"smoke: {what}")


def check_files():
    """What is installed, and what is not."""
    package = Path(run("python", "-c", "import lapse; print(lapse.__path__[0])").strip())
    expect(package.parent.name in ("site-packages", "dist-packages"), f"lapse is imported from {package}, not from an installed wheel")
    for name in "__init__.pxd", "_worker.pxd", "_types.pxd", "py.typed", "_worker.pyi", "worker.pyi":
        expect((package / name).is_file(), f"{package / name} is missing")
    expect(not (package.parent / "lapse.libs").exists(), "libraries were copied into the wheel; lapse uses pyzmq's libzmq")
    expect(run("python", "-c", "import importlib.util; print(importlib.util.find_spec('apps'))").strip() == "None",
           "the wheel has a package called apps")
    scripts = {entry.name for entry in importlib.metadata.distribution("lapse").entry_points if entry.group == "console_scripts"}
    expect(scripts == {"lapse-mf", "lapse-kge", "lapse-word2vec"}, f"the entry points are {sorted(scripts)}")


def check_jobs():
    """A script on two nodes, and each application in both spellings."""
    expect("release (" in run("python", "-m", "lapse"), "this is no release build")
    Path("script.py").write_text(SCRIPT)
    output = run("python", "-m", "lapse", "run", "-s", "2", "python", "script.py")
    expect(output.count("sum 20.0") == 2, f"the script printed\n{output}")
    data = run("python", "-m", "lapse", "data").strip()
    for name, words in TOYS.items():
        arguments = [word.format(data=data) for word in words]
        for command in [f"lapse-{name}"], ["python", "-m", "lapse", name]:
            output = run("python", "-m", "lapse", "run", "-s", "2", *command, *arguments, *(
                ["--read_partitioned_dataset", "0"] if name == "kge" and command[0] == "python" else []))
            expect("OK (2 nodes x" in output, f"{command} printed\n{output}")


def main():
    if importlib.util.find_spec("lapse") is None:
        sys.exit(f"smoke: lapse is not installed for {sys.executable}")
    compilers = [name for name in ("cc", "gcc", "clang", "c++") if shutil.which(name, path=str(BIN))]
    expect(not compilers, f"{BIN} has {compilers}")
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="lapse-smoke-") as folder:
        os.chdir(folder)
        try:
            check_files()
            check_jobs()
        finally:
            os.chdir(before)
    print(f"smoke: all is right with lapse {importlib.metadata.version('lapse')} on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
