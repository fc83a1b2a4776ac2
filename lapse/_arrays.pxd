"""What Python callers hand over as keys and values, checked: afterwards only pointers are used.

A view looks at the argument's own memory (never at a copy, except of a list, tuple or range), so that what is written through it is
seen by the caller. It is good for as long as the object that comes with it is kept: during a call that is enough. What is to outlive
the call is kept as `lasting` makes of it.
"""
cimport numpy as cnp

ctypedef struct view_t:
    void* data
    Py_ssize_t size         # numbers
    Py_ssize_t first        # of the first dimension
    int ndim

# keys: 1-D int64; `written`: a call fills them, so they must be writeable and may not be a list. Else a list of ints is converted.
cdef object key_view(object keys, bint written, view_t* view)
# vals: 1-D or 2-D of number type `typenum`; `written`: must be writeable and may not be a list.
cdef object value_view(object vals, int typenum, bint written, view_t* view)
# Raise ValueError when the `size` bytes that a pull fills overlap its n keys.
cdef int apart(const void* keys, Py_ssize_t n, const void* vals, size_t size) except -1
# An object whose memory stays where it is: a tensor's could be exchanged or made larger.
cdef object lasting(object kept)
# keys as key_view takes them, as an array of the same memory.
cdef cnp.ndarray key_array(object keys)
# What a view's shape is called in messages.
cdef object shape_of(object vals)
# NPY_ number of a ValueType.
cdef int numpy_type(int dtype) noexcept nogil
