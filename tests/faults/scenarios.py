"""What is done to jobs, how often in a full campaign, and what has to come of it.

A judge looks at a run that has ended and returns sentences about what is wrong. Where processes, files and sockets are left behind,
and where it took too long, is looked at for all.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass

from board import SHUTDOWN
from others import run_disk, run_in_a_row, run_injected, run_starts
from running import codes_of_nodes, run_fault

KILL_SECONDS, FREEZE_SECONDS = 5.0, 6.0
RUNNING = ("training", "barrier", "storm")


@dataclass(frozen=True)
class Scenario:
    name: str
    runs: int                               # in a full campaign
    fault: str = ""
    phases: tuple[str, ...] = ()            # one of them, drawn
    judge: Callable | None = None
    seconds: float = KILL_SECONDS           # within which everything has ended
    transport: str = ""                     # drawn if not given
    by_hand: bool = False                   # a scheduler and nodes without the launcher
    delays: bool = False                    # half of the jobs have nodes that begin late
    run: Callable = run_fault
    scale: float = 1.0                      # of what one run does, where a campaign has only one


def survivors(run):
    return [rank for rank in range(run.nodes) if rank != run.victim]


def check_codes(run):
    """The launcher's exit code is not 0, and none of the nodes ended with 0 but one that had left already."""
    wrong = []
    if run.processes[0].returncode == 0:
        wrong.append("the launcher's exit code is 0")
    codes = codes_of_nodes(run.text())
    if len(codes) != run.nodes:
        wrong.append(f"the launcher tells how {len(codes)} of {run.nodes} nodes ended")
    for rank, how in codes.items():
        if how == "ended with exit code 0" and run.phase != "shutdown":
            wrong.append(f"the exit code of node {rank} is 0")
    return wrong


def check_named(run, cause, *, by_survivors=True):
    """The launcher names the victim and the cause, and so does each survivor that had joined."""
    wrong = []
    named = re.compile(rf"node {run.victim} \(.*\): .*({cause})")
    if not named.search(run.final()):
        wrong.append(f"the launcher does not name node {run.victim} and {cause!r}: {run.final()!r}")
    text = run.text()
    for rank in survivors(run) if by_survivors else ():
        lines = [line for line in text.splitlines() if line.startswith(f"[node {rank}] ")]
        if not any(f"NodeFailure: node {run.victim} " in line for line in lines) and run.board.phase(rank) < SHUTDOWN:
            wrong.append(f"node {rank} does not name node {run.victim}: {lines}")
    return wrong


def killed(run):
    wrong = check_codes(run)
    if run.processes[0].returncode != 137:
        wrong.append(f"the launcher's exit code is {run.processes[0].returncode}, not 137")
    return wrong + check_named(run, r"killed by signal 9 \(SIGKILL\)", by_survivors=run.phase not in ("importing", "joining"))


def frozen(run):
    return check_codes(run) + check_named(run, r"the process is stopped \(no answer to heartbeats\)")


def cut(run):
    """The victim is one of the two ends: it is accused, or it is the one that noticed. Cut from the scheduler, it says so itself."""
    wrong = check_codes(run)
    line = run.final()
    alone = re.search(rf"^\[node {run.victim}\] NodeFailure: the job failed \(.*\): the connection to the scheduler at ", run.text(), re.M)
    if not re.search(rf"node {run.victim}\b", line) or not (alone or re.search("connection|heartbeat", line)):
        wrong.append(f"the launcher does not name node {run.victim} and its connection: {line!r}")
    return wrong


def scheduler_gone(run):
    """Each node ends with a code of its own and says that it is the scheduler."""
    wrong = []
    for rank, process in enumerate(run.processes[1:]):
        if process.returncode == 0 and run.phase != "shutdown":
            wrong.append(f"the exit code of node {rank} is 0")
    told = re.findall(r"NodeFailure: the job failed \(127\.0\.0\.1, pid (\d+)\): the connection to the scheduler at", run.text())
    if run.phase != "shutdown" and told != [str(run.processes[0].pid)] * run.nodes:
        wrong.append(f"{len(told)} of {run.nodes} nodes name the scheduler")
    return wrong


def launcher_gone(run):
    """Nobody is left to say anything."""
    return []


def interrupted(run):
    code = run.processes[0].returncode
    wrong = [] if code == 130 else [f"the launcher's exit code is {code}, not 130"]
    if "ended by signal 2 (SIGINT)" not in run.final():
        wrong.append(f"the launcher does not say that it was interrupted: {run.final()!r}")
    return wrong


def raised(run):
    return check_codes(run) + check_named(run, "Disturbed: told to", by_survivors=False)


def exited(run):
    return check_codes(run) + check_named(run, "exit code 3")


SCENARIOS = [
    Scenario("kill-importing", 50, "kill", ("importing",), killed, delays=True),
    Scenario("kill-joining", 50, "kill", ("joining",), killed, delays=True),
    Scenario("kill-training", 100, "kill", ("training",), killed),
    Scenario("kill-barrier", 100, "kill", ("barrier",), killed),
    Scenario("kill-storm", 100, "kill", ("storm",), killed),
    Scenario("kill-shutdown", 100, "kill", ("shutdown",), killed),
    Scenario("freeze", 20, "freeze", RUNNING, frozen, FREEZE_SECONDS),
    Scenario("freeze-bulk", 20, "freeze", ("bulk",), frozen, FREEZE_SECONDS, transport="ipc"),
    Scenario("cut", 20, "cut", (*RUNNING, "bulk"), cut, FREEZE_SECONDS),
    Scenario("cut-silently", 20, "silence", (*RUNNING, "bulk"), cut, FREEZE_SECONDS, transport="tcp"),
    Scenario("kill-scheduler", 20, "kill first", RUNNING, scheduler_gone, by_hand=True),
    Scenario("freeze-scheduler", 10, "freeze first", RUNNING, scheduler_gone, FREEZE_SECONDS, by_hand=True),
    Scenario("kill-launcher", 20, "kill first", ("importing", "joining", *RUNNING, "shutdown"), launcher_gone),
    Scenario("interrupt", 20, "interrupt first", RUNNING, interrupted),
    Scenario("raise", 10, "raise", RUNNING, raised),
    Scenario("exit", 10, "exit", RUNNING, exited),
    Scenario("full-disk", 5, seconds=30.0, run=run_disk),
    Scenario("injected", 200, seconds=60.0, run=run_injected),
    Scenario("starts", 25, seconds=120.0, run=run_starts),
    Scenario("in-a-row", 1, seconds=1800.0, run=run_in_a_row),
]
