"""One node of a job that is about to be disturbed (or its scheduler): `job.py BOARD PHASE SEED DELAY [--sys.… options]`.

It works in PHASE until something ends it; "shutdown" and "end" leave in the normal way, with operations still under way. What it
is doing is on the board (tests/faults/board.py) at any time. DELAY: at most so many seconds before it begins, drawn from the seed.
"""
import os
import random
import sys
import time
from pathlib import Path

from board import END, EXIT, IMPORTING, JOINING, PHASES, RAISE, SHUTDOWN, SILENCE, UP, Board

SCHEDULER = os.environ.get("DMLC_ROLE") == "scheduler"
RANK = int(os.environ.get("LAPSE_RANK", "0"))
LAST = 60           # seconds: something should have happened by then
THREADS = 2
KEYS, LENGTH = 1000, 10
BULK_KEYS, BULK_LENGTH = 32, 1 << 18        # values of 1 MiB


def draw_delay(words):
    chance = random.Random(f"{words[3]} {RANK}")
    time.sleep(chance.random() * float(words[4]))


class Disturbed(Exception):
    """The error that this node has been told to make."""


class Job:
    def __init__(self, board, phase, seed, options):
        self.board, self.phase, self.seed, self.options = board, phase, seed, options
        self.until = time.monotonic() + LAST

    def enter(self, phase):
        self.board.enter(RANK, os.getpid(), phase)

    def go_on(self):
        """Look at the board; raise when it is time to."""
        if time.monotonic() > self.until:
            raise SystemExit("nothing has happened to this node")
        order = self.board.ordered(RANK)
        if order == RAISE:
            raise Disturbed("told to")
        if order == EXIT:
            os._exit(3)

    def run(self):
        import numpy as np

        import lapse
        from lapse.options import program_parser, system_settings
        args = program_parser("job", "A node that is about to be disturbed.").parse_args(self.options)
        keys, length = (BULK_KEYS, BULK_LENGTH) if self.phase == "bulk" else (KEYS, LENGTH)
        self.np, self.keys, self.length = np, keys, length
        if SCHEDULER:
            lapse.scheduler(keys, THREADS, **system_settings(args))
            return
        lapse.setup(keys, THREADS, **system_settings(args))
        self.enter(JOINING)
        server = lapse.Server(keys, length)
        self.enter(UP)
        self.watch()
        from lapse.program import run_workers
        run_workers(THREADS, lambda number: self.work(lapse.Worker(number, server), number))
        self.enter(SHUTDOWN)
        server.shutdown()
        self.enter(END)

    def work(self, kv, number):
        """A worker's part. What it leaves under way at the end is finished by the shutdown."""
        random = self.np.random.default_rng([self.seed, RANK, number])
        kv.barrier()
        phase = self.phase if self.phase in ("barrier", "storm", "bulk") else "training"
        if number == 0:
            self.enter(PHASES[phase])
        short = self.phase in ("shutdown", "end")
        end = time.monotonic() + 0.05
        while not short or time.monotonic() < end:
            self.go_on()
            getattr(self, phase)(kv, random)
        if short:
            for _ in range(50):
                keys = random.choice(self.keys, 20, replace=False)
                kv.push(keys, self.np.ones((20, self.length), self.np.float32), True)
                kv.localize(keys, True)

    def training(self, kv, random):
        keys = random.choice(self.keys, 20, replace=False)
        values = self.np.empty((20, self.length), self.np.float32)
        if random.random() < 0.2:
            kv.localize(keys, True)
        kv.pull(keys, values)
        kv.push(keys, self.np.ones_like(values), bool(random.random() < 0.5))

    def barrier(self, kv, random):
        kv.barrier()

    def storm(self, kv, random):
        kv.wait(kv.localize(random.choice(self.keys, 50, replace=False), True))

    def bulk(self, kv, random):
        keys = random.choice(self.keys, 16, replace=False)
        kv.push(keys, self.np.ones((16, self.length), self.np.float32))

    # -- breaking connections

    def watch(self):
        import threading
        threading.Thread(target=self.obey, daemon=True).start()

    def obey(self):
        """Wait for the order to break a connection. Only those that are told to look often."""
        while True:
            order = self.board.ordered(RANK)
            if order and order not in (RAISE, EXIT):
                self.cut(silently=order == SILENCE)
                return
            time.sleep(0.002)

    def cut(self, silently):
        import socket
        connections = []
        for entry in Path("/proc/self/fd").iterdir():
            try:
                if str(entry.readlink()).startswith("socket:"):
                    sock = socket.socket(fileno=os.dup(int(entry.name)))
                    if sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        sock.getpeername()
                        connections.append((int(entry.name), sock))
            except OSError:
                continue
        connections.sort(key=lambda pair: pair[0])
        _, sock = random.Random(self.seed).choice(connections)
        if silently:
            import ctypes
            # A filter of one instruction, "take 0 bytes": whatever comes in on this connection is lost, acknowledgements too.
            code = ctypes.create_string_buffer(b"\x06\0\0\0\0\0\0\0")
            program = ctypes.create_string_buffer(16)
            ctypes.c_uint16.from_buffer(program).value = 1
            ctypes.c_void_p.from_buffer(program, 8).value = ctypes.addressof(code)
            sock.setsockopt(socket.SOL_SOCKET, 26, program.raw)     # SO_ATTACH_FILTER
        else:
            sock.shutdown(socket.SHUT_RDWR)


def main():
    words = sys.argv
    board = Board(words[1])
    if not SCHEDULER:
        draw_delay(words)
        board.enter(RANK, os.getpid(), IMPORTING)
    from lapse.program import run_program
    run_program(Job(board, words[2], int(words[3]), words[5:]).run)


if __name__ == "__main__":
    main()
