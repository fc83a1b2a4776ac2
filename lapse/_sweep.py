"""Remove a folder of ipc sockets when its owner has died: `python -I -S _sweep.py FOLDER`.

The owner (lapse/ipc.py) holds the lock on the file `lock` in the folder. This process waits for it: when it gets it, the owner has
removed the folder, or is gone without having done so, by SIGKILL for one. Standard library only, and nothing of the package: it must
start fast and stay small.

Beside the folder others may make files (in /tmp everybody), so once it is gone its name may stand for anything: files are removed
through the descriptor that was opened at the start, and the name is given to rmdir only, which follows no link.
"""
import fcntl
import os
import sys
import time
from pathlib import Path

TRIES = 20          # a node that is about to be killed may still bind a socket
PAUSE = 0.05


def main() -> None:
    path = Path(sys.argv[1])
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        lock = os.open("lock", os.O_RDWR | os.O_NOFOLLOW, dir_fd=folder)
    except OSError:
        return
    fcntl.flock(lock, fcntl.LOCK_EX)
    for _ in range(TRIES):
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    os.unlink(entry.name, dir_fd=folder)
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(PAUSE)


if __name__ == "__main__":
    main()
