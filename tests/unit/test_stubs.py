"""The .pyi stubs say what the compiled modules have: names, methods and their parameters."""
import ast
import importlib
import inspect
from pathlib import Path

import pytest

import lapse

FOLDER = Path(lapse.__file__).parent
STUBS = sorted(FOLDER.glob("*.pyi"))


def definitions(body):
    """Name -> node of what a stub's body declares; of an overloaded function, the last one."""
    found = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def parameters(node):
    arguments = node.args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return names + [a.arg for a in (arguments.vararg, arguments.kwarg) if a]


def check(node, thing, where):
    """Complain where the stub's node and the run-time thing differ."""
    if isinstance(node, ast.ClassDef):
        own = {name for name in vars(thing) if not name.startswith("_")}
        declared = definitions(node.body)
        assert own <= declared.keys(), f"{where} lacks {own - declared.keys()}"
        for name, member in declared.items():
            assert hasattr(thing, name), f"{where}.{name} does not exist"
            if isinstance(member, ast.FunctionDef):
                check(member, inspect.getattr_static(thing, name), f"{where}.{name}")
    elif isinstance(node, ast.FunctionDef):
        if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
            assert not callable(thing), f"{where} is no property"
            return
        try:
            signature = inspect.signature(thing)
        except ValueError:
            return                          # a slot of the type
        if set(signature.parameters) <= {"self", "args", "kwargs"}:
            return                          # Cython's __cinit__ and slots
        names = sorted(name for name in signature.parameters if name != "self")
        assert names == sorted(name for name in parameters(node) if name not in ("self", "cls")), where


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.stem)
def test_stub(stub):
    name = ".".join(stub.relative_to(FOLDER.parent).with_suffix("").parts)
    module = importlib.import_module(name)
    declared = definitions(ast.parse(stub.read_text()).body)
    for what, node in declared.items():
        if not what.startswith("_"):
            assert hasattr(module, what), f"{name}.{what} does not exist"
            check(node, getattr(module, what), f"{name}.{what}")


def test_there_are_stubs():
    assert {"worker", "_worker", "_van", "_protocol"} <= {stub.stem for stub in STUBS}
    assert (FOLDER / "py.typed").exists()


def test_public_names():
    assert all(hasattr(lapse, name) for name in lapse.__all__)
    for name in ("setup", "scheduler", "Server", "Worker", "launch", "LapseError", "KeyRangeError", "NodeFailure", "Interrupted"):
        assert name in lapse.__all__


@pytest.mark.parametrize("thing", [lapse.Worker, lapse.Server], ids=lambda thing: thing.__name__)
def test_each_public_method_says_its_contract(thing):
    """The last line of each docstring: blocking or asynchronous; which threads; local or collective."""
    for name, member in vars(thing).items():
        if not name.startswith("_") and (callable(member) or isinstance(member, property)):
            text = inspect.getdoc(member) or ""
            last = " ".join(text.split()).rpartition(". ")[2] if text else ""
            assert any(word in text for word in ("Blocking", "Asynchronous")), f"{name}: {last!r}"
            assert "local" in last or "collective" in last, f"{name}: {last!r}"
