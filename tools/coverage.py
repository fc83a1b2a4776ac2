"""`make coverage`: which lines and branches of the protocol the simulation comes by.

Counted in what Cython has parsed, so that nothing of Cython's own code is among it: a line for each statement, and two branches for each
condition of an if, a while or an `x if c else y`, and for each operand of its and/or. (A for loop has none: that it was entered is in the
lines of its body.)

Schedules run without faults; then with a network that garbles messages, or loses, doubles or reorders them without sequence numbers;
and with one allocation that fails, after which nothing may crash, hang, or be silently wrong. What is not reached has to be in
tools/uncovered.txt with the reason. Exit code 0: nothing else is missing, and 95 % of lines and branches are reached, without those that
need a bug which tests put in, and what the list says cannot be reached.
"""
from __future__ import annotations

import argparse
import ctypes
import importlib.util
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools/mutants"))

import schemata  # noqa: E402
from Cython.Compiler import ExprNodes, Nodes, PyrexTypes  # noqa: E402

SOURCES = [f"lapse/{name}" for name in (
    "_protocol.pyx", "_routing.pyx", "_directory.pxd", "_directory.pyx", "_transfers.pxd", "_transfers.pyx", "_answers.pyx", "_pins.pyx",
    "_operations.pxd", "_operations.pyx")]
NETWORK = ["garble", "garble", "garble", "garble", "loss,no_sequence", "reorder,no_sequence", "duplicate,no_sequence"]
GOAL = 95                       # percent


class Point(NamedTuple):
    """A statement (what: ""), or one way that a condition can go; `text` is that of the line, `what` the condition and its value."""
    number: int
    file: str
    function: str
    text: str
    what: str
    nth: int
    line: int
    column: int
    fault: bool                 # needs a fault that the tests put in

    @property
    def key(self) -> str:
        name = f"{self.file}:{self.function} | {self.text}" + (f" | {self.what}" if self.what else "")
        return name + (f" #{self.nth}" if self.nth else "")


class Marker(schemata.Walk):
    """Puts a mark to everything in the functions of one file that is to be reached."""

    fault = False               # whether what is walked over needs a fault that the tests put in

    def mark(self, node, value: str, what: str):
        """value "1" or "0": what the mark is as an expression."""
        number, text, nth = self.number(node, what)
        self.mutants.append(Point(number, self.name, self.function, text, what, nth, *node.pos[1:], self.fault))
        return ExprNodes.RawCNameExprNode(node.pos, type=PyrexTypes.c_bint_type, cname=f"LAPSE_REACHED({number}, {value})")

    def body(self, node, only_faults: bool):
        self.fault = only_faults and self.function != "between"
        return self.statement(node)

    def statement(self, node):
        """A list of the statements, each with its mark before it."""
        stats = node.stats if isinstance(node, Nodes.StatListNode) else [node]
        marked = []
        for each in stats:
            plain = isinstance(each, (Nodes.CVarDefNode, Nodes.PassStatNode)) or (
                isinstance(each, Nodes.ExprStatNode) and isinstance(each.expr, ExprNodes.UnicodeNode))
            if not plain:
                marked.append(Nodes.ExprStatNode(each.pos, expr=self.mark(each, "1", "")))
            marked.append(self.inside(each))
        return Nodes.StatListNode(node.pos, stats=marked)

    def inside(self, node):
        if isinstance(node, Nodes.IfStatNode):
            return self.branch(node)
        if isinstance(node, Nodes.CVarDefNode):
            for declarator in map(schemata.declared_name, node.declarators):
                if declarator.default is not None:
                    declarator.default = self.expression(declarator.default)
            return node
        for attribute in node.child_attrs or ():
            child = getattr(node, attribute)
            if isinstance(child, (Nodes.StatNode, Nodes.StatListNode)):
                setattr(node, attribute, self.statement(child))
            elif attribute == "condition":
                node.condition = self.condition(child)
            elif isinstance(child, ExprNodes.ExprNode):
                setattr(node, attribute, self.expression(child))
        return node

    def branch(self, node):
        outer, dead = self.fault, False
        for clause in node.if_clauses:
            value = schemata.without_faults(clause.condition)
            if schemata.names_in(clause.condition) & schemata.CLASSES["fault"]:
                value = False
            self.fault = outer or dead
            clause.condition = self.condition(clause.condition)
            self.fault = outer or dead or value is False
            clause.body = self.statement(clause.body)
            dead = dead or value is True
        self.fault = outer or dead
        if node.else_clause is not None:
            node.else_clause = self.statement(node.else_clause)
        self.fault = outer
        return node

    def condition(self, node):
        """A condition that notes how it went, and so do its operands."""
        if isinstance(node, ExprNodes.BoolBinopNode):
            outer = self.fault
            first = schemata.without_faults(node.operand1)
            node.operand1 = self.condition(node.operand1)
            self.fault = outer or (first is not None and first == (node.operator == "or"))
            node.operand2 = self.condition(node.operand2)
            self.fault = outer
            return node
        if isinstance(node, ExprNodes.NotNode):
            node.operand = self.condition(node.operand)
            return node
        if isinstance(node, ExprNodes.BoolNode):
            return node
        # (without faults: what a condition about them cannot be)
        value, outer = schemata.without_faults(node), self.fault
        if schemata.names_in(node) & schemata.CLASSES["fault"]:
            value = False
        source = self.source_of(node)
        ways = []
        for way in (True, False):
            self.fault = outer or (value is not None and value != way)
            ways.append(self.mark(node, str(int(way)), f"{source} is {way}"))
        self.fault = outer
        node = self.expression(node)
        return ExprNodes.CondExprNode(node.pos, condition=node, true_val=ways[0], false_val=ways[1])

    def source_of(self, node) -> str:
        """The condition as text, near enough to know it by."""
        if isinstance(node, ExprNodes.PrimaryCmpNode):
            text, link = self.source_of(node.operand1), node
            while link is not None:
                text += f" {link.operator} {self.source_of(link.operand2)}"
                link = link.cascade
            return text
        if isinstance(node, ExprNodes.NameNode):
            return node.name
        if isinstance(node, ExprNodes.NullNode):
            return "NULL"
        if isinstance(node, ExprNodes.IntNode):
            return node.value
        if isinstance(node, ExprNodes.UnaryMinusNode):
            return f"-{self.source_of(node.operand)}"
        if isinstance(node, ExprNodes.AttributeNode):
            return f"{self.source_of(node.obj)}.{node.attribute}"
        if isinstance(node, ExprNodes.TypecastNode):
            return self.source_of(node.operand)
        if isinstance(node, ExprNodes.IndexNode):
            return f"{self.source_of(node.base)}[{self.source_of(node.index)}]"
        if isinstance(node, ExprNodes.SimpleCallNode):
            return f"{self.source_of(node.function)}({', '.join(self.source_of(arg) for arg in node.args)})"
        if isinstance(node, ExprNodes.NumBinopNode):
            return f"{self.source_of(node.operand1)} {node.operator} {self.source_of(node.operand2)}"
        if isinstance(node, ExprNodes.AmpersandNode):
            return f"&{self.source_of(node.operand)}"
        return type(node).__name__.removesuffix("Node").lower()

    def expression(self, node):
        """Conditions inside of an expression."""
        if isinstance(node, ExprNodes.CondExprNode):
            node.condition = self.condition(node.condition)
            node.true_val, node.false_val = self.expression(node.true_val), self.expression(node.false_val)
            return node
        if isinstance(node, ExprNodes.BoolBinopNode):
            return self.condition(node)
        for attribute in node.child_attrs or ():
            child = getattr(node, attribute)
            if isinstance(child, list):
                setattr(node, attribute, [self.expression(each) if isinstance(each, ExprNodes.ExprNode) else each for each in child])
            elif isinstance(child, ExprNodes.ExprNode):
                setattr(node, attribute, self.expression(child))
        return node


def reasons_of(path: Path) -> dict[str, str]:
    """{key of a point: why it is not reached}; a line `= reason` is about all keys up to the next one."""
    found: dict[str, str] = {}
    reason = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("= "):
            reason = line[2:]
            if not reason.startswith(("cannot: ", "rare: ")):
                raise SystemExit(f"{path}:{number}: a reason has to be `cannot: ...` or `rare: ...`")
        elif line.strip() and not line.startswith("#"):
            if not reason or line in found:
                raise SystemExit(f"{path}:{number}: {'twice' if reason else 'without a reason'}: {line}")
            found[line] = reason
    return found


def build(tree: Path) -> list[Point]:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools/mutants/__main__.py")
    mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    mutants.copy_tree(tree)
    made = schemata.Build(tree, SOURCES, Marker)
    for source in [*SOURCES, *mutants.PLAIN]:
        if source.endswith(".pyx"):
            made.module(source)
    if made.left_out:
        raise SystemExit("coverage: some conditions could not be marked")
    return [point for name in SOURCES for point in made.mutants[name]]


def run(tree: Path, schedules: int) -> tuple[set[int], set[int]]:
    """The numbers of the points that some schedule has come by: without any fault; and with those of the network and of memory, too."""
    library = ctypes.CDLL(str(tree / "selector.so"), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(tree))
    from detect import starved

    from lapse.testing import campaign
    if not Path(campaign.__file__).is_relative_to(tree):
        raise SystemExit(f"coverage: {campaign.__file__} was loaded, not the copy in {tree}")
    settings = campaign.configurations()
    for seed in range(1, schedules + 1):
        violation = campaign.attempt(seed, campaign.varied(seed, settings))
        if violation is not None:
            raise SystemExit(f"coverage: {violation}")
    reached = (ctypes.c_ubyte * schemata.MOST).in_dll(library, "lapse_reached")
    plain = {i for i, value in enumerate(reached) if value}
    for seed in range(1, 6 * schedules + 1):
        chosen = campaign.WIDE[seed % len(campaign.WIDE)] if seed % 10 == 0 else campaign.setting_of(seed, settings)
        campaign.attempt(seed, {**chosen, "faults": NETWORK[seed % len(NETWORK)]})
    fails_at = ctypes.c_int.in_dll(library, "lapse_fails_at")
    for seed in range(1, schedules + 1):
        if problem := starved(campaign, fails_at, seed, settings):
            raise SystemExit(f"coverage: an allocation that fails leads to: {problem}")
    return plain, {i for i, value in enumerate(reached) if value}


def percent(part, whole) -> str:
    return f"{len(part):5} of {len(whole):4} {100 * len(part) / len(whole) if whole else 100:6.1f} %"


def report(points: list[Point], reached: set[int], how: str) -> float:
    """Print the table; returns the lowest figure of all files together."""
    print(f"{how:26}{'lines':>22}{'branches':>22}")
    figures = []
    for name in [*SOURCES, None]:
        chosen = [p for p in points if name in (None, p.file) and not p.fault]
        lines = {(p.file, p.line) for p in chosen if not p.what}
        lines_reached = {(p.file, p.line) for p in chosen if not p.what and p.number in reached}
        branches = [p for p in chosen if p.what]
        branches_reached = [p for p in branches if p.number in reached]
        print(f"{(name or 'all').removeprefix('lapse/'):26}{percent(lines_reached, lines):>22}{percent(branches_reached, branches):>22}")
        figures = [100 * len(lines_reached) / len(lines), 100 * len(branches_reached) / max(len(branches), 1)]
    return min(figures)


def main() -> int:
    p = argparse.ArgumentParser(prog="python tools/coverage.py", description=__doc__.split("\n")[0])
    p.add_argument("--schedules", type=int, default=3000, help="(default: %(default)s)")
    p.add_argument("--uncovered", action="store_true", help="print all that is not reached, with the reason")
    args = p.parse_args()
    if args.schedules < 1:
        p.error("--schedules: expected a number above 0")
    begin = time.monotonic()
    tree = ROOT / "build/coverage/tree"
    tree.parent.mkdir(parents=True, exist_ok=True)
    points = build(tree)
    built = time.monotonic()
    plain, reached = run(tree, args.schedules)
    report(points, plain, "without faults")
    report(points, reached, "network or memory fails")
    reasons = reasons_of(ROOT / "tools/uncovered.txt")
    cannot = {p.number for p in points if p.number not in reached and reasons.get(p.key, "").startswith("cannot")}
    lowest = report([p for p in points if p.number not in cannot], reached, "of what can be reached")
    print(f"and {sum(p.fault for p in points)} lines and branches that need a bug which tests put in")
    print(f"{args.schedules} schedules; {built - begin:.0f} s to build, {time.monotonic() - built:.0f} s to run")
    missing = {point.key: point for point in points if point.number not in reached and not point.fault}
    if args.uncovered:
        for key, point in missing.items():
            print(f"{point.file}:{point.line}: {key}: {reasons.get(key, 'NO REASON')}")
    wrong = [f"not reached, and no reason is given: {key}" for key in missing if key not in reasons]
    wrong += [f"has a reason not to be reached, but {'is' if key in {p.key for p in points} else 'is not in the code'}: {key}"
              for key in reasons if key not in missing]
    if lowest < GOAL:
        wrong.append(f"{lowest:.1f} % of the lines or branches are reached, fewer than {GOAL} %")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("coverage: interrupted", file=sys.stderr)
        sys.exit(130)
