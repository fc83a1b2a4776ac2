"""The reader of the matrix factorization: Matrix Market text, the cache beside it, the shares of the workers."""
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

data = pytest.importorskip("apps.mf.data", reason="the kernels are not built: make kernels")
from apps.mf._cells import checksum, parse_cells, parse_numbers  # noqa: E402
from apps.mf._kernel import CELL  # noqa: E402

from apps.common.files import InputError, whole_file  # noqa: E402
from apps.mf.layout import Layout, load  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
HEAD = "%%MatrixMarket matrix coordinate real general\n"


def write(path, rows, cols, cells, head=HEAD, end="\n"):
    path.write_text(f"{head}{rows} {cols} {len(cells)}\n" + "\n".join(f"{i + 1} {j + 1} {x!r}" for i, j, x in cells) + end)
    return path


def some_cells(rows, cols, count, seed=1):
    random = np.random.default_rng(seed)
    places = random.choice(rows * cols, count, replace=False)
    return [(int(p // cols), int(p % cols), float(x)) for p, x in zip(places, random.normal(size=count))]


def read(path):
    with data.open_cells(path) as cells:
        return np.concatenate([block.copy() for block in cells.blocks()] or [np.empty(0, CELL)])


def equal(found, cells):
    return found.tolist() == cells


@pytest.fixture
def text(tmp_path):
    return write(tmp_path / "m.mmc", 50, 40, some_cells(50, 40, 700))


# --- numbers ------------------------------------------------------------------------------------------------------------------

def numbers():
    random_ = random.Random(1)
    found = ["0", "-0.0", "+1", ".5", "5.", "1e22", "1e23", "9007199254740993", "123456789012345678901234567890", "1e-400", "2.5e-324",
             "1.7976931348623157e308", "0.1", "-1.5E+3", "4.35", "0." + "0" * 30 + "1", "00012.50", "8.5e-05", "1" + "0" * 25]
    for _ in range(3000):
        found.append(repr(random_.uniform(-1, 1) * 10 ** random_.randint(-30, 30)))
        found.append(f"{random_.uniform(-100, 100):.{random_.randint(0, 22)}f}")
        found.append(f"{random_.uniform(-1, 1):.{random_.randint(1, 18)}e}")
    return found


def test_numbers_are_exactly_those_of_python():
    words = numbers()
    text = ("\n".join(words) + "\n").encode()
    out = np.empty(len(words))
    assert parse_numbers(text, len(text), out) == (len(words), len(words), None)
    expected = np.array([float(word) for word in words])
    assert (out.view(np.int64) == expected.view(np.int64)).all()


@pytest.mark.parametrize("word", ["", "-", "+", ".", "e5", "1e", "1e+", "0x10", "1.2.3", "1,5", "one", "--1", "1 2", "nan", "inf",
                                  "-Infinity", "1e999"])
def test_what_is_no_number_is_refused(word):
    text = f"1 1 {word}\n".encode()
    counts = np.zeros(1, np.int64), np.zeros(1, np.int64)
    cells, lines, wrong = parse_cells(text, len(text), np.empty(1, CELL), 1, 1, 1, *counts)
    assert (cells, lines) == (0, 0) and wrong
    assert ("no number to train on" in wrong) == (word in ("nan", "inf", "-Infinity", "1e999"))


def test_random_bytes_never_go_unnoticed_nor_crash():
    random_ = random.Random(2)
    for _ in range(3000):
        text = bytes(random_.choice(b"0123456789 \t\r%.+-eEnaif\n\n\0\xff") for _ in range(random_.randint(0, 60))) + b"\n"
        out = np.zeros(40, CELL)
        counts = np.zeros(9, np.int64), np.zeros(9, np.int64)
        cells, lines, wrong = parse_cells(text, len(text), out, 40, 9, 9, *counts)
        assert counts[0].sum() == counts[1].sum() == cells and np.isfinite(out["value"]).all()
        assert wrong or lines == text.count(b"\n")


# --- coordinate files ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block", [64, 96, 1024, 1 << 21])
@pytest.mark.parametrize("end", ["\n", "", "\n\n \n", "\r\n"])
def test_cells_come_in_the_order_of_the_text_whatever_the_blocks(tmp_path, monkeypatch, block, end):
    monkeypatch.setattr(data, "TEXT_BLOCK", block)
    monkeypatch.setattr(data, "LONGEST_LINE", min(block, 1 << 16))
    monkeypatch.setattr(data, "CELL_BLOCK", 32)
    cells = some_cells(30, 20, 333)
    monkeypatch.setattr(data, "_read_head", lambda file, layout, head=data._read_head: head_of(file, layout, head))
    path = write(tmp_path / "m.mmc", 30, 20, cells, end=end)
    for _ in range(2):              # from the text, then from the cache
        assert equal(read(path), cells)


def head_of(file, layout, head):
    """The head, whose bytes are less than a block in real life."""
    block, data.TEXT_BLOCK = data.TEXT_BLOCK, 1 << 21
    try:
        return head(file, layout)
    finally:
        data.TEXT_BLOCK = block


def test_comments_blanks_and_integers(tmp_path):
    path = tmp_path / "m.mmc"
    path.write_bytes(b"%%MatrixMarket  MATRIX coordinate Integer General\r\n% a\n\n%b\n  3\t4  3 \n"
                     b"1 1 5\n% between\n\n\t2  4\t-6 \n3 2 7e0\n")
    assert read(path).tolist() == [(0, 0, 5.0), (1, 3, -6.0), (2, 1, 7.0)]


def test_counts_of_rows_and_columns(text):
    expected = some_cells(50, 40, 700)
    for _ in range(2):
        with data.open_cells(text) as cells:
            assert cells.row_counts.tolist() == np.bincount([i for i, _, _ in expected], minlength=50).tolist()
            assert cells.col_counts.tolist() == np.bincount([j for _, j, _ in expected], minlength=40).tolist()


BAD = {
    "": ":1: the first line",
    "hello\n": ":1: the first line",
    "%%MatrixMarket matrix coordinate pattern general\n1 1 1\n1 1\n": ":1: `coordinate pattern general` is not",
    "%%MatrixMarket matrix coordinate real symmetric\n1 1 1\n1 1 1\n": ":1: `coordinate real symmetric`",
    "%%MatrixMarket matrix array real general\n1 1\n1\n": ":1: `array real general`",
    HEAD: ":2: there is no size line",
    HEAD + "% only\n": ":3: there is no size line",
    HEAD + "3 4\n": ":2: the size line has to say rows, columns and cells",
    HEAD + "3 4 x\n": ":2: the size line",
    HEAD + "3 4 13\n": ":2: a matrix cannot have 3 rows, 4 columns and 13 cells",
    HEAD + "0 4 0\n": ":2: a matrix cannot",
    HEAD + "99999999999 4 1\n1 1 1\n": ":2: a matrix cannot",
    HEAD + "3 4 2\n1 1 1.0\n": ":3: ends after 1 cells, but its size line says 2",
    HEAD + "3 4 2\n1 1 1.00000000000\n": ":3: ends after 1 cells, but its size line says 2",
    HEAD + "3 4 1\n1 1 1.0\n2 2 2.0\n": ":4: the line is one more than",
    HEAD + "3 4 2\n1 1 1.0\n4 1 2.0\n": ":4: the line has row 4, outside of the matrix of 3 x 4",
    HEAD + "3 4 2\n1 1 1.0\n3 5 2.0\n": ":4: the line has column 5, outside",
    HEAD + "3 4 2\n0 1 1.0\n3 5 2.0\n": ":3: the line has row 0, outside",
    HEAD + "3 4 2\n1 1 1.0\n2 2 nan\n": ":4: the line has the value nan",
    HEAD + "3 4 2\n1 1 1.0\n%\n\n2 2\n": ":6: the line is not `row column value`",
    HEAD + "3 4 2\n1 1 1.0\n2 2 1.0 3\n": ":4: the line is not",
    HEAD + "3 4 1\n1.5 1 1.0\n": ":3: the line is not",
    HEAD + "3 4 1\n99999999999999999999 1 1.0\n": ":3: the line has row",
}


@pytest.mark.parametrize("content", BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_file_is_named_with_its_line_and_leaves_nothing(tmp_path, content):
    path = tmp_path / "bad.mmc"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        data.open_cells(path)
    assert str(error.value).startswith(str(path)) and BAD[content] in str(error.value)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.mmc"]


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.mmc", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            data.open_cells(path)


def test_a_line_without_end(tmp_path):
    path = tmp_path / "long.mmc"
    path.write_text(HEAD + "2 2 1\n1 1 1" + "0" * 5_000_000)
    with pytest.raises(InputError):
        data.open_cells(path)


# --- the cache ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def parsed(monkeypatch):
    """The texts that were parsed."""
    found = []
    monkeypatch.setattr(data, "_parse", lambda file, *args, parse=data._parse: found.append(file.name) or parse(file, *args))
    return found


def test_the_text_is_parsed_once(text, parsed):
    first = read(text)
    assert (read(text) == first).all() and len(parsed) == 1
    assert sorted(file.name for file in text.parent.iterdir()) == ["m.mmc", "m.mmc.cache"]


def test_a_changed_text_is_parsed_again(text, parsed):
    read(text)
    before = text.stat()
    content = text.read_bytes()
    text.write_bytes(content[:-3] + (b"7" if content[-3:-2] != b"7" else b"8") + content[-2:])
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))        # same size, same time
    changed = read(text)
    assert len(parsed) == 2 and changed[-1]["value"] != some_cells(50, 40, 700)[-1][2]
    cells = some_cells(50, 40, 701)
    write(text, 50, 40, cells)
    assert equal(read(text), cells) and len(parsed) == 3


def test_a_text_of_another_time_with_the_same_bytes_is_not(text, parsed):
    read(text)
    os.utime(text, ns=(1, 1))
    read(text)
    os.replace(write(text.with_name("copy"), 50, 40, some_cells(50, 40, 700)), text)
    read(text)
    assert len(parsed) == 1


@pytest.mark.parametrize("at", [0, 9, 40, 120, 150, 256, 5000, -1])
def test_a_damaged_cache_is_made_anew(text, parsed, at):
    expected = read(text)
    cache = text.with_name("m.mmc.cache")
    content = bytearray(cache.read_bytes())
    content[at] ^= 4
    cache.write_bytes(content)
    assert (read(text) == expected).all() and len(parsed) == 2
    assert (read(text) == expected).all() and len(parsed) == 2


@pytest.mark.parametrize("size", [0, 100, 256, 5000])
def test_a_cut_cache_is_made_anew(text, parsed, size):
    expected = read(text)
    os.truncate(text.with_name("m.mmc.cache"), size)
    assert (read(text) == expected).all() and len(parsed) == 2


def test_without_room_for_a_cache_the_cells_go_elsewhere(text, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(data, "whole_file", refuse)
    assert equal(read(text), some_cells(50, 40, 700))
    assert "no cache beside" in caplog.text
    assert [file.name for file in text.parent.iterdir()] == ["m.mmc"]


def test_processes_at_once_parse_it_once(tmp_path):
    cells = some_cells(400, 300, 60_000)
    path = write(tmp_path / "m.mmc", 400, 300, cells)
    script = ("import sys; from apps.mf import data; parse = data._parse\n"
              "def loud(*args):\n    print('parsed'); return parse(*args)\n"
              "data._parse = loud\n"
              "cells = data.open_cells(sys.argv[1]); print(sum(int(block['row'].sum()) for block in cells.blocks()))")
    running = [subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    output = [process.communicate(timeout=60)[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert sum(words.count("parsed") for words in output) == 1
    assert {words[-1] for words in output} == {str(sum(i for i, _, _ in cells))}


def test_the_memory_does_not_grow_with_the_file(tmp_path):
    count = 3_000_000               # 25 MB of text, 48 MB of cells
    path = tmp_path / "m.mmc"
    with path.open("w") as file:
        file.write(f"{HEAD}3000 1000 {count}\n")
        for i in range(3000):
            file.write("".join([f"{i + 1} {j} 1\n" for j in range(1, 1001)]))
    script = ("import resource, sys; from apps.mf import data\n"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "cells = data.open_cells(sys.argv[1]); n = sum(len(block) for block in cells.blocks())\n"
              "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        cells, kilobytes = map(int, done.stdout.split())
        assert cells == count and kilobytes < 24 * 1024


def test_a_cell_outside_in_a_cache_is_an_error(text):
    """Whatever wrote it, with a right checksum: it must not be written to where no room is."""
    with data.open_cells(text) as cells:
        block = next(cells.blocks()).copy()
        cells.blocks = lambda: iter([block])
        for col in -1, 40:
            block["col"][5] = col
            with pytest.raises(ValueError, match="outside"):
                load(cells, Layout(50, 40, 1), 0, 1, 40)


def test_checksum_sees_each_bit_and_the_length():
    random_ = np.random.default_rng(3)
    content = random_.integers(0, 256, 100, dtype=np.uint8)
    known = {checksum(content, bytes(64))}
    for i in range(800):
        changed = content.copy()
        changed[i // 8] ^= 1 << i % 8
        known.add(checksum(changed, bytes(64)))
    known |= {checksum(content[:n], bytes(64)) for n in range(100)} | {checksum(np.append(content, np.uint8(0)), bytes(64))}
    assert len(known) == 902


# --- array files ----------------------------------------------------------------------------------------------------------------------

def test_array_goes_by_columns(tmp_path):
    path = tmp_path / "a.mma"
    path.write_text("%%MatrixMarket matrix array real general\n% x\n2 3\n1\n2\n3\n\n% y\n4\n5\n6.5")
    assert data.read_array(path).tolist() == [[1, 3, 5], [2, 4, 6.5]]


@pytest.mark.parametrize(("content", "what"), [
    ("2 2\n1\n2\n3\n", "too short"), ("2 2\n1.0\n2.0\n3.0\n", ":5: ends after 3 numbers"), ("1 1\n1\n2\n", ":4: the line is one more"),
    ("2 1\n1\nx\n", ":4: the line is not one number"), ("2 1\n1\nnan\n", ":4: the line has the value nan"),
    ("1 2\n1 2\n", ":3: the line is not one number"), ("2 2 2\n1\n2\n3\n4\n", ":2: the size line has to say rows and columns")])
def test_a_bad_array_is_named_with_its_line(tmp_path, content, what):
    path = tmp_path / "a.mma"
    path.write_text("%%MatrixMarket matrix array real general\n" + content)
    with pytest.raises(InputError, match=what):
        data.read_array(path)


# --- whole files ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("unnamed", [True, False])
def test_a_file_is_there_completely_or_not_at_all(tmp_path, monkeypatch, unnamed):
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    path = tmp_path / "f"
    for content in (b"one", b"two"):
        with whole_file(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"one"
        assert path.read_bytes() == content
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"three")
        raise ZeroDivisionError
    assert path.read_bytes() == b"two"
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


# --- shares -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("nodes", "threads"), [(1, 1), (1, 3), (2, 1), (3, 2), (2, 40)])
@pytest.mark.parametrize("pieces", ["workers", "cols", 1])
def test_every_cell_is_in_one_share_and_piece(text, nodes, threads, pieces):
    layout = Layout(50, 40, nodes * threads)
    pieces = {"workers": layout.workers, "cols": 40}.get(pieces, pieces)
    found = []
    with data.open_cells(text) as cells:
        for node in range(nodes):
            for me, share in enumerate(load(cells, layout, node * threads, threads, pieces), node * threads):
                begin, end = layout.rows_of(me)
                assert len(share.begins) == pieces + 1 and share.begins[-1] == len(share.cells)
                for piece in range(pieces):
                    part = share.pieces(piece, piece + 1)
                    assert (part["row"] >= begin).all() and (part["row"] < end).all()
                    assert (part["col"] // -(-40 // pieces) == piece).all()
                    found += part.tolist()
    assert sorted(found) == sorted(some_cells(50, 40, 700))


def test_many_cells_lie_in_a_file(text, monkeypatch):
    monkeypatch.setattr("apps.mf.layout.IN_MEMORY", 1000)
    with data.open_cells(text) as cells:
        share, = load(cells, Layout(50, 40, 1), 0, 1, 1)
    share.cells[0] = share.cells[0]
    assert equal(share.cells, some_cells(50, 40, 700))


def test_layout_covers_rows_and_columns_once():
    for rows, cols, workers in ((6, 4, 1), (6, 4, 5), (1, 1, 7), (20, 30, 4)):
        layout = Layout(rows, cols, workers)
        assert [i for w in range(workers) for i in range(*layout.rows_of(w))] == list(range(rows))
        assert [j for w in range(workers) for j in range(*layout.cols_of(w))] == list(range(cols))
        assert layout.column_key == -(-rows // workers) * workers and layout.keys >= layout.column_key + cols
