"""What Python callers hand over as keys and values, checked: afterwards only pointers are used.

The functions return the argument's own memory as an array (never a copy, except for a list, tuple or range), so that what is
written through its pointer is seen by the caller. Keeping the returned array keeps the memory.
"""
cimport numpy as cnp

# keys: 1-D int64. A list, tuple or range of ints is converted.
cdef cnp.ndarray key_array(object keys)
# vals: 1-D or 2-D of number type `typenum`; `written`: must be writeable and may not be a list.
cdef cnp.ndarray value_array(object vals, int typenum, bint written)
# NPY_ number of a ValueType.
cdef int numpy_type(int dtype) noexcept nogil
# keys that a call fills: 1-D int64, writeable.
cdef cnp.ndarray drawn_array(object keys)
