"""Runs that are not one fault at one instant: full disks, many starts at once, jobs in a row, faulty channels."""
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from board import PHASES
from launched import ROOT
from running import Outcome, Run

HISTORY = "tests/cluster/test_consistency.py"
AT_ONCE = 20            # jobs that start at the same time
STARTS = 120.0          # seconds for them
ENDLESS = 60.0          # seconds after which a job with faulty channels is interrupted, which is wrong
KINDS = ("loss", "double", "reorder", "delay")
MOUNT = ('mount -t tmpfs -o "$1" tmpfs "$2" || exit 99; full="$2"; shift 2; "$@"; code=$?; '
         'find "$full" -mindepth 1 -not -name "worker-*" -exec echo "left on the full disk: {}" ";"; exit $code')


def finish(run, outcome):
    """What all runs are asked in the end."""
    processes, files = run.left
    for what, left in (("processes", list(processes.values())), ("files", files)):
        if left:
            outcome.wrong.append(f"left behind: {what} {left}")
    return outcome


def run_disk(scenario, seed, attempt, typical):
    """A disk without room for a socket, for the lock of the sockets' folder, for the second socket, for a program's results, for output."""
    outcome = Outcome()
    with Run(scenario, seed, attempt) as run:
        full = run.jobs.output / "full"
        full.mkdir()
        job = [sys.executable, "-m", "lapse", "run", "-s", str(run.nodes), sys.executable]
        case = seed % 5
        if case == 4:
            command, wanted = [*job, "-c", "print('x' * 100000)"], "cannot write the output of the nodes: No space left on device"
        else:
            room, name = [("nr_inodes=3", "TMPDIR="), ("nr_inodes=2", "TMPDIR="), ("nr_inodes=4", "TMPDIR="), ("size=8k", "OUT=")][case]
            job = [*job, HISTORY, "--pulls", "20000", "--sys.transport", "ipc"] + (["--out", str(full)] if case == 3 else [])
            command = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", room, str(full), "env", f"{name}{full}", *job]
            wanted = ["cannot listen on .*: No space left", "cannot make a folder for ipc sockets", "cannot listen on .*: No space left",
                      "No space left on device"][case]
        if shutil.which("unshare") is None:
            outcome.wrong.append("unshare is not installed")
        with run.output.open("wb") as output, Path("/dev/full").open("wb") as nowhere:
            start = time.monotonic()
            process = subprocess.Popen(command, cwd=ROOT, env=run.jobs.env, stdin=subprocess.DEVNULL,
                                       stdout=nowhere if case == 4 else output, stderr=output, start_new_session=True)
            run.processes.append(process)
            process.wait(60)
            outcome.seconds = time.monotonic() - start
        text = run.text()
        if process.returncode in (0, 99):
            outcome.wrong.append(f"the exit code is {process.returncode}")
        if not re.search(wanted, text):
            outcome.wrong.append(f"nothing says {wanted!r}")
        if "left on the full disk" in text or ("Traceback" in text and case != 3):
            outcome.wrong.append("a file is left on the full disk, or something ended with a traceback")
        outcome.text = f"case {case}, exit code {process.returncode}\n{text}"
    return finish(run, outcome)


def run_starts(scenario, seed, attempt, typical):
    """Many jobs at once on one host, each of whose nodes begins when it likes: none may meet another's."""
    outcome = Outcome()
    start = time.monotonic()
    runs = [Run(scenario, seed * AT_ONCE + i, attempt) for i in range(AT_ONCE)]
    try:
        for run in runs:
            run.words[1], run.words[3] = "end", "2.0"
            run.launch()
        for run in runs:
            code = run.processes[0].wait(max(1.0, STARTS + start - time.monotonic()))
            if code or any(run.board.phase(rank) != PHASES["shutdown"] + 1 for rank in range(run.nodes)):
                outcome.wrong.append(f"a job failed with exit code {code}")
                outcome.text += run.text()
    except subprocess.TimeoutExpired:
        outcome.wrong.append(f"not all had ended after {STARTS:g} s")
    finally:
        for run in runs:
            run.__exit__()
            finish(run, outcome)
    outcome.seconds = time.monotonic() - start
    return outcome


def run_in_a_row(scenario, seed, attempt, typical):
    """Jobs in a row, and nodes that start and stop, in one process, which has to look the same afterwards, and so has its /dev/shm."""
    outcome = Outcome()
    with Run(scenario, seed, attempt) as run:
        start = time.monotonic()
        jobs, cycles = max(5, round(200 * scenario.scale)), max(20, round(1000 * scenario.scale))
        run.start(["unshare", "-rm", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh",
                   sys.executable, "tests/faults/in_a_row.py", str(jobs), str(cycles)])
        code = run.processes[0].wait(1800)
        outcome.seconds = time.monotonic() - start
        outcome.text = run.text()
        if code:
            outcome.wrong.append(f"the exit code is {code}")
    return finish(run, outcome)


def run_injected(scenario, seed, attempt, typical):
    """A job whose channels lose, double, reorder or delay messages: the right history, or an abort that names both ends of a channel."""
    outcome = Outcome()
    with Run(scenario, seed, attempt) as run:
        start = time.monotonic()
        kind = KINDS[seed % 4]
        chance = 10 ** run.chance.uniform(-4, -2) if kind != "delay" else run.chance.uniform(0.02, 0.5)
        words = ["--pulls", "20000" if kind == "delay" else "200000", "--seed", str(seed), "--inject", f"{kind}={chance:.6f}",
                 "--out", str(run.jobs.output / "reads"), "--sys.transport", run.transport, "--sys.location_caches", str(seed // 4 % 2),
                 *run.chance.choice(([], ["--workload", "race", "--batch", "2"]))]
        run.start([sys.executable, "-m", "lapse", "run", "--log-level", "INFO", "-s", str(run.nodes), sys.executable, HISTORY, *words])
        process = run.processes[0]
        interrupted = False
        while process.poll() is None:
            time.sleep(0.01)
            if time.monotonic() - start > ENDLESS and not interrupted:
                interrupted = True
                process.send_signal(2)
        run.instant = start
        outcome.seconds = run.wait_for_end()
        text, line = run.text(), run.final()
        outcome.text = f"{' '.join(words)}, {run.nodes} nodes, exit code {process.returncode}\n{text}"
        broke = "broke the protocol: a message that was lost, doubled or out of order"
        named = re.search(rf"node (\d+) \(.*\): {broke}.*; noticed by node (\d+) ", line)
        if "WRONG" in text:
            outcome.note = "wrong value"
            outcome.wrong.append("a wrong value")
        elif process.returncode == 0 and len(re.findall(r"test_consistency: OK", text)) == run.nodes:
            outcome.note = f"{kind}: right"
        elif kind != "delay" and process.returncode and named and named[1] != named[2]:
            outcome.note = f"{kind}: aborted, both nodes named"
        else:
            outcome.note = f"{kind}: otherwise"
            outcome.wrong.append(f"neither the right result nor an abort that names the channel: {line!r}")
    return finish(run, outcome)
