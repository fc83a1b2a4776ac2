"""Files of the applications: what is wrong with one, and files that are written completely or not at all."""
import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path

__all__ = ["InputError", "check_file", "check_folder", "whole_file"]


class InputError(Exception):
    """What is wrong with the input, in one sentence that names the file."""


@contextlib.contextmanager
def whole_file(path):
    """Give a binary file to write that becomes `path` when all is in it, and until then, where the system can, has no name."""
    path = Path(path)
    check_regular(path)
    part = path.with_name(f"{path.name}.part")
    try:
        file = os.fdopen(os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o644), "w+b")
        named = False
    except (AttributeError, OSError):
        file, named = part.open("w+b"), True
    try:
        yield file
        file.flush()
        if not named:
            part.unlink(missing_ok=True)
            folder = os.open(path.parent, os.O_RDONLY)
            try:        # with a src_dir_fd, which counts for nothing here, Python has the system follow the link
                os.link(f"/proc/self/fd/{file.fileno()}", part, src_dir_fd=folder, follow_symlinks=True)
            finally:
                os.close(folder)
            named = True
        os.replace(part, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)              # a full disk does not say where
            if error.filename2 is not None:         # that name is ours
                del error.filename2
        with contextlib.suppress(OSError):      # what is left in the buffer would be written now
            file.close()
        if named:
            part.unlink(missing_ok=True)
        raise


def check_regular(path):
    """OSError for what is there and is no file: a device, say, whose place a file should not take."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))


def check_folder(option, folder):
    """Make the folder if it is not there, and prove that it can be written; InputError when not.

    Nodes of one host may do so at once.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:      # without a name: all nodes try at once
            file.write(b"\0")
    except OSError as error:
        raise InputError(f"{option} {folder}: {error.strerror}") from None


def check_file(option, path, appended=False):
    """Prove that a file of this name can be written, without making it; InputError when not. Nodes of one host may do so at once.

    appended: what is there will not be replaced, so that it may be a device.
    """
    path = Path(path)
    try:
        if not appended:
            check_regular(path)
        if path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))      # of a pipe nobody is waited for
            return
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(b"\0")
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}") from None
