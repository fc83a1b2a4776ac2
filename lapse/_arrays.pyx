"""Arrays of Python callers, checked in place.

Design: the common case, an exact ndarray that is as it should be, is one type comparison, one flag test and one number-type
test (a few nanoseconds). Everything else goes through `as_array`, which knows torch tensors without importing torch: where no
tensor exists, nobody has imported it. Every check comes before any effect. Runs with the GIL; no state of its own.
"""
import sys

import numpy as np

cimport numpy as cnp
from cpython.object cimport PyTypeObject, Py_TYPE
from lapse._types cimport FLOAT32, FLOAT64, INT32

from lapse.errors import KeyRangeError

cnp.import_array()


cdef int numpy_type(int dtype) noexcept nogil:
    if dtype == FLOAT32:
        return cnp.NPY_FLOAT32
    if dtype == FLOAT64:
        return cnp.NPY_FLOAT64
    if dtype == INT32:
        return cnp.NPY_INT32
    return cnp.NPY_INT64


cdef cnp.ndarray key_array(object keys):
    cdef cnp.ndarray a
    if Py_TYPE(keys) == <PyTypeObject*>cnp.ndarray:
        a = <cnp.ndarray>keys
        if cnp.PyArray_ISCARRAY_RO(a) and cnp.PyArray_TYPE(a) == cnp.NPY_INT64 and cnp.PyArray_NDIM(a) == 1:
            return a
    elif isinstance(keys, (list, tuple, range)):
        keys = keys_of_numbers(keys)
    a = checked("keys", as_array("keys", keys), cnp.NPY_INT64, False)
    if cnp.PyArray_NDIM(a) != 1:
        raise ValueError(f"keys must have one dimension, not {cnp.PyArray_NDIM(a)}")
    return a


cdef cnp.ndarray drawn_array(object keys):
    cdef cnp.ndarray a
    if Py_TYPE(keys) == <PyTypeObject*>cnp.ndarray:
        a = <cnp.ndarray>keys
        if cnp.PyArray_ISCARRAY(a) and cnp.PyArray_TYPE(a) == cnp.NPY_INT64 and cnp.PyArray_NDIM(a) == 1:
            return a
    a = checked("keys", as_array("keys", keys), cnp.NPY_INT64, True)
    if cnp.PyArray_NDIM(a) != 1:
        raise ValueError(f"keys must have one dimension, not {cnp.PyArray_NDIM(a)}")
    return a


cdef cnp.ndarray value_array(object vals, int typenum, bint written):
    cdef cnp.ndarray a
    if Py_TYPE(vals) == <PyTypeObject*>cnp.ndarray:
        a = <cnp.ndarray>vals
        if ((cnp.PyArray_ISCARRAY(a) if written else cnp.PyArray_ISCARRAY_RO(a)) and cnp.PyArray_TYPE(a) == typenum
                and 1 <= cnp.PyArray_NDIM(a) <= 2):
            return a
    elif not written and isinstance(vals, (list, tuple)):
        vals = values_of_numbers(vals, typenum)
    a = checked("vals", as_array("vals", vals), typenum, written)
    if not 1 <= cnp.PyArray_NDIM(a) <= 2:
        raise ValueError(f"vals must have one dimension, or two (keys x values per key), not {cnp.PyArray_NDIM(a)}")
    return a


cdef checked(str name, cnp.ndarray a, int typenum, bint written):
    """The one place that says what is wrong with an array."""
    cdef cnp.dtype wanted = cnp.PyArray_DescrFromType(typenum)
    if not cnp.PyArray_EquivTypes(a.descr, wanted):
        raise TypeError(f"{name} must be of dtype {wanted}, not {a.descr}")
    if not cnp.PyArray_IS_C_CONTIGUOUS(a):
        raise ValueError(f"{name} must be C-contiguous (an array of shape {np.shape(a)} with strides {(<object>a).strides} is not)")
    if not cnp.PyArray_ISALIGNED(a):
        raise ValueError(f"{name} must be aligned in memory")
    if written and not cnp.PyArray_ISWRITEABLE(a):
        raise ValueError(f"{name} must be writeable: {'keys are drawn' if name == 'keys' else 'values are pulled'} into this array")
    return a


cdef as_array(str name, object x):
    """The ndarray x, or the memory of the torch CPU tensor x."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array: masks are not kept")
    if isinstance(x, np.ndarray):
        return x
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, getattr(torch, "Tensor", ())):
        if x.device.type != "cpu":
            raise TypeError(f"{name} must be in main memory, but this tensor is on device {x.device}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, not one of layout {x.layout}")
        try:
            return x.detach().numpy()
        except (RuntimeError, TypeError) as error:      # bfloat16, lazily conjugated or negated, ...
            raise TypeError(f"{name} is a tensor of {x.dtype} without memory that NumPy can share: {error}") from None
    raise TypeError(f"{name} must be a NumPy array or a torch CPU tensor, not {type(x).__name__}")


cdef keys_of_numbers(object keys):
    if isinstance(keys, range):
        if len(keys) and not (-2**63 <= min(keys[0], keys[len(keys) - 1]) and max(keys[0], keys[len(keys) - 1]) < 2**63):
            raise KeyRangeError(f"{keys} has keys beyond 64 bits")
        return keys.start + keys.step * np.arange(len(keys), dtype=np.int64)
    if not len(keys):
        return np.empty(0, np.int64)
    try:
        a = np.array(keys)
    except ValueError as error:
        raise TypeError(f"keys must be a flat list of ints: {error}") from None
    if a.dtype.kind == "i":
        return a.astype(np.int64, copy=False)
    if a.dtype.kind in "uO":        # above 63 bits, or not numbers at all
        for key in a.flat:
            if not isinstance(key, (int, np.integer)) or isinstance(key, bool):
                raise TypeError(f"keys must be ints, not {type(key).__name__}")
            if not -2**63 <= key < 2**63:
                raise KeyRangeError(f"key {key} is beyond 64 bits")
        return a.astype(np.int64)
    raise TypeError(f"keys must be ints, not {a.dtype}")


cdef values_of_numbers(object vals, int typenum):
    cdef cnp.dtype wanted = cnp.PyArray_DescrFromType(typenum)
    try:
        a = np.array(vals) if len(vals) else np.empty(0, wanted)
    except ValueError as error:
        raise TypeError(f"vals must be numbers: {error}") from None
    if not np.can_cast(a.dtype, wanted, "same_kind"):
        raise TypeError(f"vals must be of dtype {wanted}, not {a.dtype}")
    return a.astype(wanted, order="C", copy=False)
