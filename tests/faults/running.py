"""One job and one fault: start the processes, wait for the phase, disturb, and look at what comes of it."""
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

from board import END, ORDERS, PHASES, SHUTDOWN, Board
from launched import GRACE, PROC, ROOT, Jobs
from ports import reserved_port

JOB = "tests/faults/job.py"
TICK = 0.0005           # seconds between two looks at the board
PATIENCE = 60.0         # seconds until a job must have reached its phase, and until one that was disturbed is given up
TOKEN = "0123456789abcdef"


@dataclass
class Outcome:
    """What a run has shown. `wrong` says what should not have been; `missed`: the fault did not fall into its phase."""

    seconds: float = 0.0                    # from the fault until nothing runs any more
    wrong: list = field(default_factory=list)
    missed: bool = False
    text: str = ""
    note: str = ""                          # what kind of right outcome it was, where there are several


class Run:
    """The processes of one job. `with Run(...) as run` leaves nothing behind."""

    def __init__(self, scenario, seed, attempt):
        self.scenario = scenario
        self.chance = random.Random(f"{scenario.name} {seed} {attempt}")
        self.seed = self.chance.randrange(1 << 30)
        self.nodes = self.chance.randint(2, 4)
        self.transport = scenario.transport or self.chance.choice(("ipc", "tcp"))
        self.phase = self.chance.choice(scenario.phases or ("end",))
        self.victim = self.chance.randrange(self.nodes)
        self.delay = self.chance.choice((0.0, 0.3)) if scenario.delays else 0.0
        self.jobs = Jobs()
        path = self.jobs.output / "board"
        self.board = Board(path, create=True)
        self.words = [str(path), self.phase, str(self.seed), str(self.delay), "--sys.transport", self.transport]
        self.output = self.jobs.output / "output"
        self.resources = contextlib.ExitStack()
        self.processes: list[subprocess.Popen] = []     # those that this process has started: the launcher, or all
        self.sockets: set[str] = set()
        self.instant = 0.0                              # of the fault

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.resources.close()
        self.left = self.jobs.close()

    # -- starting

    def start(self, command, environ=None):
        with self.output.open("ab") as output:
            self.processes.append(subprocess.Popen(command, cwd=ROOT, env={**self.jobs.env, **(environ or {})}, stdin=subprocess.DEVNULL,
                                                   stdout=output, stderr=output, start_new_session=True))

    def launch(self):
        """The launcher, and the nodes by it."""
        self.start([sys.executable, "-m", "lapse", "run", "--log-level", "INFO", "-s", str(self.nodes), sys.executable, JOB, *self.words])

    def start_all(self):
        """A scheduler in a process of its own, and each node, as the trackers of a cluster start them."""
        port = self.resources.enter_context(reserved_port())
        common = {"DMLC_NUM_SERVER": str(self.nodes), "DMLC_NUM_WORKER": "0", "DMLC_PS_ROOT_URI": "127.0.0.1",
                  "DMLC_PS_ROOT_PORT": str(port), "LAPSE_TOKEN": TOKEN}
        self.start([sys.executable, JOB, *self.words], {**common, "DMLC_ROLE": "scheduler"})
        for rank in range(self.nodes):
            self.start([sys.executable, JOB, *self.words], {**common, "DMLC_ROLE": "server", "LAPSE_RANK": str(rank)})

    # -- waiting

    def reach(self, phase, ranks):
        """Wait until all of these nodes have come so far; False if they have not."""
        end = time.monotonic() + PATIENCE
        while any(self.board.phase(rank) < PHASES[phase] for rank in ranks):
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(TICK)
        return True

    def wait_for_end(self):
        """Wait until no process of the job is there; the seconds since the fault."""
        end = time.monotonic() + PATIENCE
        if self.scenario.fault == "freeze first":
            nodes, frozen = self.processes[1:], self.processes[:1]
        else:
            nodes, frozen = self.processes, []
        for process in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
        for process in frozen:      # whoever started it would have to end it
            process.kill()
            process.wait()
        while self.jobs.processes() and time.monotonic() < end:
            time.sleep(0.01)
        return time.monotonic() - self.instant

    def note_sockets(self):
        """Remember the sockets that the processes of the job have."""
        for pid in self.jobs.processes():
            with contextlib.suppress(OSError):
                for entry in (PROC / str(pid) / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        link = str(entry.readlink())
                        if link.startswith("socket:"):
                            self.sockets.add(link[8:-1])

    def open_sockets(self):
        """Those of the noted sockets that still exist after GRACE, as this network namespace shows them.

        A process that ends loses its environment, by which it is known, before its sockets: it may be at that when the job counts as over.
        """
        end = time.monotonic() + GRACE
        while (found := self.sockets_now()) and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def sockets_now(self):
        found = []
        for name, column in (("tcp", 9), ("tcp6", 9), ("unix", 6)):
            for line in (PROC / "self/net" / name).read_text().splitlines()[1:]:
                words = line.split()
                if words[column] in self.sockets and words[column] != "0":
                    found.append(f"{name} {line.strip()}")
        return found

    # -- the faults

    def disturb(self, fault):
        """Do it to the victim, and note when. The scheduler and the launcher are the first process."""
        victim = self.board.pid(self.victim)
        self.instant = time.monotonic()
        if fault == "kill":
            os.kill(victim, signal.SIGKILL)
        elif fault == "freeze":
            os.kill(victim, signal.SIGSTOP)
        elif fault in ORDERS:
            self.board.order(self.victim, ORDERS[fault])
        elif fault in ("kill first", "freeze first", "interrupt first"):
            name = {"k": signal.SIGKILL, "f": signal.SIGSTOP, "i": signal.SIGINT}[fault[0]]
            os.kill(self.processes[0].pid, name)
        else:
            raise ValueError(fault)

    def text(self):
        return self.output.read_text(errors="replace")

    def final(self):
        """The last line that the launcher wrote about the job's end."""
        said = re.compile(r"lapse: (?!node \d+ \(pid \d+\) |started |sending |the scheduler listens )")
        lines = [line for line in self.text().splitlines() if said.match(line)]
        return lines[-1] if lines else ""


def run_fault(scenario, seed, attempt, typical):
    """Run a job of this scenario and disturb it. `typical`: seconds that importing, joining and shutdown take."""
    outcome = Outcome()
    with Run(scenario, seed, attempt) as run:
        run.start_all() if scenario.by_hand else run.launch()
        short = run.phase in typical
        if not run.reach(run.phase, [run.victim] if short else range(run.nodes)):
            outcome.wrong.append(f"the job did not come to its phase ({run.phase})")
        else:
            time.sleep(run.chance.random() * (1.2 * typical[run.phase] if short else 0.5))
            before = run.board.phase(run.victim)
            if not short or scenario.by_hand:
                run.note_sockets()
            run.disturb(scenario.fault)
            outcome.seconds = run.wait_for_end()
            # A process that was killed died in the phase that the board still says.
            after = run.board.phase(run.victim) if scenario.fault == "kill" else before
            outcome.missed = after != PHASES[run.phase] or before != after
            if not outcome.missed:
                outcome.wrong += scenario.judge(run)
        outcome.text = (f"{run.nodes} nodes, {run.transport}, {run.phase}, victim {run.victim}, {outcome.seconds:.2f} s, exit codes "
                        f"{[process.poll() for process in run.processes]}\n{run.text()}")
    processes, files = run.left
    for what, left in (("processes", list(processes.values())), ("files", files), ("sockets", run.open_sockets())):
        if left:
            outcome.wrong.append(f"left behind: {what} {left}")
    return outcome


def run_healthy(scenario, seed):
    """Run a job to its normal end; {phase: seconds} of the phases that one cannot wait in."""
    with Run(scenario, seed, 0) as run:
        run.launch()
        began, seen = {}, [0] * run.nodes
        ended = False
        while not ended:
            ended = run.processes[0].poll() is not None
            for rank in range(run.nodes):
                phase = run.board.phase(rank)
                for passed in range(seen[rank] + 1, phase + 1):     # several, when this process had no time to look
                    began[rank, passed] = time.monotonic()
                seen[rank] = phase
            time.sleep(TICK)
        if run.processes[0].returncode or seen != [END] * run.nodes:
            raise RuntimeError(f"a job that nobody disturbed failed: {run.text()}")
        last = {rank: began[rank, SHUTDOWN] for rank in range(run.nodes)}
        return {"importing": began[0, PHASES["joining"]] - began[0, PHASES["importing"]],
                "joining": began[0, PHASES["joining"] + 1] - began[0, PHASES["joining"]],
                "shutdown": min(began[rank, END] - last[rank] for rank in last)}       # (others wait for who comes last)


def codes_of_nodes(text):
    """{rank: how it ended} as the launcher tells (at INFO)."""
    return {int(rank): how for rank, how in re.findall(r"^lapse: node (\d+) \(pid \d+\) (.*)$", text, re.MULTILINE)}
