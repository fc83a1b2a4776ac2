"""Remove a folder of ipc sockets when its owner has died: `python -I -S _sweep.py FOLDER`.

The owner (lapse/ipc.py) holds the lock on the file `lock` in the folder. This process waits for it: when it gets it, the owner has
removed the folder, or is gone without having done so, by SIGKILL for one. Standard library only, and nothing of the package: it must
start fast and stay small.
"""
import fcntl
import os
import sys
import time
from pathlib import Path

TRIES = 20          # a node that is about to be killed may still bind a socket
PAUSE = 0.05


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    fcntl.flock(lock, fcntl.LOCK_EX)
    for _ in range(TRIES):
        try:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(PAUSE)


if __name__ == "__main__":
    main()
