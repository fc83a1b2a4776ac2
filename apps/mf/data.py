"""Matrices in files: Matrix Market text (coordinate and array), and the binary cache beside a coordinate file.

Text is parsed in blocks, once: the first process that needs it holds a lock on the text, parses, and writes `<name>.cache`, which
has no name until it is complete; the others wait and read that. A cache counts if it was made from a text of the same size, time and
inode, or, when the latter differ, of the same checksum; and if its own checksum is right. It holds the header, the cells, and the numbers
of cells per row and column, so that opening it is one pass: read, checksum. Where none can be written, the cells go
to an unnamed temporary file. So no more than a block of text or cells is in memory at any time.
"""
import contextlib
import fcntl
import logging
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from apps.mf._cells import checksum, parse_cells, parse_numbers
from apps.mf._kernel import CELL

from apps.common.files import InputError, whole_file

__all__ = ["Cells", "Size", "open_cells", "read_array", "read_size"]

log = logging.getLogger("matrix_factorization")

TEXT_BLOCK = 1 << 21            # bytes of text in memory; a multiple of 32, for the checksum
CELL_BLOCK = 1 << 15            # cells in memory; the same; in a core's cache between being read and being looked at
SHORTEST_LINE = 6               # bytes of a cell's line: "1 1 1\n"
LONGEST_LINE = 1 << 16
LARGEST = 2**31 - 2             # rows, columns
SUM = 64                        # bytes of a checksum

# magic, version, byte order, rows, columns, cells, what the text's file was, its checksum, that of cells and counts; then that of all this
HEADER = struct.Struct(f"<8sII3q4q{SUM}s{SUM}s")
MAGIC = b"LapseMF\0"
VERSION = 2
OFFSET = 512                    # of the first cell


@dataclass(frozen=True)
class Size:
    """What a Matrix Market file says of its matrix."""

    rows: int
    cols: int
    cells: int


# --- text -------------------------------------------------------------------------------------------------------------------------

def _open(path):
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _read_head(file, layout):
    """Return the Size in the head of an open Matrix Market file, and how many lines and bytes the head has."""
    path = file.name
    try:
        words = file.readline(LONGEST_LINE).decode("latin-1").lower().split()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if words[:2] != ["%%matrixmarket", "matrix"] or len(words) != 5:
        raise InputError(f"{path}:1: the first line of a Matrix Market file is `%%MatrixMarket matrix {layout} real general`")
    if words[2] != layout or words[3] not in ("real", "double", "integer") or words[4] != "general":
        raise InputError(f"{path}:1: `{' '.join(words[2:])}` is not `{layout} real general`")
    number, line = 1, b"%"
    while line.startswith(b"%") or (line and not line.strip()):
        line = file.readline(LONGEST_LINE)
        number += 1
    if file.tell() > TEXT_BLOCK // 2 or not line:
        raise InputError(f"{path}:{number}: there is no size line")
    try:
        sizes = [int(word) for word in line.split()]
        rows, cols = sizes[:2]
        cells = sizes[2] if layout == "coordinate" else rows * cols
        if len(sizes) != (3 if layout == "coordinate" else 2):
            raise ValueError
    except (ValueError, IndexError):
        what = "rows, columns and cells" if layout == "coordinate" else "rows and columns"
        raise InputError(f"{path}:{number}: the size line has to say {what}") from None
    if not (1 <= rows <= LARGEST and 1 <= cols <= LARGEST and 0 <= cells <= rows * cols):
        raise InputError(f"{path}:{number}: a matrix cannot have {rows} rows, {cols} columns and {cells} cells")
    return Size(rows, cols, cells), number, file.tell()


def read_size(path, layout="coordinate"):
    """Return the Size in the head of a Matrix Market file. InputError when there is none."""
    with _open(path) as file:
        return _read_head(file, layout)[0]


def _read(file, view, offset):
    """Fill a view from an open file; return how many bytes there were."""
    got = 0
    while got < len(view):
        try:
            count = os.preadv(file.fileno(), [view[got:]], offset + got)
        except OSError as error:
            raise InputError(f"{file.name}: {error.strerror}") from None
        if count == 0:
            break
        got += count
    return got


def _text_blocks(file, skip, summed=None):
    """Yield whole lines of a file behind its first `skip` bytes, as pairs of a view and a length; checksum all of it into summed[0]."""
    buffer = memoryview(bytearray(LONGEST_LINE + TEXT_BLOCK + 1))
    offset, kept = 0, 0             # kept: bytes of a line that has begun, in front of LONGEST_LINE
    while True:
        count = _read(file, buffer[LONGEST_LINE:LONGEST_LINE + TEXT_BLOCK], offset)
        if summed is not None and count:
            summed[0] = checksum(buffer[LONGEST_LINE:LONGEST_LINE + count], summed[0])
        offset += count
        begin, end = LONGEST_LINE - kept, LONGEST_LINE + count
        if skip:
            begin, skip = begin + skip, 0
        if count < TEXT_BLOCK:      # the end of the file
            if begin < end and buffer[end - 1] != ord("\n"):
                buffer[end] = ord("\n")
                end += 1
            if begin < end:
                yield buffer[begin:], end - begin
            return
        stop = buffer.obj.rfind(b"\n", begin, end) + 1
        if end - max(stop, begin) > LONGEST_LINE:
            raise InputError(f"{file.name}: has a line of more than {LONGEST_LINE} characters")
        if stop:
            yield buffer[begin:], stop - begin
            begin = stop
        kept = end - begin
        buffer[LONGEST_LINE - kept:LONGEST_LINE] = bytes(buffer[begin:end])


def _parse(file, size, number, skip, write, row_counts, col_counts):
    """Parse the cells behind the head, pass them to write() and count them; return the checksum of the text."""
    summed, total = [bytes(SUM)], 0
    room = np.empty(min(size.cells, (TEXT_BLOCK + LONGEST_LINE) // SHORTEST_LINE) + 1, dtype=CELL)
    for text, length in _text_blocks(file, skip, summed):
        count, lines, wrong = parse_cells(text, length, room, min(len(room), size.cells - total), size.rows, size.cols,
                                          row_counts, col_counts)
        if wrong:
            raise InputError(f"{file.name}:{number + lines + 1}: the line {wrong}")
        number += lines
        total += count
        write(memoryview(room[:count]).cast("B"))
    if total != size.cells:
        raise InputError(f"{file.name}:{number}: ends after {total} cells, but its size line says {size.cells}")
    return summed[0]


def read_array(path):
    """Return the matrix (float64) of a Matrix Market array file. InputError when it is not one."""
    with _open(path) as file:
        size, number, skip = _read_head(file, "array")
        if os.fstat(file.fileno()).st_size - skip < 2 * size.cells - 1:
            raise InputError(f"{path}: is too short for {size.rows} x {size.cols} numbers")
        values, total = np.empty(size.cells), 0
        for text, length in _text_blocks(file, skip):
            count, lines, wrong = parse_numbers(text, length, values[total:])
            if wrong:
                raise InputError(f"{path}:{number + lines + 1}: the line {wrong}")
            number += lines
            total += count
    if total != size.cells:
        raise InputError(f"{path}:{number}: ends after {total} numbers, but its size line says {size.rows} x {size.cols}")
    return values.reshape(size.cols, size.rows).T


# --- cells --------------------------------------------------------------------------------------------------------------------------

class Cells:
    """The cells of a matrix, in a file that lies open: `size`, `row_counts`, `col_counts` (cells per row and column), `blocks()`."""

    def __init__(self, file, size, row_counts=None, col_counts=None):
        self._file, self.size, self.row_counts, self.col_counts = file, size, row_counts, col_counts

    def blocks(self):
        """Yield all cells, in arrays of a bounded size; each is valid until the next. Threads may do so at once."""
        room = np.empty(min(CELL_BLOCK, self.size.cells), dtype=CELL)
        view = memoryview(room).cast("B")
        offset, end = OFFSET, OFFSET + self.size.cells * CELL.itemsize
        while offset < end:
            want = min(len(view), end - offset)
            if _read(self._file, view[:want], offset) != want:
                raise InputError(f"{self._file.name}: ends too early")
            yield room[:want // CELL.itemsize]
            offset += want

    def checksum(self):
        """The checksum of the cells and the counts."""
        summed = bytes(SUM)
        for block in self.blocks():
            summed = checksum(block.view(np.uint8), summed)
        for counts in self.row_counts, self.col_counts:
            summed = checksum(counts, summed)
        return summed

    def read_counts(self):
        """Read what lies behind the cells."""
        self.row_counts, self.col_counts = np.empty(self.size.rows, np.int64), np.empty(self.size.cols, np.int64)
        offset = OFFSET + self.size.cells * CELL.itemsize
        for counts in self.row_counts, self.col_counts:
            if _read(self._file, memoryview(counts).cast("B"), offset) != counts.nbytes:
                raise InputError(f"{self._file.name}: ends too early")
            offset += counts.nbytes

    def close(self):
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def _identity(file):
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _cached(path, source, size):
    """Return the Cells of a cache file if it is one of this text, else None."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
        except OSError:
            return None
        head = bytearray(OFFSET)
        length = HEADER.size
        if _read(file, memoryview(head), 0) != OFFSET or checksum(head[:length], bytes(SUM)) != head[length:length + SUM]:
            return None
        magic, version, order, rows, cols, count, *identity, text_sum, cell_sum = HEADER.unpack_from(head)
        if (magic, version, order, rows, cols, count) != (MAGIC, VERSION, 1, size.rows, size.cols, size.cells):
            return None
        if os.fstat(file.fileno()).st_size != OFFSET + count * CELL.itemsize + 8 * (rows + cols) or identity[0] != _identity(source)[0]:
            return None
        if tuple(identity) != _identity(source):
            summed = [bytes(SUM)]
            for _ in _text_blocks(source, 0, summed):
                pass
            if summed[0] != text_sum:
                return None
        cells = Cells(file, size)
        cells.read_counts()
        if cells.checksum() != cell_sum:
            log.warning("%s is damaged; it is made anew", path)
            return None
        stack.pop_all()
        return cells


def _write_cells(file, source, size, number, skip):
    """Parse a text into a cache file; return its Cells."""
    identity = _identity(source)
    row_counts, col_counts = np.zeros(size.rows, np.int64), np.zeros(size.cols, np.int64)
    file.seek(OFFSET)
    text_sum = _parse(source, size, number, skip, file.write, row_counts, col_counts)
    for counts in row_counts, col_counts:
        file.write(counts)
    file.flush()
    cells = Cells(file, size, row_counts, col_counts)
    cell_sum = cells.checksum()         # of what can be read again
    head = HEADER.pack(MAGIC, VERSION, 1, size.rows, size.cols, size.cells, *identity, text_sum, cell_sum)
    file.seek(0)
    file.write(head + checksum(head, bytes(SUM)))
    file.flush()
    return cells


def open_cells(path):
    """Return the Cells of a Matrix Market coordinate file, out of the cache beside it, which is made if need be.

    InputError, with the line, when the text is not what it should be. Blocks while another process makes the cache.
    """
    path = Path(path)
    cache = path.with_name(f"{path.name}.cache")
    with _open(path) as source:
        size, number, skip = _read_head(source, "coordinate")
        cells = _cached(cache, source, size)
        if cells is not None:
            return cells
        with contextlib.suppress(OSError):      # some file systems have no locks; then two may do the same work
            fcntl.flock(source, fcntl.LOCK_EX)
        cells = _cached(cache, source, size)
        if cells is not None:
            return cells
        try:
            with whole_file(cache) as file:
                return _write_cells(file, source, size, number, skip)
        except OSError as error:
            log.warning("no cache beside %s: %s", path, error.strerror)
        file = tempfile.TemporaryFile()  # noqa: SIM115 (Cells keeps it)
        try:
            return _write_cells(file, source, size, number, skip)
        except OSError as error:
            file.close()
            raise InputError(f"{path}: no room for its cells in {tempfile.gettempdir()}: {error.strerror}") from None
        except BaseException:
            file.close()
            raise
