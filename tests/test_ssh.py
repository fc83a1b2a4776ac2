"""Jobs over ssh: real sshds, which the test starts as this user on addresses of the loopback network, stand for the hosts.

Each "host" is an address 127.0.0.x with a port that the system chooses; for every connection an `sshd -i` is started, with keys and
a list of known hosts of the test's own. Whatever runs "over there" has a mark in its environment (SetEnv), so that what is left is seen.
"""
from __future__ import annotations

import contextlib
import getpass
import io
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from lapse import _remote, ssh
from lapse.processes import LINE_BYTES

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 90.0
SSHD = shutil.which("sshd", path=os.defpath + os.pathsep + os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/usr/local/sbin")
TRACKER = [sys.executable, str(ROOT / "tracker" / "dmlc_ssh.py")]
RUN = [sys.executable, "-m", "lapse", "run"]
TOOLS = {"sshd": SSHD, **{name: shutil.which(name) for name in ("ssh", "ssh-keygen")}}
MISSING = [name for name, path in TOOLS.items() if path is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian: openssh-server, openssh-client)")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Keys that are made once; and what sshd needs when root runs it."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("id", "stranger", "host1", "host2", "host3", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True, timeout=PATIENCE)
    if os.getuid() == 0:        # sshd's service makes it, too; it stays, since other processes may be testing now
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    return folder


class Sshd:
    """One host: listens on an address, and starts an sshd for each connection."""

    def __init__(self, folder: Path, address: str, key: str, tag: str):
        self.address = address
        self.before = lambda: None      # comes before a connection is served
        self.connections: list[subprocess.Popen] = []
        self.log = folder / f"{address}.log"
        config = folder / f"{address}.conf"
        config.write_text(f"HostKey {folder / key}\nPidFile none\nAuthorizedKeysFile {folder / 'authorized_keys'}\n"
                          "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
                          f"SetEnv TEST_TAG={tag} TMPDIR={os.environ['TMPDIR']}\n")
        self._command = [SSHD, "-i", "-f", str(config), "-E", str(self.log)]
        self._listener = socket.create_server((address, 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.before()
            with connection:
                self.connections.append(subprocess.Popen(self._command, stdin=connection, stdout=connection, stderr=subprocess.DEVNULL))

    def kill(self) -> None:
        """What a crash of the host's sshd does: all its connections break."""
        for process in self.connections:
            for pid in (*descendants(process.pid, "sshd"), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE)
        for process in self.connections:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def descendants(pid: int, name: str) -> list[int]:
    """The processes with this name below another one."""
    found, level = [], [pid]
    while level:
        parents, level = level, []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                head, _, rest = entry.read_text().rpartition(")")
                if int(rest.split()[1]) in parents and head.partition("(")[2].startswith(name):
                    level.append(int(entry.parent.name))
        found += level
    return found


class Cluster:
    """Three hosts, and how to reach them."""

    def __init__(self, store: Path, tag: str):
        self.store, self.tag = store, tag
        self.folder = Path(tempfile.mkdtemp(dir=os.environ["TMPDIR"], prefix="c-"))
        for path in store.iterdir():
            shutil.copy2(path, self.folder)
        shutil.copy2(store / "id.pub", self.folder / "authorized_keys")
        self.sshds = [Sshd(self.folder, f"127.0.0.{n + 1}", f"host{n}", tag) for n in (1, 2, 3)]
        self.known(self.sshds)
        self.hosts([f"{sshd.address}:{sshd.port}" for sshd in self.sshds])

    def known(self, sshds, key="host{}") -> None:
        lines = []
        for number, sshd in enumerate(sshds, 1):
            lines.append(f"[{sshd.address}]:{sshd.port} {(self.folder / (key.format(number) + '.pub')).read_text()}")
        (self.folder / "known").write_text("".join(lines))

    def hosts(self, lines) -> Path:
        path = self.folder / "hosts"
        path.write_text("# the hosts\n\n" + "".join(f"{line}   # one\n" for line in lines))
        return path

    def arguments(self, nodes: int, *more) -> list[str]:
        words = f"-F none -o UserKnownHostsFile={self.folder / 'known'} -o StrictHostKeyChecking=yes -o GlobalKnownHostsFile=none"
        return ["-H", str(self.folder / "hosts"), "-s", str(nodes), "-i", str(self.folder / "id"), "--ssh-options", words, *map(str, more)]

    def run(self, nodes: int, *command, launcher=TRACKER, options=(), cwd=ROOT, env=None, timeout=PATIENCE):
        return subprocess.run([*launcher, *self.arguments(nodes, *options), *map(str, command)], capture_output=True, text=True, cwd=cwd,
                              stdin=subprocess.DEVNULL, timeout=timeout, check=False, env={**os.environ, **(env or {})})

    def tagged(self, besides: tuple = ()) -> dict[int, str]:
        """What runs with the mark in its environment, apart from the test itself."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"TEST_TAG={self.tag}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
        return found

    def gone(self, seconds: float = 8.0) -> dict[int, str]:
        """Wait until nothing with the mark runs any more; what does."""
        end = time.monotonic() + seconds
        while (left := self.tagged()) and time.monotonic() < end:
            time.sleep(0.02)
        return left

    def close(self) -> None:
        for sshd in self.sshds:
            sshd.close()


@pytest.fixture
def cluster(store, monkeypatch):
    for name in [n for n in os.environ if n.startswith(("DMLC_", "LAPSE_", "PS_", "SSH_"))]:
        monkeypatch.delenv(name)
    base = Path(tempfile.mkdtemp(dir="/tmp", prefix="t-"))
    monkeypatch.setenv("TMPDIR", str(base))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(store, secrets.token_hex(8))
    yield cluster
    left = cluster.gone()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)    # carries our mark
    cluster.close()
    files = sorted(path.name for path in base.iterdir() if path != cluster.folder)
    shutil.rmtree(base)
    assert not left
    assert not files


def nodes_of(text: str) -> set[str]:
    return set(re.findall(r"^\[(node \d+ [\d.]+)\] ", text, re.MULTILINE))


def is_one_sentence(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.startswith("lapse: ")]
    return len(lines) == 1 and "Traceback" not in text


# -- jobs that succeed

@pytest.mark.parametrize("launcher", [TRACKER, RUN], ids=["tracker", "run"])
def test_a_program_on_three_hosts(cluster, launcher):
    done = cluster.run(3, sys.executable, "apps/simple.py", "--sys.transport", "tcp", launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert nodes_of(done.stdout + done.stderr) == {"node 0 127.0.0.2", "node 1 127.0.0.3", "node 2 127.0.0.4"}
    assert "simple: OK (3 nodes" in done.stdout
    assert all(len(sshd.connections) == 1 for sshd in cluster.sshds)


def test_matrix_factorization_on_three_hosts(cluster):
    done = cluster.run(3, sys.executable, "apps/matrix_factorization.py", "--dataset", "apps/data/mf/", "-r", 2, "-e", 2,
                       "--num_rows", 6, "--num_cols", 4, "--sys.transport", "tcp")
    assert done.returncode == 0, done.stdout + done.stderr
    losses = re.findall(r"loss[^\d]*([\d.]+)", done.stdout + done.stderr)
    assert len(losses) >= 2, done.stdout + done.stderr


REPORT = """
import json, os, sys
before = set(os.environ)
import lapse
lapse.setup(10, 1)
server = lapse.Server(2)
config = lapse.node._node.config
print("facts " + json.dumps({"mode": config.mode, "host": os.environ["DMLC_PS_ROOT_URI"], "cwd": os.getcwd(), "arguments": sys.argv[1:],
      "secrets": [n for n in os.environ if n in ("LAPSE_TOKEN", "LAPSE_SECRET_KEYS")], "rank": lapse.node._node.rank,
      "unwanted": sorted(before & {"LAPSE_TOKEN", "LAPSE_KEYS", "DMLC_NODE_HOST", "UNRELATED"}),
      "extra": os.environ.get("EXTRA"), "given": os.environ.get("GIVEN"), "omp": os.environ.get("OMP_NUM_THREADS"),
      "stdin": sys.stdin.read(), "secret": config.keys.secret if config.keys else "", "cmdline": [open(f"/proc/{p}/cmdline").read()
      for p in (os.getpid(), os.getppid())]}), flush=True)
server.shutdown()
"""


def facts(text: str) -> list[dict]:
    import json
    found = [json.loads(match) for match in re.findall(r"^\[node \d+ [\d.]+\] facts (.*)$", text, re.MULTILINE)]
    return sorted(found, key=lambda entry: entry["rank"])


def program(cluster: Cluster, text: str) -> list[str]:
    path = cluster.folder / "program.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def test_jobs_are_encrypted_and_words_arrive_as_they_are(cluster):
    """curve is the default, also on loopback; hosts in turn; nothing is interpreted by a shell; no secret on a command line."""
    words = ["a b", "$HOME `id` $(id)", "it's \"quoted\" \\ here", "*", "; exit 3", "", "zwölf\nlines", "-x"]
    done = cluster.run(5, *program(cluster, REPORT), *words, options=["--env", "EXTRA", "--env", "GIVEN=1=2"],
                       env={"EXTRA": "x y'z", "OMP_NUM_THREADS": "1", "UNRELATED": "1", "LAPSE_TOKEN": "of another job",
                            "LAPSE_KEYS": "/no/such/file", "DMLC_NODE_HOST": "127.0.0.77"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert nodes_of(done.stdout) == {f"node {n} 127.0.0.{n % 3 + 2}" for n in range(5)}
    found = facts(done.stdout)
    assert [entry["rank"] for entry in found] == list(range(5))
    for entry in found:
        assert entry["mode"] == "curve" and entry["secrets"] == entry["unwanted"] == [] and entry["stdin"] == ""
        assert (entry["cwd"], entry["arguments"]) == (str(ROOT), words)
        assert (entry["extra"], entry["given"], entry["omp"], entry["host"]) == ("x y'z", "1=2", "1", "127.0.0.1")
        everything = "".join(line for other in found for line in other["cmdline"])
        assert entry["secret"] and entry["secret"] not in everything
        assert done.stdout.count(entry["secret"]) == 1 and entry["secret"] not in done.stderr


def test_in_the_clear_only_when_told(cluster):
    done = cluster.run(2, *program(cluster, REPORT), env={"LAPSE_SECURITY": "none"})
    assert done.returncode == 0, done.stderr
    assert {entry["mode"] for entry in facts(done.stdout)} == {"none"}
    assert "whoever can reach" in done.stderr
    done = cluster.run(2, *program(cluster, REPORT), env={"LAPSE_SECURITY": "token"})
    assert done.returncode == 2 and is_one_sentence(done.stderr) and "jobs over ssh need curve" in done.stderr


def test_the_scheduler_listens_where_it_is_told(cluster):
    for options, env in (([*("--host", "127.0.0.9")], {}), ([], {"DMLC_PS_ROOT_URI": "127.0.0.9"})):
        done = cluster.run(2, *program(cluster, REPORT), options=options, env=env)
        assert done.returncode == 0, done.stderr
        assert {entry["host"] for entry in facts(done.stdout)} == {"127.0.0.9"}


def test_user_and_port(cluster):
    first = cluster.sshds[0]
    cluster.hosts([f"{getpass.getuser()}@{first.address}"])
    (cluster.folder / "banner").write_text("welcome\n")
    with (cluster.folder / f"{first.address}.conf").open("a") as config:
        config.write(f"Banner {cluster.folder / 'banner'}\n")
    done = cluster.run(2, *program(cluster, REPORT), options=["-p", first.port])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("127.0.0.2] welcome") == 2     # ssh's own words come, too
    assert nodes_of(done.stdout) == {"node 0 127.0.0.2", "node 1 127.0.0.2"}


@pytest.mark.skipif(shutil.which("rsync") is None, reason="not installed: rsync")
def test_the_tree_is_copied(cluster):
    here = cluster.folder / "a tree's"
    (here / "sub").mkdir(parents=True)
    (here / "sub" / "data.txt").write_text("forty-two")
    (here / "program.py").write_text("import os, lapse\nlapse.setup(10, 1)\nserver = lapse.Server(1)\n"
                                     "print(os.getcwd(), open('sub/data.txt').read(), flush=True)\nserver.shutdown()\n")
    there = cluster.folder / "over there $(id)"
    done = cluster.run(3, sys.executable, "program.py", cwd=here, options=["--sync-dir", there])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"] {there} forty-two\n") == 3
    done = cluster.run(3, sys.executable, "program.py", cwd=here, options=["--sync-dir", "/proc/none/such"])
    assert done.returncode == 1 and is_one_sentence(done.stderr), done.stderr
    assert re.search(r"lapse: host 127\.0\.0\.\d: cannot copy the tree to /proc/none/such: ", done.stderr)


@pytest.mark.skipif(shutil.which("rsync") is None, reason="not installed: rsync")
def test_the_name_of_the_folder_is_no_rsync_syntax(cluster, monkeypatch):
    here = cluster.folder / "tree"
    here.mkdir()
    (here / "file").write_text("found")
    for sshd in cluster.sshds:          # relative names begin in the home folder over there
        with (cluster.folder / f"{sshd.address}.conf").open("a") as config:
            config.write(f'ForceCommand cd {cluster.folder} && eval "$SSH_ORIGINAL_COMMAND"\n')
    for name in (":there", "-there", "x:there"):
        done = cluster.run(1, "sh", "-c", "pwd; cat file", cwd=here, options=[f"--sync-dir={name}"])
        assert done.returncode == 0, done.stderr
        assert f"] {cluster.folder / name}\n" in done.stdout and "] found\n" in done.stdout


def test_all_output_comes_though_it_is_read_slowly(cluster):
    """Far more than fits into pipes; when the reader is through with it, the node has long ended."""
    lines = 40_000
    job = subprocess.Popen([*TRACKER, *cluster.arguments(1), sys.executable, "-c",
                            f"for number in range({lines}): print(number, 'x' * 40)"], cwd=ROOT, stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE)
    found = b""
    time.sleep(4)
    while piece := os.read(job.stdout.fileno(), 1 << 15):
        found += piece
        time.sleep(0.05)
    job.stdout.close()
    assert job.wait(PATIENCE) == 0
    assert [int(line.split()[3]) for line in found.splitlines()] == list(range(lines))


# -- jobs that fail

MEET = """
import os, signal, subprocess, sys, time, lapse
lapse.setup(10, 1)
server = lapse.Server(2)
rank = lapse.node._node.rank
if rank == 1:
    subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print("up", os.getpid(), flush=True)
"""


def test_a_node_that_fails_ends_the_others(cluster):
    done = cluster.run(3, *program(cluster, MEET + "if rank == 1: sys.exit(7)\ntime.sleep(600)\n"))
    assert done.returncode == 7
    assert re.search(r"^lapse: node 1 \(127\.0\.0\.3, pid \d+\): .*exit code 7", done.stderr, re.MULTILINE), done.stderr
    assert not cluster.gone()


def test_a_node_that_is_killed_is_named_with_its_signal(cluster):
    done = cluster.run(3, *program(cluster, MEET + "if rank == 2: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)\n"))
    assert done.returncode == 128 + 9
    assert re.search(r"^lapse: node 2 \(127\.0\.0\.4, pid \d+\): killed by signal 9 \(SIGKILL\)", done.stderr, re.MULTILINE), done.stderr


def test_exit_code_255_is_the_programs(cluster):
    done = cluster.run(2, sys.executable, "-c", "import sys; print('bye'); sys.exit(255)")
    assert done.returncode == 255
    assert "ended with exit code 255" in done.stderr and "broke" not in done.stderr


FLOOD = """
import os, time
os.set_blocking(2, False)
print("up", os.getpid(), flush=True)
end = time.monotonic() + 1
while time.monotonic() < end:
    try:
        os.write(2, b"y" * 4096)
        end = time.monotonic() + 1
    except BlockingIOError:
        time.sleep(0.01)
os._exit(9)
"""


def test_the_end_of_a_node_whose_standard_error_is_full_and_does_not_block(cluster):
    job = Background(cluster, 1, *program(cluster, FLOOD))
    job.until(b"] up ", 1)
    node = Path("/proc", re.search(rb"up (\d+)", job.output)[1].decode(), "stat")
    job.popen.send_signal(signal.SIGSTOP)
    end = time.monotonic() + PATIENCE
    with contextlib.suppress(FileNotFoundError):
        while node.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < end
            time.sleep(0.02)
    job.popen.send_signal(signal.SIGCONT)
    os.set_blocking(job.popen.stdout.fileno(), True)
    job.output += job.popen.stdout.read()
    assert job.end() == 9
    assert job.output.endswith(b"): ended with exit code 9\n"), job.output[-500:]


@pytest.mark.parametrize(("command", "code", "words"), [
    (["no-such-command"], 127, "no-such-command: command not found"), (["./no/such"], 127, "./no/such: command not found"),
    (["/dev/null"], 126, "/dev/null: Permission denied"), ([b"zw\xf6lf".decode(errors="surrogateescape")], 127, "zw?lf: command not found"),
])
def test_a_command_that_is_not_there(cluster, command, code, words):
    done = cluster.run(3, *command)
    assert done.returncode == code and is_one_sentence(done.stderr), done.stderr
    assert re.search(rf"cannot start on host 127\.0\.0\.\d: {re.escape(words)}", done.stderr), done.stderr


def test_a_folder_that_is_not_there(cluster):
    """Only this host has it: the first connection finds it gone."""
    where = cluster.folder / "gone"
    where.mkdir()
    cluster.sshds[0].before = where.rmdir
    cluster.hosts([f"{cluster.sshds[0].address}:{cluster.sshds[0].port}"])
    done = cluster.run(1, "true", cwd=where)
    assert done.returncode == 126 and is_one_sentence(done.stderr), done.stderr
    assert f"node 0 (127.0.0.2): cannot start on host 127.0.0.2: {where}: No such file or directory" in done.stderr


def test_no_python_over_there(cluster):
    done = cluster.run(2, "true", options=["--remote-python", "/no/such/python"])
    assert done.returncode in (126, 127) and is_one_sentence(done.stderr), done.stderr
    assert re.search(r"cannot run /no/such/python on host 127\.0\.0\.[23]: .*No such file", done.stderr, re.IGNORECASE), done.stderr


def test_a_host_that_nobody_answers_for(cluster):
    with socket.socket() as closed:
        closed.bind(("127.0.0.7", 0))
        lines = [f"{sshd.address}:{sshd.port}" for sshd in cluster.sshds[:2]] + [f"127.0.0.7:{closed.getsockname()[1]}"]
        cluster.hosts(lines)
        done = cluster.run(3, *program(cluster, MEET))
    assert done.returncode == 255 and is_one_sentence(done.stderr), done.stderr
    assert "node 2 (127.0.0.7): cannot start on host 127.0.0.7: " in done.stderr and "Connection refused" in done.stderr


def test_a_host_without_an_address(cluster):
    cluster.hosts([f"{cluster.sshds[0].address}:{cluster.sshds[0].port}", "no-such-host.invalid"])
    done = cluster.run(2, "true")
    assert done.returncode == 1 and is_one_sentence(done.stderr), done.stderr
    assert "host no-such-host.invalid: cannot find the address" in done.stderr


@pytest.mark.parametrize("name", ["a" * 70, "a..b"])
def test_a_host_that_cannot_have_an_address(cluster, name):
    for options in ([], ["--host", name]):
        cluster.hosts([cluster.sshds[0].address if options else name])
        done = cluster.run(1, "true", options=options)
        assert done.returncode == 1 and is_one_sentence(done.stderr), done.stderr
        assert f"cannot find the address of host '{name}'" in done.stderr


def test_the_current_folder_is_gone(cluster, tmp_path):
    where = tmp_path / "gone"
    where.mkdir()
    done = subprocess.run(["sh", "-c", 'rmdir "$0" && exec "$@"', str(where), *TRACKER, *cluster.arguments(1), "true"], cwd=where,
                          capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2 and is_one_sentence(done.stderr) and "the current folder: No such file" in done.stderr, done.stderr


def test_a_host_whose_key_is_another_or_unknown(cluster):
    cluster.known(cluster.sshds, "other")
    done = cluster.run(2, "true")
    assert done.returncode == 255 and is_one_sentence(done.stderr), done.stderr
    assert re.search(r"cannot start on host 127\.0\.0\.[23]: Host key verification failed: it is not the key that is known",
                     done.stderr), done.stderr
    (cluster.folder / "known").write_text("")
    done = cluster.run(2, "true")
    assert done.returncode == 255 and is_one_sentence(done.stderr), done.stderr
    assert "Host key verification failed: this host's key is not known here; log in to 127.0.0." in done.stderr


def test_a_key_that_is_not_admitted(cluster):
    shutil.copy2(cluster.folder / "stranger", cluster.folder / "id")
    (cluster.folder / "id.pub").unlink()
    done = cluster.run(2, "true")
    assert done.returncode == 255 and is_one_sentence(done.stderr), done.stderr
    assert re.search(r"cannot start on host 127\.0\.0\.[23]: .*Permission denied \(publickey\)", done.stderr), done.stderr


def test_nobody_is_asked_for_a_passphrase(cluster):
    """Not by a window either (BatchMode): the job would wait for whoever is not there."""
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(cluster.folder / "id")], check=True, timeout=PATIENCE)
    (cluster.folder / "ask").write_text(f"#!/bin/sh\ntouch {cluster.folder / 'asked'}\necho secret\n")
    (cluster.folder / "ask").chmod(0o700)
    done = cluster.run(1, "true", env={"SSH_ASKPASS": str(cluster.folder / "ask"), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"})
    assert done.returncode == 255 and "Permission denied (publickey)" in done.stderr, done.stderr
    assert not (cluster.folder / "asked").exists()


class Background:
    """A launcher that is still running."""

    def __init__(self, cluster: Cluster, nodes: int, *command):
        self.output = b""
        self.popen = subprocess.Popen([*TRACKER, *cluster.arguments(nodes), *command], cwd=ROOT, stdin=subprocess.DEVNULL,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        os.set_blocking(self.popen.stdout.fileno(), False)

    def until(self, text: bytes, times: int) -> None:
        end = time.monotonic() + PATIENCE
        while self.output.count(text) < times:
            self.output += self.popen.stdout.read() or b""
            assert time.monotonic() < end and self.popen.poll() is None, self.output
            time.sleep(0.01)

    def end(self) -> int:
        try:
            return self.popen.wait(PATIENCE)
        finally:
            if self.popen.poll() is None:
                self.popen.kill()
                self.popen.wait()
            os.set_blocking(self.popen.stdout.fileno(), True)
            self.output += self.popen.stdout.read()
            self.popen.stdout.close()


SLEEP = MEET + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nlapse.Worker(0, server).barrier() if rank else time.sleep(600)\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(cluster, number):
    job = Background(cluster, 3, *program(cluster, SLEEP))
    job.until(b"] up ", 3)
    job.popen.send_signal(number)
    assert job.end() == 128 + number
    assert not cluster.tagged(), "the launcher has ended, and its processes have not"
    assert job.output.count(b"\nlapse: ended by signal %d" % number) == 1


def test_ctrl_c_while_hosts_do_not_answer(cluster):
    """And no host gets more connections at once than an sshd accepts from people who have not logged in."""
    with socket.create_server(("127.0.0.7", 0)) as silent, contextlib.ExitStack() as stack:     # takes connections, says nothing
        cluster.hosts([f"127.0.0.7:{silent.getsockname()[1]}"])
        job = Background(cluster, 12, "true")
        silent.settimeout(PATIENCE)
        for _ in range(ssh.AT_ONCE):
            stack.enter_context(silent.accept()[0])
        silent.settimeout(0.5)
        with pytest.raises(TimeoutError):
            silent.accept()
        job.popen.send_signal(signal.SIGINT)
        assert job.end() == 130, job.output


def test_many_nodes_on_one_host(cluster):
    cluster.hosts([f"{cluster.sshds[0].address}:{cluster.sshds[0].port}"])
    done = cluster.run(9, *program(cluster, REPORT))
    assert done.returncode == 0, done.stderr
    assert [entry["rank"] for entry in facts(done.stdout)] == list(range(9))


def test_a_command_that_is_longer_than_a_pipe(cluster):
    words = [letter * 100_000 for letter in "abc"]
    done = cluster.run(1, sys.executable, "-c", "import sys; print([(word[0], len(word)) for word in sys.argv[1:]])", *words)
    assert done.returncode == 0 and f"] {[(letter, 100_000) for letter in 'abc']}\n" in done.stdout, done.stderr


@pytest.mark.parametrize("what", ["node", "guard"])
def test_a_frozen_node(cluster, what):
    """The node itself, or what watches over it: the launcher ends, and names it."""
    job = Background(cluster, 2, *program(cluster, SLEEP))
    job.until(b"] up ", 2)
    pid = int(re.search(rb"^\[node 1 [\d.]+\] up (\d+)", job.output, re.MULTILINE)[1])
    if what == "guard":
        guard = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(guard, signal.SIGSTOP)
        job.popen.send_signal(signal.SIGTERM)
        assert job.end() == 128 + 15
        os.kill(guard, signal.SIGCONT)
    else:
        os.kill(pid, signal.SIGSTOP)
        assert job.end() != 0
        assert re.search(rb"^lapse: node 1 \(127\.0\.0\.3, pid %d\): " % pid, job.output, re.MULTILINE), job.output
    assert not cluster.gone()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_guard(cluster, number):
    """The node that it watched over dies with it, though it ignores signals. Its folder goes, too, or with the next job."""
    def folders():
        return {path.name for path in Path(os.environ["TMPDIR"]).glob("lapse-*")}

    job = Background(cluster, 2, *program(cluster, SLEEP))
    job.until(b"] up ", 2)
    used = folders()
    subprocess.run([*RUN, "-s", "1", "true"], cwd=ROOT, timeout=PATIENCE, check=True)
    assert len(used) == 2 and folders() == used         # another job leaves them alone
    pid = int(re.search(rb"^\[node 0 [\d.]+\] up (\d+)", job.output, re.MULTILINE)[1])
    os.kill(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]), number)
    assert job.end() != 0
    assert not cluster.gone()
    assert len(folders()) == (number == signal.SIGKILL)
    assert re.search(rb"^lapse: node 0 \(127\.0\.0\.2, pid %d\): " % pid, job.output, re.MULTILINE), job.output
    subprocess.run([*RUN, "-s", "1", "true"], cwd=ROOT, timeout=PATIENCE, check=True)
    assert not folders()


def test_the_death_of_the_launcher(cluster):
    job = Background(cluster, 3, *program(cluster, SLEEP))
    job.until(b"] up ", 3)
    job.popen.kill()
    job.end()
    assert not cluster.gone()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_broken_connection(cluster, rank):
    job = Background(cluster, 3, *program(cluster, SLEEP))
    job.until(b"] up ", 3)
    cluster.sshds[rank].kill()
    assert job.end() != 0
    assert not cluster.gone()
    said = [line for line in job.output.splitlines() if line.startswith(b"lapse: ")]
    assert len(said) == 1 and b"node %d (127.0.0.%d" % (rank, rank + 2) in said[0], job.output
    assert b"the connection to host 127.0.0.%d broke" % (rank + 2) in said[0], job.output


# -- wrong input

@pytest.mark.parametrize(("line", "words"), [
    pytest.param("host:" + "9" * 5000, "9' is not a port", id="host:9..."), ("host:port", "'port' is not a port"),
    ("host:0", "'0' is not a port"), ("host:70000", "'70000' is not a port"),
    ("host:", "'' is not a port"), ("a b", "one host is expected, not 2 words"), ("host slots=4", "2 words"),
    ("-oProxyCommand=id", "'-oProxyCommand=id' is not a host"), ("$(id)", "is not a host"), ("ho/st", "is not a host"),
    ("a;b", "is not a host"), (":22", "is not a host"), ("@host", "is not the name of a user"), ("-l@host", "is not the name of a user"),
    ("[::1", "is not [address]"), ("[::1]x", "is not [address]"), ("[::1]:x", "'x' is not a port"),
])
def test_a_typo_in_the_host_file(cluster, line, words):
    cluster.hosts(["127.0.0.2", line])
    done = cluster.run(2, "true")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"hosts:4: {words}" in done.stderr or re.search(rf"hosts:4: .*{re.escape(words)}", done.stderr), done.stderr
    assert not any(sshd.connections for sshd in cluster.sshds)


def test_host_files_without_hosts(cluster):
    for path, words in ((cluster.hosts([]), "names no host"), (cluster.folder / "none", "No such file"),
                        (cluster.folder, "Is a directory")):
        done = subprocess.run([*TRACKER, "-H", str(path), "-s", "2", "true"], capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 2 and f"{path}: " in done.stderr and words in done.stderr, done.stderr
    (cluster.folder / "hosts").write_bytes(b"\xff\xfe\0")
    assert "not a text file" in cluster.run(2, "true").stderr


@pytest.mark.parametrize(("options", "words"), [
    (["-p", "0"], "a port is in"), (["--ssh-options", "'"], "--ssh-options: No closing quotation"),
    (["--env", "NO_SUCH_VARIABLE"], "no such variable"),
    (["--sync-dir", ""], "--sync-dir: the name of the folder is empty"),
    (["-s", "0"], "at least one node"), (["-n", "2"], "no worker processes"), (["-i", "/no/such/key"], "/no/such/key: cannot be read"),
])
def test_wrong_options(cluster, tmp_path, options, words):
    (tmp_path / "rsync").symlink_to("/bin/false")       # an empty folder's name must not come as far as that
    done = cluster.run(2, "true", options=options, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert not any(sshd.connections for sshd in cluster.sshds)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_options_for_ssh_without_hosts():
    for launcher in (TRACKER, RUN):
        done = subprocess.run([*launcher, "-p", "22", "true"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 2 and "-H FILE" in done.stderr


@pytest.mark.parametrize(("name", "options"), [("ssh", []), ("rsync", ["--sync-dir", "/x"])])
def test_without_the_programs(cluster, tmp_path, name, options):
    for other in ("ssh", "rsync"):
        if other != name and shutil.which(other):
            (tmp_path / other).symlink_to(shutil.which(other))
    done = cluster.run(2, "true", options=options, env={"PATH": str(tmp_path)})
    assert done.returncode == 127 and is_one_sentence(done.stderr), done.stderr
    assert f"lapse: {name}: command not found" in done.stderr


# -- the two ends

def test_a_signal_that_arrives_in_two_parts(monkeypatch):
    parts, sent, begun = [b"2\n1", b"5\n18", b"\n", b""], [], b""
    monkeypatch.setattr(_remote.os, "read", lambda descriptor, size: parts.pop(0))
    monkeypatch.setattr(_remote, "signal_group", lambda group, number: sent.append((group, number)))
    while begun is not None:
        begun = _remote.read_signals(77, begun)
    assert (parts, sent) == ([], [(77, 2), (77, 15), (77, 18)])


@pytest.mark.parametrize("first", [1, 6, 38, 39, 40, 47])
def test_a_report_that_is_read_in_two_parts_after_an_endless_line(first):
    """A line that is too long is broken, but not within a report."""
    out = io.BytesIO()
    node = ssh.RemoteNode(0, subprocess.Popen(["true"]), "host", "python")
    node.process.wait()
    node.started = True
    errors = ssh._Errors(b"", None, out, node)
    report = node.mark + b" ended 7\n"
    errors.feed(b"y" * LINE_BYTES + report[:first])
    errors.feed(report[first:])
    errors.feed(b"")
    assert (node._told, out.getvalue()) == (7, b"y" * LINE_BYTES + b"\n")
