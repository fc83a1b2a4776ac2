"""All mutants of some Cython sources in one build: each is chosen at run time, by a number in memory.

Design: what Cython has parsed is changed before it is compiled. An expression `a < b` becomes `a <= b if lapse_mutant == 17 else a < b`, a
statement is left out if its number is chosen, so that nothing is rebuilt from mutant to mutant ("mutant schemata": Untch, Offutt, Harrold,
1993). 0 chooses none. Mutants that do not compile are found by the errors, and left out.
"""
from __future__ import annotations

import contextlib
import copy
import io
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from Cython.Compiler import Errors, ExprNodes, Main, Nodes, PyrexTypes

PER_FILE = 10_000               # numbers of mutants

COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
BINARY = {"+": "-", "-": "+", "*": "+", "//": "*", "%": "+", "&": "|", "|": "&", "^": "|", "<<": ">>", ">>": "<<"}
BOOLEAN = {"and": "or", "or": "and"}
# Classes of mutants by the names that a statement mentions; the first that fits counts.
CLASSES = {
    "prefetch": {"prefetch_write", "prefetch_read", "expect_slot", "expect_row", "expect_owner", "SLOT_AHEAD", "ROW_AHEAD"},
    "tracing": {"trace_", "trace_add"},
    "statistics": {"tally", "counters_", "note_relocation", "counted", "wanted"},
    "fault": {"settle_late", "between", "copy_early", "early", "late_used", "late_keys", "late_owners", "late_epochs", "late_due"},
    "memory": {"ERR_MEMORY", "NO_MEMORY", "SEND_FAILED", "ERR_FAILED"},
}
NOT_PROTOCOL = {"check_key", "watch", "op_finished"}        # for Python; for sampling; for those who wait, in other modules
ONLY_FAULTS = {"settle_late", "copy_early", "transfer_prepend", "between"}      # functions


class Mutant(NamedTuple):
    """file:function, the text of its line, what is changed there, which of several equal ones; line: for people only."""
    number: int
    file: str
    function: str
    source: str
    change: str
    nth: int
    line: int
    column: int
    kind: str                   # "code"; one of CLASSES; "report": what a violation says it is about

    @property
    def key(self) -> str:
        return f"{self.file}:{self.function} | {self.source} | {self.change}" + (f" #{self.nth}" if self.nth else "")


def names_in(node) -> set[str]:
    """The names and attributes below a node."""
    found = set()
    if isinstance(node, (list, tuple)):
        for child in node:
            found |= names_in(child)
    elif isinstance(node, Nodes.Node):
        found |= {node.name} if isinstance(node, ExprNodes.NameNode) else set()
        found |= {node.attribute} if isinstance(node, ExprNodes.AttributeNode) else set()
        for attribute in node.child_attrs or ():
            found |= names_in(getattr(node, attribute))
    return found


def clone(node):
    """A copy of a parsed tree."""
    if isinstance(node, list):
        return [clone(child) for child in node]
    if not isinstance(node, Nodes.Node):
        return node
    made = copy.copy(node)
    for attribute in node.child_attrs or ():
        setattr(made, attribute, clone(getattr(node, attribute)))
    return made


def without_faults(node):
    """The value of a condition when no fault is on: True, False, or None if it depends on more than that."""
    if isinstance(node, ExprNodes.NumBinopNode) and node.operator == "&" and "faults" in names_in(node.operand1):
        return False if "FINE_STEPS" not in names_in(node) else None
    if isinstance(node, ExprNodes.NotNode):
        value = without_faults(node.operand)
        return None if value is None else not value
    if isinstance(node, ExprNodes.SimpleCallNode) and names_in(node.function) <= {"unlikely", "likely"}:
        return without_faults(node.args[0])
    if isinstance(node, ExprNodes.BoolBinopNode):
        values = [without_faults(node.operand1), without_faults(node.operand2)]
        deciding = node.operator == "or"
        return deciding if deciding in values else None if None in values else not deciding
    return None


class Walk:
    """Over the functions of one parsed file that are the protocol's; `body` changes each, and puts what it has numbered into `mutants`."""

    def __init__(self, path: Path, name: str, base: int, left_out: set[int]):
        self.name, self.used, self.left_out = name, base, left_out
        self.lines = path.read_text(encoding="utf-8").splitlines()
        self.mutants: list = []
        self.seen: Counter = Counter()
        self.function = ""

    def tree(self, node) -> None:
        if isinstance(node, Nodes.CFuncDefNode):
            self.function = declared_name(node.declarator).name
            if self.function not in NOT_PROTOCOL:
                node.body = self.body(node.body, self.function in ONLY_FAULTS)
            return
        for attribute in node.child_attrs or ():
            child = getattr(node, attribute)
            for each in child if isinstance(child, list) else [child]:
                if isinstance(each, Nodes.Node):
                    self.tree(each)

    def body(self, node, only_faults: bool):
        raise NotImplementedError

    def number(self, node, what: str) -> tuple[int, str, int]:
        """One more: its number, the text of its line, which of several equal ones it is."""
        self.used += 1
        source = " ".join(self.lines[node.pos[1] - 1].split("  #")[0].split())
        nth = self.seen[self.function, source, what]
        self.seen[self.function, source, what] += 1
        return self.used, source, nth


def declared_name(declarator):
    """The declarator with the name, within those of pointers, arrays and functions."""
    while not hasattr(declarator, "name"):
        declarator = declarator.base
    return declarator


class Mutator(Walk):
    """Puts the mutants of one file into its tree. `left_out`: numbers of those without any."""

    kind = "code"

    # --- numbers ----------------------------------------------------------------------------------------------------------

    def chosen(self, node, change: str):
        """A condition for one more mutant, or None if it is to be left out."""
        number, source, nth = self.number(node, change)
        mutant = Mutant(number, self.name, self.function, source, change, nth, *node.pos[1:], self.kind)
        if mutant.number in self.left_out:
            return None
        self.mutants.append(mutant)
        return ExprNodes.RawCNameExprNode(node.pos, type=PyrexTypes.c_bint_type, cname=f"LAPSE_MUTANT({mutant.number})")

    # --- functions and statements -----------------------------------------------------------------------------------------

    def body(self, node, only_faults: bool):
        self.kind = "fault" if only_faults else "code"
        return self.statement(node)

    def class_of(self, node) -> str:
        """What a statement is about."""
        if isinstance(node, Nodes.StatListNode):
            found = {self.class_of(child) for child in node.stats}
            return found.pop() if len(found) == 1 else "code"
        if isinstance(node, Nodes.IfStatNode):
            found = {self.class_of(child.body) for child in node.if_clauses}
            found |= {self.class_of(node.else_clause)} if node.else_clause is not None else set()
            found = found if found != {"memory"} else set()        # (the check for it is not: it must not strike without reason)
            return found.pop() if len(found) == 1 else "code"
        if isinstance(node, (Nodes.ForInStatNode, Nodes.WhileStatNode)):
            return self.class_of(node.body)
        names = names_in(node)
        return next((name for name, about in CLASSES.items() if names & about), "code")

    def statement(self, node):
        """The statement with its mutants."""
        if isinstance(node, Nodes.StatListNode):
            last = node.stats[-1] if node.stats else None
            node.stats = [self.one(child, child is last) for child in node.stats]
            return node
        return self.one(node, True)

    def one(self, node, last: bool):
        outer = self.kind
        if self.kind == "code":
            self.kind = self.class_of(node)
        try:
            if isinstance(node, Nodes.IfStatNode):
                return self.branch(node)
            if isinstance(node, Nodes.CVarDefNode):
                self.declared(node)
                return node
            if isinstance(node, (Nodes.PassStatNode, Nodes.GILStatNode)) or (
                    isinstance(node, Nodes.ExprStatNode) and isinstance(node.expr, ExprNodes.UnicodeNode)):
                return node
            return self.droppable(node)
        finally:
            self.kind = outer

    def droppable(self, node):
        """An assignment, a call, a loop, or a jump."""
        returns = isinstance(node, Nodes.ReturnStatNode)
        zero = returns and (names_in(node.value) == {"FINE"} or getattr(node.value, "value", None) in ("0", False))
        drop = None
        if not isinstance(node, (Nodes.ForInStatNode, Nodes.WhileStatNode)) and not zero:      # (the end of a function returns 0, too)
            drop = self.chosen(node, "dropped")
        other = None
        if isinstance(node, Nodes.InPlaceAssignmentNode) and node.operator in BINARY:
            changed = BINARY[node.operator]
            other = self.chosen(node, f"{node.operator}= -> {changed}=")
            variant = clone(node)
            variant.operator = changed
        for attribute in node.child_attrs or ():
            child = getattr(node, attribute)
            if isinstance(child, (Nodes.StatNode, Nodes.StatListNode)):
                setattr(node, attribute, self.statement(child))
            elif attribute == "condition":
                node.condition = self.condition(child)
            elif isinstance(child, list):
                setattr(node, attribute, [self.expression(each) for each in child])
            elif isinstance(child, ExprNodes.ExprNode) and attribute not in ("target", "item"):
                setattr(node, attribute, self.expression(child))
        if other is not None:
            node = if_statement(other, variant, node)
        if drop is not None:
            node = if_statement(drop, Nodes.PassStatNode(node.pos), node)
        return node

    def declared(self, node) -> None:
        for declarator in map(declared_name, node.declarators):
            if declarator.default is not None:
                declarator.default = self.expression(declarator.default)

    def branch(self, node):
        outer = self.kind
        dead = False
        for clause in node.if_clauses:
            value = without_faults(clause.condition)
            self.kind = "fault" if value is not None else outer
            clause.condition = self.condition(clause.condition)
            self.kind = "fault" if dead or value is False else outer
            clause.body = self.statement(clause.body)
            dead = dead or value is True
        self.kind = "fault" if dead else outer
        if node.else_clause is not None:
            node.else_clause = self.statement(node.else_clause)
        self.kind = outer
        return node

    # --- expressions ------------------------------------------------------------------------------------------------------

    def condition(self, node):
        """A condition, which can be negated. (A single comparison for equality is by its own mutant.)"""
        plain = clone(node)
        kind = self.kind
        if without_faults(node) is not None:
            self.kind = "fault"
        negated = None
        if not isinstance(node, ExprNodes.NotNode) and not (isinstance(node, ExprNodes.PrimaryCmpNode) and node.cascade is None
                                                            and node.operator in ("==", "!=")):
            negated = self.chosen(node, "negated")
        self.kind = kind
        node = self.expression(node)
        if negated is None:
            return node
        return conditional(negated, ExprNodes.NotNode(node.pos, operand=plain), truth(node))

    def expression(self, node):
        """The expression with its mutants."""
        if not isinstance(node, ExprNodes.ExprNode) or isinstance(node, (ExprNodes.SizeofTypeNode, ExprNodes.SizeofVarNode)):
            return node
        outer = self.kind
        if without_faults(node) is not None:
            self.kind = "fault"
        elif isinstance(node, ExprNodes.SimpleCallNode) and names_in(node.function) == {"self", "blame"}:
            self.kind = "report"
        choices = [(self.chosen(node, change), variant) for change, variant in self.variants(node)]
        if isinstance(node, ExprNodes.SimpleCallNode):
            count = 2 if names_in(node.function) == {"range"} else len(node.args)
            node.args = [self.expression(arg) for arg in node.args[:count]] + node.args[count:]
        elif isinstance(node, ExprNodes.PrimaryCmpNode):
            node.operand1 = self.expression(node.operand1)
            link = node
            while link is not None:
                link.operand2 = self.expression(link.operand2)
                link = link.cascade
        elif isinstance(node, ExprNodes.CondExprNode):
            node.condition = self.condition(node.condition)
            node.true_val, node.false_val = self.expression(node.true_val), self.expression(node.false_val)
        elif isinstance(node, ExprNodes.IteratorNode):
            node.sequence = self.expression(node.sequence)
        else:
            for attribute in node.child_attrs or ():
                child = getattr(node, attribute)
                if isinstance(child, ExprNodes.ExprNode):
                    setattr(node, attribute, self.expression(child))
        if isinstance(node, ExprNodes.BoolBinopNode):
            node = truth(node)
        for chosen, variant in choices:
            if chosen is not None:
                node = conditional(chosen, variant, node)
        self.kind = outer
        return node

    def variants(self, node):
        """(what is changed, the changed expression)"""
        if isinstance(node, ExprNodes.PrimaryCmpNode):
            for depth, operator in enumerate(chain_of(node)):
                if operator in COMPARISONS:
                    variant = link = clone(node)
                    for _ in range(depth):
                        link = link.cascade
                    link.operator = COMPARISONS[operator]
                    yield f"{operator} -> {link.operator}", variant
        elif isinstance(node, ExprNodes.BoolBinopNode):
            variant = clone(node)
            variant.operator = BOOLEAN[node.operator]
            variant.operand1 = truth(variant.operand1)          # (of `x == 1 and x == 2` Cython would make the switch of `or`)
            yield f"{node.operator} -> {variant.operator}", truth(variant)
        elif isinstance(node, ExprNodes.NumBinopNode) and node.operator in BINARY:
            changed = BINARY[node.operator]
            yield f"{node.operator} -> {changed}", ExprNodes.binop_node(node.pos, changed, clone(node.operand1), clone(node.operand2))
        elif isinstance(node, ExprNodes.NotNode):
            yield "not x -> x", truth(clone(node.operand))
        elif isinstance(node, ExprNodes.TildeNode):
            yield "~x -> x", clone(node.operand)
        elif isinstance(node, ExprNodes.BoolNode):
            variant = clone(node)
            variant.value = not node.value
            yield f"{node.value} -> {variant.value}", variant
        elif isinstance(node, ExprNodes.IntNode):
            value = int(node.value, 0)
            for other in (value + 1, *([0] if value == 1 else [])):
                variant = clone(node)
                variant.value = str(other)
                yield f"{node.value} -> {other}", variant


def chain_of(node) -> list[str]:
    """The operators of a chain of comparisons."""
    found = []
    while node is not None:
        found.append(node.operator)
        node = node.cascade
    return found


def conditional(condition, true, false):
    return ExprNodes.CondExprNode(condition.pos, condition=condition, true_val=true, false_val=false)


def truth(node):
    """The expression as a truth value, whatever its type was."""
    return ExprNodes.NotNode(node.pos, operand=ExprNodes.NotNode(node.pos, operand=node))


def if_statement(condition, body, otherwise):
    return Nodes.IfStatNode(condition.pos, if_clauses=[Nodes.IfClauseNode(condition.pos, condition=condition, body=body)],
                            else_clause=otherwise)


# --- building ---------------------------------------------------------------------------------------------------------------------

FLAGS = ["-O1", "-g0", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", "-pthread", "-DLAPSE_DEBUG=0",
         '-DLAPSE_BUILD_KIND="release"', '-DLAPSE_BUILD_FLAGS="mutants"', "-DNPY_NO_DEPRECATED_API=NPY_1_7_API_VERSION"]
DIRECTIVES = {"boundscheck": False, "wraparound": False, "cdivision": True, "initializedcheck": False}
MOST = 32 * PER_FILE
# A negative number chooses none, and notes which ones are come by. lapse_fails_at: this allocation from now on fails, once.
SELECTOR = f"""#define VISIBLE __attribute__((visibility("default")))
extern VISIBLE int lapse_mutant;
extern VISIBLE unsigned char lapse_reached[{MOST}];
extern VISIBLE int lapse_fails_at;
#define LAPSE_MUTANT(n) (lapse_mutant == (n) || (lapse_mutant < 0 && (lapse_reached[n] = 1, 0)))
#define LAPSE_REACHED(n, value) (lapse_reached[n] = 1, (value))
#include <stdlib.h>
#define LAPSE_FAILS (lapse_fails_at > 0 && --lapse_fails_at == 0)
#define malloc(...) (LAPSE_FAILS ? NULL : malloc(__VA_ARGS__))
#define calloc(...) (LAPSE_FAILS ? NULL : calloc(__VA_ARGS__))
#define realloc(...) (LAPSE_FAILS ? NULL : realloc(__VA_ARGS__))
#define posix_memalign(...) (LAPSE_FAILS ? 12 : posix_memalign(__VA_ARGS__))
"""


class Build:
    """Builds modules of a copy of the tree with the mutants of some files in it (or with what else `marker` puts in)."""

    def __init__(self, root: Path, sources: list[str], marker=Mutator):
        self.root, self.marker = root, marker
        self.base = {name: (i + 1) * PER_FILE for i, name in enumerate(sources)}
        self.mutants: dict[str, list[Mutant]] = {}
        self.left_out: set[int] = set()
        self.plain = False

    def parse(self, parse, context, descriptor, *args, **named):
        """Takes the place of Context.parse."""
        tree = parse(context, descriptor, *args, **named)
        path = Path(descriptor.filename).resolve()
        name = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else ""
        if name in self.base and self.plain is False:
            marker = self.marker(path, name, self.base[name], self.left_out)
            marker.tree(tree)
            self.mutants[name] = marker.mutants
        return tree

    def module(self, source: str) -> None:
        """Compile one module; whatever does not compile is left out, in this module and in the next ones."""
        target = self.root / source
        self.plain = source not in self.base
        c_file = target.with_suffix(".c")
        for _ in range(20):
            errors = self.cython(target, c_file) or self.c(c_file, target)
            if not errors:
                return
            wrong = {mutant.number for mutants in self.mutants.values() for mutant in mutants
                     if (mutant.file, mutant.line) in errors and (
                         (mutant.file, mutant.line, mutant.column) in errors or not any(len(e) == 3 and e[:2] == (mutant.file, mutant.line)
                                                                                         for e in errors))}
            if not wrong:
                raise SystemExit(f"mutants: {source} does not compile: {errors}")
            self.left_out |= wrong
        raise SystemExit(f"mutants: {source} does not compile")

    def cython(self, source: Path, c_file: Path) -> set[tuple]:
        original = Main.Context.parse
        Main.Context.parse = lambda context, *args, **named: self.parse(original, context, *args, **named)
        stderr = io.StringIO()
        options = Main.CompilationOptions(language_level=3, compiler_directives=DIRECTIVES, include_path=[str(self.root)],
                                          output_file=str(c_file), emit_linenums=True, cplus=False)
        try:
            with contextlib.redirect_stderr(stderr):
                result = Main.compile_single(str(source), options, full_module_name=self.dotted(source))
            failed = result.num_errors
        except Errors.CompileError:
            failed = 1
        finally:
            Main.Context.parse = original
        return self.positions(stderr.getvalue()) if failed else set()

    def c(self, c_file: Path, source: Path) -> set[tuple]:
        import numpy
        done = subprocess.run(["gcc", *FLAGS, "-include", str(self.root / "selector.h"), "-I", sysconfig.get_path("include"),
                               "-I", numpy.get_include(), str(c_file), "-o",
                               str(source.with_suffix("")) + sysconfig.get_config_var("EXT_SUFFIX")],
                              cwd=self.root, capture_output=True, text=True, check=False)
        return self.positions(done.stderr) if done.returncode else set()

    def dotted(self, source: Path) -> str:
        return ".".join(source.relative_to(self.root).with_suffix("").parts)

    def positions(self, text: str) -> set[tuple]:
        """(file, line) and, if there is one, (file, line, column) of each error."""
        found = set()
        for path, line, column in re.findall(r"^(\S+?\.p[yx][xd]):(\d+):(\d+)", text, re.MULTILINE):
            # Cython names files as seen from the working directory, gcc as they were named by Cython
            name = next((one.relative_to(self.root).as_posix() for one in (Path(path).resolve(), (self.root / path).resolve())
                         if one.is_relative_to(self.root) and one.exists()), path)
            found |= {(name, int(line)), (name, int(line), int(column))}
        return found or {("?", text[-2000:])}


def selector(root: Path) -> Path:
    """The library with the number that is chosen, and the header for those who ask for it."""
    (root / "selector.h").write_text(SELECTOR)
    (root / "selector.c").write_text(f"int lapse_mutant = 0;\nunsigned char lapse_reached[{MOST}];\nint lapse_fails_at;\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "selector.c", "-o", "selector.so"], cwd=root, check=True)
    return root / "selector.so"


if __name__ == "__main__":
    sys.exit("run python tools/mutants")
