"""lapse.launch, lapse.runner, tracker/dmlc_local.py: processes are started, prefixed, ended, and nothing is left of them."""
from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import pytest

import lapse
from lapse import errors, ipc
from lapse.launch import launch
from lapse.runner import run

ROOT = Path(__file__).resolve().parents[2]
TRACKER = [sys.executable, str(ROOT / "tracker" / "dmlc_local.py")]
PATIENCE = 30.0

JOIN = """
import os, signal, sys, time
from lapse.cluster import Cluster
from lapse.config import Config
from lapse.errors import NodeFailure
rank = int(os.environ["LAPSE_RANK"])
cluster = Cluster(Config.make(10, 1), {"num_keys": KEYS}, lambda failure: None)
cluster.ready()
print("up", flush=True)
def meet():
    cluster.barrier("nodes", str(cluster.rank))
def leave():
    cluster.leave()
    cluster.close()
"""


def program(body: str, keys: str = "10") -> list[str]:
    return [sys.executable, "-c", JOIN.replace("KEYS", keys) + body]


@pytest.fixture
def tag(monkeypatch, tmp_path):
    """A variable in the environment of everything that the test starts; in the end no process may have it, and no folder be left."""
    value = secrets.token_hex(8)
    monkeypatch.setenv("TEST_TAG", value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    for name in [n for n in os.environ if n.startswith(("DMLC_", "LAPSE_"))]:
        monkeypatch.delenv(name)
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="t-"))    # others may run jobs on this machine now
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield value
    deadline = time.monotonic() + 5
    while tagged(value) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = tagged(value)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)    # carries our tag
    assert not left
    jobs = list(folder.glob(ipc.PREFIX + "*"))
    shutil.rmtree(folder)
    assert not jobs


def tagged(value: str) -> list[int]:
    """The processes that were started with this TEST_TAG (the test's own does not count: its variable was set later).

    Not multiprocessing's resource tracker, which lives as long as the process that has spawned others.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                tagged_too = f"TEST_TAG={value}".encode() in (entry / "environ").read_bytes().split(b"\0")
                if tagged_too and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def track(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*TRACKER, *arguments], capture_output=True, timeout=PATIENCE, check=False, **options)


class Background:
    """The tracker, still running; `until` waits for text in its output."""

    def __init__(self, *arguments: str):
        self.popen = subprocess.Popen([*TRACKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        os.set_blocking(self.popen.stdout.fileno(), False)
        self.output = b""

    def until(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.output.count(text.encode()) < times:
            self.output += self.popen.stdout.read() or b""
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        try:
            code = self.popen.wait(PATIENCE)
        finally:
            if self.popen.poll() is None:
                self.popen.kill()
            os.set_blocking(self.popen.stdout.fileno(), True)
            self.output += self.popen.stdout.read()
            self.popen.stdout.close()
        return code

    def pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(rb"pid=(\d+)", self.output)]


# -- output

def test_every_line_of_both_streams_has_a_prefix(tag):
    body = "import sys; print('one\\ntwo'); sys.stdout.write('no end'); sys.stdout.flush(); print('three', file=sys.stderr)"
    result = track("-s", "2", sys.executable, "-c", body)
    assert result.returncode == 0
    for rank in (0, 1):
        mine = [line for line in result.stdout.splitlines(keepends=True) if line.startswith(b"[node %d] " % rank)]
        assert mine == [b"[node %d] %s\n" % (rank, text) for text in (b"one", b"two", b"no end")]
    assert sorted(result.stderr.splitlines()) == [b"[node 0] three", b"[node 1] three"]


def test_lines_are_not_mixed_and_bytes_not_changed(tag):
    body = ("import os, sys\nrank = int(os.environ['LAPSE_RANK'])\nfor i in range(3000):\n"
            "    sys.stdout.buffer.write(bytes([65 + rank, 0, 255, 13]) * 20 + b'\\n')\n"
            "sys.stdout.buffer.write(b'x' * 3_000_000)")
    out = io.BytesIO()
    assert run([sys.executable, "-c", body], 3, stdout=out, stderr=io.BytesIO()) == 0
    lines = out.getvalue().split(b"\n")
    assert lines.pop() == b""
    for rank in range(3):
        prefix = b"[node %d] " % rank
        mine = [line[len(prefix):] for line in lines if line.startswith(prefix)]
        assert mine[:3000] == [bytes([65 + rank, 0, 255, 13]) * 20] * 3000
        assert b"".join(mine[3000:]) == b"x" * 3_000_000    # too long for one line: broken, not lost
    assert all(re.match(rb"\[node [012]\] ", line) for line in lines)


def test_output_comes_while_the_nodes_run(tag):
    job = Background("-s", "1", sys.executable, "-c", "import time; print('early'); time.sleep(60)")
    job.until("[node 0] early\n")
    job.popen.terminate()
    assert job.end() == 143


def test_a_reader_that_goes_away_ends_the_job(tag):
    body = "import itertools\nfor i in itertools.count(): print(i)"
    job = subprocess.Popen([*TRACKER, "-s", "2", sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    job.stdout.read(100)
    job.stdout.close()
    assert job.wait(PATIENCE) == 128 + signal.SIGPIPE


def test_ctrl_c_ends_a_job_whose_output_nobody_reads(tag):
    """The launcher's standard output and standard error are full, and stay so."""
    body = "import sys\nwhile True: print('x' * 1000, file=sys.stderr)"
    job = subprocess.Popen([*TRACKER, "-s", "2", sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    job.stderr.read(100_000)
    end = time.monotonic() + PATIENCE
    while struct.unpack("i", fcntl.ioctl(job.stderr, termios.FIONREAD, bytes(4)))[0] < fcntl.fcntl(job.stderr, fcntl.F_GETPIPE_SZ) - 4096:
        assert time.monotonic() < end
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    while len(tagged(tag)) > 2:         # the launcher itself has something to say, and its folder has a sweeper
        assert time.monotonic() < end
        time.sleep(0.02)
    job.stderr.read()
    assert job.wait(PATIENCE) == 130
    job.stdout.close()
    job.stderr.close()


def test_output_that_waits_when_the_nodes_have_ended(tag):
    job = subprocess.Popen([*TRACKER, "-s", "1", sys.executable, "-c", "print('x' * 800_000)"], stdout=subprocess.PIPE)
    time.sleep(2)
    assert len(job.stdout.read()) == len("[node 0] \n") + 800_000
    assert job.wait(PATIENCE) == 0
    job.stdout.close()


def test_output_that_cannot_be_written(tag):
    with Path("/dev/full").open("wb") as full:
        job = subprocess.run([*TRACKER, "-s", "2", sys.executable, "-c", "import time; print('x'); time.sleep(600)"], stdout=full,
                             stderr=subprocess.PIPE, timeout=PATIENCE, check=False)
    assert (job.returncode, job.stderr) == (1, b"lapse: cannot write the output of the nodes: No space left on device\n")


def test_more_nodes_than_descriptors(tag):
    command = [*TRACKER, "-s", "30", sys.executable, "-c", "import time; time.sleep(600)"]
    job = subprocess.run(["sh", "-c", 'ulimit -n 40; exec "$@"', "sh", *command], capture_output=True, timeout=PATIENCE, check=False)
    assert job.returncode == 1 and re.fullmatch(rb"lapse: cannot start node \d+ of 30: Too many open files\n", job.stderr), job.stderr


# -- command lines

def test_the_command_line_is_passed_on_untouched(tag):
    arguments = ["-s", "9", "--help", "a b", "", "$HOME", "*", "--", "-n", "'\"", "--log-level=x"]
    for separator in ([], ["--"]):
        result = track("-s", "2", *separator, sys.executable, "-c", "import sys; print(sys.argv[1:])", *arguments)
        assert result.stdout.count(repr(arguments).encode()) == 2, result


def test_the_nodes_environment(tag):
    names = ["DMLC_ROLE", "DMLC_NUM_SERVER", "DMLC_PS_ROOT_URI", "LAPSE_RANK", "PYTHONUNBUFFERED"]
    body = ("import os, sys; "
            f"print([os.environ[n] for n in {names}], os.environ['TEST_TAG'], len(os.environ['LAPSE_TOKEN']), sys.stdin.read())")
    result = track("-s", "2", sys.executable, "-c", body, input=b"not for them")
    for rank in (0, 1):
        assert f"[node {rank}] ['server', '2', '127.0.0.1', '{rank}', '1'] {tag} 32 \n".encode() in result.stdout
    ignored = track("-s", "1", "grep", "SigIgn", "/proc/self/status")
    assert ignored.stdout.startswith(b"[node 0] SigIgn:\t")
    mask = int(ignored.stdout.split()[-1], 16)
    for signum in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):      # the first two are what Python ignores for itself
        assert not mask >> (signum - 1) & 1, signum


@pytest.mark.parametrize(("arguments", "text"), [
    (["-s", "2"], "no COMMAND"), (["-s", "0", "true"], "at least one"), (["-s", "many", "true"], "invalid int"),
    (["-n", "1", "true"], "use -n 0"), (["--num", "2", "true"], "--num"), (["--log-level", "LOUD", "true"], "LOUD"),
    (["--log-file", "/no/such/dir/x", "true"], "No such file"),
])
def test_wrong_options(tag, arguments, text):
    result = track(*arguments)
    assert result.returncode == 2
    assert b"usage:" in result.stderr
    assert text in result.stderr.decode()


def test_help_and_the_old_option(tag):
    assert b"--num-servers" in track("--help").stdout
    assert track("--help").returncode == 0
    assert track("-n", "0", "-s", "1", "--log-level", "info", "true").returncode == 0


def test_the_log_file(tag, tmp_path):
    log = tmp_path / "log"
    assert track("-s", "1", "--log-level", "INFO", "--log-file", str(log), "false").returncode == 1
    assert "node 0" in log.read_text()
    assert "ended with exit code 1" in log.read_text()


def test_commands_that_cannot_be_executed(tag, tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("no program")
    broken = tmp_path / "broken"
    broken.write_text("no program either")
    broken.chmod(0o755)
    for command, code, text in (("no-such-command", 127, "not found"), (str(tmp_path / "x"), 127, "no such file"),
                                (str(plain), 126, "not executable"), (str(tmp_path), 126, "not a file"), (str(broken), 126, "format")):
        result = track("-s", "2", command)
        assert result.returncode == code, result
        assert text in result.stderr.decode()
        assert "Traceback" not in result.stderr.decode()


# -- ends

@pytest.mark.parametrize(("end", "code", "text"), [
    ("os.kill(os.getpid(), signal.SIGKILL)", 137, "killed by signal 9 (SIGKILL)"),
    ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "killed by signal 11 (SIGSEGV)"),
    ("os._exit(7)", 7, "ended with exit code 7"),
])
def test_the_first_failed_node_is_named_and_its_code_returned(tag, end, code, text):
    result = track("-s", "3", *program(f"if rank == 1: {end}\ntry: meet()\nexcept NodeFailure as error: print('got', error); sys.exit(9)"))
    assert result.returncode == code, result
    last = result.stderr.decode().splitlines()[-1]
    assert last.startswith("lapse: node 1 (")
    assert text in last
    for rank in (0, 2):
        assert f"[node {rank}] got node 1 (".encode() in result.stdout


def test_a_reason_that_a_node_gave_stands_before_its_exit_code(tag):
    result = track("-s", "2", *program("if rank == 1: cluster.fail('disk full'); time.sleep(0.1); os._exit(5)\nmeet()"))
    assert result.returncode == 5
    assert "disk full (ended with exit code 5)" in result.stderr.decode().splitlines()[-1]


def test_nodes_that_run_on_after_the_verdict(tag):
    """None of them ends by itself, so only the verdict can tell the launcher."""
    result = track("-s", "2", *program("if rank == 1: cluster.fail('enough')\ntime.sleep(600)"))
    assert result.returncode == 1
    assert "enough" in result.stderr.decode().splitlines()[-1]


def test_an_end_without_leaving(tag):
    result = track("-s", "2", *program("if rank == 1: os._exit(0)\nmeet()"))
    assert result.returncode == 1
    assert "without shutting down its server" in result.stderr.decode().splitlines()[-1]


def test_nodes_with_different_descriptions(tag):
    result = track("-s", "2", *program("meet()", keys="rank"))
    assert result.returncode == 1
    assert "the nodes differ in num_keys: 0 on node 0" in result.stderr.decode().splitlines()[-1]


def test_a_node_that_does_not_end_is_killed(tag):
    result = track("-s", "2", *program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nmeet()\nif rank == 1: os._exit(4)\n"
                                       "print('deaf', flush=True)\nwhile True: time.sleep(1)"))
    assert result.returncode == 4


def test_a_frozen_node_is_named(tag, monkeypatch):
    monkeypatch.setenv("PS_HEARTBEAT_INTERVAL", "0.2")
    result = track("-s", "2", *program("if rank == 1:\n    os.kill(os.getpid(), signal.SIGSTOP)\n    time.sleep(600)\nmeet()"))
    assert result.returncode == 1
    last = result.stderr.decode().splitlines()[-1]
    assert last.startswith("lapse: node 1 (")
    assert "stopped" in last


def test_a_job_that_ends_well(tag):
    result = track("-s", "4", *program("meet(); leave()"))
    assert result.returncode == 0, result
    assert result.stderr == b""


def test_what_a_node_leaves_running_is_ended(tag):
    result = track("-s", "1", "sh", "-c", "sleep 600 & echo started")
    assert result.returncode == 0
    assert result.stdout == b"[node 0] started\n"


SLEEPER = "print(f'pid={os.getpid()}', flush=True)\nmeet()\nprint('running', flush=True)\ntime.sleep(600)"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_to_the_launcher_end_everything(tag, number, code):
    job = Background("-s", "2", *program(SLEEPER))
    job.until("running", 2)
    os.kill(job.popen.pid, number)
    assert job.end() == code, job.output
    assert signal.Signals(number).name.encode() in job.output.splitlines()[-1]


def test_ctrl_c_reaches_the_nodes_once(tag):
    body = ("def stop(number, frame): print('interrupted', flush=True)\nsignal.signal(signal.SIGINT, stop)\n" + SLEEPER
            ).replace("time.sleep(600)", "signal.pause(); leave()")
    job = Background("-s", "2", *program(body))
    job.until("running", 2)
    os.killpg(job.popen.pid, signal.SIGINT)     # as a terminal does
    assert job.end() == 130
    assert job.output.count(b"] interrupted\n") == 2


def test_deaf_nodes_are_killed_after_ctrl_c(tag):
    body = "for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n" + SLEEPER
    job = Background("-s", "2", *program(body))
    job.until("running", 2)
    for _ in range(3):      # impatient
        os.kill(job.popen.pid, signal.SIGINT)
        time.sleep(0.3)
    assert job.end() == 130


def test_nodes_die_with_a_killed_launcher(tag):
    """Also those that have not joined, and that ignore all signals; and the ipc folder goes, too."""
    body = "for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n" + SLEEPER
    job = Background("-s", "2", *program(body))
    job.until("running", 2)
    assert len(job.pids()) == 2
    job.popen.kill()
    job.end()
    deadline = time.monotonic() + PATIENCE
    while tagged(tag) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not tagged(tag)      # the sweeper of the folder has the tag, too; the fixture looks for files


def test_two_jobs_at_once(tag):
    jobs = [Background("-s", "2", *program("meet(); leave()")) for _ in range(3)]
    assert [job.end() for job in jobs] == [0, 0, 0]


# -- functions

needs_core = pytest.mark.skipif(not hasattr(lapse, "Server"), reason="the core is not built")


def both_ranks(worker, base):
    """A function that spawned processes can import."""
    import numpy as np

    keys, values = np.array([1, 3, 5]), np.ones(6, dtype=np.float32)
    worker.push(keys, values)
    worker.waitall()
    worker.barrier()
    worker.pull(keys, values)
    worker.barrier()
    return base + values.sum()


@needs_core
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(("nodes", "workers"), [(1, 1), (1, 2), (2, 2)])
def test_launch_returns_all_results(tag, nodes, workers, method):
    result = launch(both_ranks, nodes, workers, num_keys=10, value_length=2, args=(100.0,), start_method=method)
    assert result == [[100.0 + 6 * nodes * workers] * workers] * nodes


@needs_core
def test_launch_takes_closures(tag):
    base = 7
    assert launch(lambda worker: base + worker.num_keys, 2, num_keys=10, value_length=1) == [[17], [17]]


@needs_core
@pytest.mark.parametrize("nodes", [1, 2])
def test_an_exception_of_one_worker_is_raised_here(tag, nodes):
    def fail(worker):
        if threading_name().endswith("1") and os.environ.get("LAPSE_RANK", "0") == str(nodes - 1):
            raise ValueError("not today")
        worker.barrier()

    def threading_name():
        import threading
        return threading.current_thread().name

    with pytest.raises(errors.WorkerError, match="not today") as caught:
        launch(fail, nodes, 2, num_keys=10, value_length=1)
    assert (caught.value.node, caught.value.worker) == (nodes - 1, 1)
    assert "Traceback" in caught.value.traceback


@needs_core
@pytest.mark.parametrize("nodes", [1, 3])
def test_a_process_that_dies_is_a_node_failure(tag, nodes):
    def die(worker):
        if os.environ.get("LAPSE_RANK", "0") == str(nodes - 1):
            os.kill(os.getpid(), signal.SIGKILL)
        worker.barrier()

    with pytest.raises(errors.NodeFailure, match="SIGKILL") as caught:
        launch(die, nodes, num_keys=10, value_length=1)
    assert caught.value.rank == nodes - 1


@needs_core
def test_a_result_that_cannot_be_handed_over(tag):
    with pytest.raises(errors.WorkerError, match="pickle"):
        launch(lambda worker: (lambda: None), num_keys=10, value_length=1)


def test_wrong_numbers():
    with pytest.raises(ValueError, match="at least one"):
        launch(print, 0, num_keys=10, value_length=1)
