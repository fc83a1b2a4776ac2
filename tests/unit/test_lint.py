"""tools/lint.py finds what it is there to find."""
import pytest

from tools import lint


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Writes files into an empty tree and makes that the one that is checked."""
    monkeypatch.setattr(lint, "ROOT", tmp_path)

    def write(**sources):
        paths = []
        for stem, text in sources.items():
            path = tmp_path / "lapse" / f"{stem}.pyx"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            paths.append(path)
        return paths
    return write


@pytest.mark.parametrize("line", ["import pickle", "import _pickle as p", "from cPickle import loads", "pickle.loads(x)", "s.recv_pyobj()",
                                  "x = eval(y)", "yaml.load(f)", "run(x, shell=True)", "run(x, shell = True)", "os.system(x)"])
def test_forbidden(tree, line):
    assert len(list(lint.check_forbidden(tree(a=f"def f():\n    {line}\n")))) == 1


@pytest.mark.parametrize("line", ["# pickle.dumps is not used", "retrieval()", "yaml.load_all", "shell=False", "m.eval()", "never pickle."])
def test_allowed(tree, line):
    assert not list(lint.check_forbidden(tree(a=line)))


def test_nogil_without_a_word_on_errors(tree):
    paths = tree(a="cdef void f() nogil:\n    pass\n", b="cdef void f(int x,\n            int y) nogil    # why\n")
    assert len(list(lint.check_exceptions(paths))) == 2
    paths = tree(a="cdef void f() noexcept nogil:\n    with nogil:\n        pass\n", b="cdef int f(int x) except -1 nogil\n")
    assert not list(lint.check_exceptions(paths))


def test_layers(tree):
    assert not list(lint.check_layers(tree(_store="from lapse._types cimport Key\n", config="from lapse._worker cimport Worker\n")))
    found = list(lint.check_layers(tree(_store="from lapse._protocol cimport Sink\n")))
    assert len(found) == 1 and "lapse._store cimports lapse._protocol" in found[0]
    found = list(lint.check_layers(tree(_store="from lapse._directory cimport a\n", _directory="cimport lapse._store\n")))
    assert len(found) == 1 and "circle" in found[0]


def test_hint_that_the_gil_is_taken(tree):
    good = "cdef int f(int x) noexcept nogil:\n    return x\ncdef int g() noexcept nogil:\n    return f(1)\n"
    assert not list(lint.check_cython(tree(a=good)))
    bad = "cdef void f(int x) except * nogil:\n    pass\ncdef int g() noexcept nogil:\n    f(1)\n    return 0\n"
    assert any("a.pyx:" in line and "require the GIL" in line for line in lint.check_cython(tree(a=bad)))
    assert any("Cython fails" in line for line in lint.check_cython(tree(a="cdef\n")))


def test_nothing_to_check_is_an_error(tree):
    tree(a="")
    assert len(lint.files("lapse/*.pyx")) == 1
    with pytest.raises(SystemExit, match="nothing to check"):
        lint.files("lapse/*.pyx", "lapse/*.pxd")
