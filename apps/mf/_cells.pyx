# Design: numbers out of text, and blocks of cells on their way through. Nothing here knows files. The text of a call ends with a
# newline and whatever follows it is not looked at, so that the inner loops need no check of the end: every loop stops at a newline.
#
# A number of up to 19 digits with a small exponent is exact as one product or quotient of two exact doubles (Clinger, How to Read
# Floating Point Numbers Accurately, PLDI 1990); all others go to strtod.
from libc.math cimport isfinite
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport strtod
from libc.string cimport memcpy

from apps.mf._kernel cimport cell_t

cdef enum:
    LONGEST = 400               # characters of a number that strtod gets to see

# What is wrong with a line
cdef enum:
    RIGHT = 0
    NOT_A_CELL = 1
    ROW_OUTSIDE = 2
    COLUMN_OUTSIDE = 3
    NOT_FINITE = 4
    TOO_MANY = 5

cdef double[23] POWERS
POWERS[:] = [1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20,
             1e21, 1e22]


cdef inline bint is_digit(char c) noexcept nogil:
    return c'0' <= c <= c'9'


cdef inline const char* blanks(const char* p) noexcept nogil:
    while p[0] == c' ' or p[0] == c'\t' or p[0] == c'\r':
        p += 1
    return p


cdef inline const char* whole(const char* p, int64_t* value) noexcept nogil:
    """A whole number; the result is p when there is none. Huge ones are cut to 2**62."""
    cdef int64_t v = 0
    while is_digit(p[0]):
        if v < (<int64_t>1 << 58):
            v = v * 10 + (p[0] - c'0')
        p += 1
    value[0] = v
    return p


cdef const char* by_strtod(const char* p, double* value) noexcept nogil:
    cdef char[LONGEST + 1] copy
    cdef char* end
    cdef int n = 0
    while n < LONGEST and p[n] != c'\n' and p[n] != c' ' and p[n] != c'\t' and p[n] != c'\r':
        copy[n] = p[n]
        n += 1
    copy[n] = 0
    if n > 1 and (copy[1] == c'x' or copy[1] == c'X' or copy[2] == c'x' or copy[2] == c'X'):
        return p                # hexadecimal is not Matrix Market
    value[0] = strtod(copy, &end)
    return p + (end - copy)


cdef const char* real(const char* start, double* value) noexcept nogil:
    """A real number; the result is `start` when there is none."""
    cdef const char* p = start
    cdef uint64_t digits = 0
    cdef int count = 0, scale = 0, exponent = 0
    cdef bint minus = p[0] == c'-', down
    cdef double v
    if p[0] == c'-' or p[0] == c'+':
        p += 1
    while is_digit(p[0]):
        digits = digits * 10 + <uint64_t>(p[0] - c'0')
        count += digits != 0
        p += 1
    if p[0] == c'.':
        p += 1
        while is_digit(p[0]):
            digits = digits * 10 + <uint64_t>(p[0] - c'0')
            count += digits != 0
            scale -= 1
            p += 1
            if count > 19:
                break
    if p == start or (p == start + 1 and not is_digit(start[0])) or count > 19:
        return by_strtod(start, value)
    if p[0] == c'e' or p[0] == c'E':
        p += 1
        down = p[0] == c'-'
        if p[0] == c'-' or p[0] == c'+':
            p += 1
        if not is_digit(p[0]):
            return by_strtod(start, value)
        while is_digit(p[0]):
            if exponent < 10000:
                exponent = exponent * 10 + (p[0] - c'0')
            p += 1
        scale += -exponent if down else exponent
    if digits >> 53 or scale < -22 or scale > 22:
        return by_strtod(start, value)
    v = <double>digits
    v = v / POWERS[-scale] if scale < 0 else v * POWERS[scale]
    value[0] = -v if minus else v
    return p


def parse_cells(const unsigned char[::1] text, Py_ssize_t length, out, Py_ssize_t room, int64_t rows, int64_t cols,
                int64_t[::1] row_counts, int64_t[::1] col_counts):
    """Read lines of `row column value`, counted from 1, out of text[:length], which ends with a newline, into out[:room].

    Blank lines and comments (%) are passed over. Adds to the counts of cells per row and column. Returns the number of cells, of
    lines read without an error, and what is wrong with the next line: a sentence, or None.
    """
    cdef cell_t[::1] cells = out
    cdef const char* p = <const char*>&text[0]
    cdef const char* end = p + length
    cdef const char* q
    cdef Py_ssize_t n = 0, lines = 0
    cdef int64_t i = 0, j = 0
    cdef double x = 0
    cdef int wrong = RIGHT
    if length == 0:
        return 0, 0, None
    if text[length - 1] != c'\n' or len(row_counts) < rows or len(col_counts) < cols or room > len(cells):
        raise ValueError("text without its end, or no room")
    with nogil:
        while p < end:
            p = blanks(p)
            if p[0] == c'\n':
                p += 1
                lines += 1
                continue
            if p[0] == c'%':
                while p[0] != c'\n':
                    p += 1
                continue
            wrong = NOT_A_CELL
            q = whole(p, &i)
            if q == p or blanks(q) == q:
                break
            p = blanks(q)
            q = whole(p, &j)
            if q == p or blanks(q) == q:
                break
            p = blanks(q)
            q = real(p, &x)
            if q == p:
                break
            p = blanks(q)
            if p[0] != c'\n':
                break
            if i < 1 or i > rows:
                wrong = ROW_OUTSIDE
                break
            if j < 1 or j > cols:
                wrong = COLUMN_OUTSIDE
                break
            if not isfinite(x):
                wrong = NOT_FINITE
                break
            if n >= room:
                wrong = TOO_MANY
                break
            wrong = RIGHT
            i -= 1
            j -= 1
            cells[n].row, cells[n].col, cells[n].value = <int32_t>i, <int32_t>j, x
            row_counts[i] += 1
            col_counts[j] += 1
            n += 1
            lines += 1
            p += 1
    return n, lines, {RIGHT: None, NOT_A_CELL: "is not `row column value`",
                      ROW_OUTSIDE: f"has row {i}, outside of the matrix of {rows} x {cols}",
                      COLUMN_OUTSIDE: f"has column {j}, outside of the matrix of {rows} x {cols}",
                      NOT_FINITE: f"has the value {x}, which is no number to train on",
                      TOO_MANY: "is one more than the file's size line says"}[wrong]


def parse_numbers(const unsigned char[::1] text, Py_ssize_t length, double[::1] out):
    """Read one number per line out of text[:length], which ends with a newline. Returns as `parse_cells` does."""
    cdef const char* p = <const char*>&text[0]
    cdef const char* end = p + length
    cdef const char* q
    cdef Py_ssize_t n = 0, lines = 0, room = len(out)
    cdef double x = 0
    cdef int wrong = RIGHT
    if length == 0:
        return 0, 0, None
    if text[length - 1] != c'\n':
        raise ValueError("text without its end")
    with nogil:
        while p < end:
            p = blanks(p)
            if p[0] == c'\n':
                p += 1
                lines += 1
                continue
            if p[0] == c'%':
                while p[0] != c'\n':
                    p += 1
                continue
            q = real(p, &x)
            if q == p or blanks(q)[0] != c'\n':
                wrong = NOT_A_CELL
                break
            if not isfinite(x):
                wrong = NOT_FINITE
                break
            if n >= room:
                wrong = TOO_MANY
                break
            out[n] = x
            n += 1
            lines += 1
            p = blanks(q) + 1
    return n, lines, {RIGHT: None, NOT_A_CELL: "is not one number", NOT_FINITE: f"has the value {x}, which is no number to train on",
                      TOO_MANY: "is one more than the file's size line says"}[wrong]


# --- blocks of cells ------------------------------------------------------------------------------------------------------------------

def checksum(data, const unsigned char[::1] state not None):
    """Return the new state (64 bytes) of a checksum after more data: four sums of every fourth word, rotated at each step, and four sums of
    these sums (after Fletcher, An Arithmetic Checksum for Serial Transmissions, IEEE Trans. Comm. 30(1), 1982). The compiler puts them
    into vectors. Finds damage, not malice; as fast as memory. Not the same for the same data in other pieces, unless these are multiples of 32 bytes."""
    cdef const unsigned char[::1] view = memoryview(data).cast("B")
    cdef uint64_t[8] h
    cdef uint64_t[4] w
    cdef Py_ssize_t n = len(view), i
    cdef int k
    cdef const unsigned char* p = &view[0] if n else NULL
    if len(state) != 64:
        raise ValueError("the state of a checksum has 64 bytes")
    memcpy(h, &state[0], 64)
    with nogil:
        for i in range(n // 32):
            memcpy(w, p + 32 * i, 32)
            for k in range(4):
                h[k] = (h[k] << 13 | h[k] >> 51) + w[k]
                h[4 + k] += h[k]
        if n % 32:
            for k in range(4):
                w[k] = 0
            memcpy(w, p + n - n % 32, n % 32)
            for k in range(4):
                h[k] += w[k] + <uint64_t>n * <uint64_t>0x9E3779B97F4A7C15
                h[4 + k] += h[k]
    return (<char*>h)[:64]


def count_shares(cells, int32_t cols, int32_t row_begin, int32_t row_end, int32_t rows_each, int32_t cols_each, int64_t[:, ::1] counts):
    """Add to the numbers of cells per worker (of rows_each rows each, from row_begin on) and block of cols_each columns; ValueError
    when a cell is not in one of `cols` columns: nothing else looks at what a cache says."""
    cdef const cell_t[::1] view = cells
    cdef Py_ssize_t n = len(view), i
    cdef int32_t row, col
    cdef bint outside = False
    with nogil:
        for i in range(n):
            row, col = view[i].row, view[i].col
            if row_begin <= row < row_end:
                if not 0 <= col < cols:
                    outside = True
                    break
                counts[(row - row_begin) // rows_each, col // cols_each] += 1
    if outside:
        raise ValueError("a cell outside of the matrix")


def scatter(cells, int32_t row_begin, int32_t row_end, int32_t rows_each, int32_t cols_each, int64_t[:, ::1] places, out):
    """Copy the cells of those rows to where their worker and block has its next place in `out`; `places` moves on."""
    cdef const cell_t[::1] view = cells
    cdef cell_t[::1] to = out
    cdef Py_ssize_t n = len(view), i
    cdef int32_t row
    cdef int64_t* place
    with nogil:
        for i in range(n):
            row = view[i].row
            if row_begin <= row < row_end:
                place = &places[(row - row_begin) // rows_each, view[i].col // cols_each]
                to[place[0]] = view[i]
                place[0] += 1

