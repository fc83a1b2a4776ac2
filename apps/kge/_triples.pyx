# Design: whole numbers out of text. The text of a call ends with a newline, so the inner loops need no check of the end.
from libc.stdint cimport int32_t, int64_t

cdef inline bint is_digit(char c) noexcept nogil:
    return c'0' <= c <= c'9'


def parse_triples(const unsigned char[::1] text, Py_ssize_t length, int32_t[:, ::1] out, limits):
    """Read lines of whole numbers out of text[:length], which ends with a newline, into out: one per column of it.

    limits: for each column what its numbers are below, and how that is said. Blank lines are passed over. Returns the number of rows,
    of lines read without an error, and what is wrong with the next line: a sentence, or None.
    """
    cdef const char* p = <const char*>&text[0]
    cdef const char* end = p + length
    cdef Py_ssize_t n = 0, lines = 0, room = out.shape[0]
    cdef int columns = out.shape[1], column = 0, k
    cdef int64_t value = 0
    cdef int64_t[4] most = [0, 0, 0, 0]
    cdef bint malformed = False
    if columns > 4 or len(limits) != columns or length == 0 or text[length - 1] != c'\n':
        raise ValueError("columns without a limit, or text without its end")
    for k in range(columns):
        most[k] = limits[k][0]
    with nogil:
        while p < end:
            while p[0] == c' ' or p[0] == c'\t' or p[0] == c'\r':
                p += 1
            if p[0] != c'\n':
                if n == room:
                    break
                for column in range(columns):
                    while p[0] == c' ' or p[0] == c'\t':
                        p += 1
                    malformed = not is_digit(p[0])
                    value = 0
                    while is_digit(p[0]):
                        if value < (<int64_t>1 << 58):
                            value = value * 10 + (p[0] - c'0')
                        p += 1
                    malformed = malformed or not (p[0] == c' ' or p[0] == c'\t' or p[0] == c'\r' or p[0] == c'\n')
                    if malformed or value >= most[column]:
                        break
                    out[n, column] = <int32_t>value
                else:
                    while p[0] == c' ' or p[0] == c'\t' or p[0] == c'\r':
                        p += 1
                    malformed = p[0] != c'\n'
                    value = -1
                if malformed or value >= 0:
                    break
                n += 1
            p += 1
            lines += 1
    if malformed:
        return n, lines, f"is not {columns} whole numbers"
    if value >= 0 and p < end and n < room:
        return n, lines, f"has {limits[column][1].format(value)}"
    return n, lines, None
