"""Arrays of Python callers, checked in place.

Design: the common case, an exact ndarray that is as it should be, is one type comparison, one flag test and one number-type
test (a few nanoseconds). An exact torch.Tensor that is as it should be is looked at through DLPack's C functions, which its class
hands out. Everything else goes through `checked`. Nothing here imports torch: where no tensor exists, nobody has. Every check comes
before any effect. Runs with the GIL; no state but what the first tensor taught about torch.
"""
import sys

import numpy as np

cimport numpy as cnp
from cpython.exc cimport PyErr_Clear
from cpython.object cimport PyObject, PyTypeObject, Py_TYPE
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from lapse._types cimport FLOAT32, FLOAT64, INT32

from lapse.errors import KeyRangeError

cnp.import_array()

cdef enum:
    DL_CPU = 1                  # numbers of DLPack 1.x, see https://dmlc.github.io/dlpack/latest/c_api.html
    DL_INT = 0
    DL_FLOAT = 2

cdef size_t LOW = 1ull << 32    # below: NULL, and what lies behind it, or the heap of a program that is not position-independent

ctypedef struct DLDevice:
    int32_t device_type
    int32_t device_id

ctypedef struct DLDataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes

ctypedef struct DLTensor:
    void* data
    DLDevice device
    int32_t ndim
    DLDataType dtype
    int64_t* shape
    int64_t* strides            # in numbers
    uint64_t byte_offset

ctypedef int (*export_t)(PyObject*, DLTensor*) noexcept

ctypedef struct exchange_api_t:
    uint32_t major
    uint32_t minor
    void* prev                  # the table of an older major version
    void* managed_tensor_allocator
    void* managed_tensor_from_py_object_no_sync
    void* managed_tensor_to_py_object_no_sync
    export_t dltensor_from_py_object_no_sync
    void* current_work_stream

cdef object tensor_class = None     # torch.Tensor, once a tensor has come
cdef export_t export = NULL         # looks at one: no reference, no copy


cdef int numpy_type(int dtype) noexcept nogil:
    if dtype == FLOAT32:
        return cnp.NPY_FLOAT32
    if dtype == FLOAT64:
        return cnp.NPY_FLOAT64
    if dtype == INT32:
        return cnp.NPY_INT32
    return cnp.NPY_INT64


cdef object key_view(object keys, bint written, view_t* view):
    cdef cnp.ndarray a
    if Py_TYPE(keys) == <PyTypeObject*>cnp.ndarray:
        a = <cnp.ndarray>keys
        if ((cnp.PyArray_ISCARRAY(a) if written else cnp.PyArray_ISCARRAY_RO(a)) and cnp.PyArray_TYPE(a) == cnp.NPY_INT64
                and cnp.PyArray_NDIM(a) == 1):
            look_at(a, view)
            return a
    elif look_at_tensor(keys, cnp.NPY_INT64, view) and view.ndim == 1:
        return keys
    elif not written and isinstance(keys, (list, tuple, range)):
        keys = keys_of_numbers(keys)
    a = checked("keys", keys, cnp.NPY_INT64, written)
    if cnp.PyArray_NDIM(a) != 1:
        raise ValueError(f"keys must have one dimension, not {cnp.PyArray_NDIM(a)}")
    look_at(a, view)
    return a


cdef object value_view(object vals, int typenum, bint written, view_t* view):
    cdef cnp.ndarray a
    if Py_TYPE(vals) == <PyTypeObject*>cnp.ndarray:
        a = <cnp.ndarray>vals
        if ((cnp.PyArray_ISCARRAY(a) if written else cnp.PyArray_ISCARRAY_RO(a)) and cnp.PyArray_TYPE(a) == typenum
                and 1 <= cnp.PyArray_NDIM(a) <= 2):
            look_at(a, view)
            return a
    elif look_at_tensor(vals, typenum, view) and 1 <= view.ndim <= 2:
        return vals
    elif not written and isinstance(vals, (list, tuple)):
        vals = values_of_numbers(vals, typenum)
    a = checked("vals", vals, typenum, written)
    if not 1 <= cnp.PyArray_NDIM(a) <= 2:
        raise ValueError(f"vals must have one dimension, or two (keys x values per key), not {cnp.PyArray_NDIM(a)}")
    look_at(a, view)
    return a


cdef object lasting(object kept):
    return kept if kept is None or isinstance(kept, np.ndarray) else kept.numpy()


cdef cnp.ndarray key_array(object keys):
    cdef view_t view
    return lasting(key_view(keys, False, &view))


cdef object shape_of(object vals):
    return tuple(vals.shape)


cdef int apart(const void* keys, Py_ssize_t n, const void* vals, size_t size) except -1:
    cdef size_t k = <size_t>keys, v = <size_t>vals
    if k < v + size and v < k + <size_t>n * sizeof(int64_t):
        raise ValueError("keys and vals share memory: the keys would be overwritten while they are still needed")
    return 0


cdef void look_at(cnp.ndarray a, view_t* view) noexcept:
    view.data, view.size = cnp.PyArray_DATA(a), cnp.PyArray_SIZE(a)
    view.ndim = cnp.PyArray_NDIM(a)
    view.first = cnp.PyArray_DIM(a, 0)


cdef bint look_at_tensor(object x, int typenum, view_t* view) except -1:
    """Look at a torch tensor that is exactly as it should be; False for whatever else, `checked` says what is wrong with it."""
    cdef DLTensor t
    cdef int64_t size = 1
    cdef int i
    if Py_TYPE(x) != <PyTypeObject*>tensor_class or export is NULL:
        return False
    if export(<PyObject*>x, &t) != 0:
        PyErr_Clear()
        return False
    if (t.device.device_type != DL_CPU or t.dtype.lanes != 1
            or t.dtype.code != (DL_FLOAT if typenum in (cnp.NPY_FLOAT32, cnp.NPY_FLOAT64) else DL_INT)
            or t.dtype.bits != (64 if typenum in (cnp.NPY_INT64, cnp.NPY_FLOAT64) else 32)):
        return False
    for i in reversed(range(t.ndim)):
        if t.strides is not NULL and t.strides[i] != size:
            return False
        size *= t.shape[i]
    view.data, view.size, view.ndim = <char*>t.data + t.byte_offset, size, t.ndim
    view.first = t.shape[0] if t.ndim else 0
    if <size_t>view.data & (t.dtype.bits // 8 - 1) or (<size_t>view.data < LOW and size and not has_memory(x)):
        return False
    # What is lazily negated is the imaginary part of complex numbers: no two of its numbers are neighbours.
    return t.dtype.code == DL_INT or not (x.requires_grad or (size == 1 and x.is_neg()))


cdef bint has_memory(object x) except -1:
    """Whether there is something behind all of a contiguous tensor: not so once its storage has been freed or made smaller."""
    try:
        storage = x.untyped_storage()
        return storage.data_ptr() != 0 and storage.nbytes() >= (x.storage_offset() + x.numel()) * x.element_size()
    except (RuntimeError, TypeError, NotImplementedError):      # of tensors without a storage
        return False


cdef int meet_torch(object torch) except -1:
    """Learn torch's class of tensors and its function to look at one, which is there from torch 2.10 on (DLPack's exchange API)."""
    global tensor_class, export
    cdef exchange_api_t* api
    if tensor_class is None:
        capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
        if capsule is not None:
            api = <exchange_api_t*>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
            while api is not NULL and api.major != 1:
                api = <exchange_api_t*>api.prev
            if api is not NULL:
                export = api.dltensor_from_py_object_no_sync
        tensor_class = torch.Tensor
    return 0


cdef checked(str name, object x, int typenum, bint written):
    """The memory of x, as an ndarray. The one place that says what is wrong with it, and what to do."""
    cdef cnp.dtype wanted = cnp.PyArray_DescrFromType(typenum)
    cdef bint tensor = not isinstance(x, np.ndarray)
    cdef cnp.ndarray a = array_of_tensor(name, x, wanted, written) if tensor else x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array: masks are not kept")
    if not cnp.PyArray_EquivTypes(a.descr, wanted):
        raise TypeError(wrong_dtype(name, wanted, a.descr, f"array.astype(numpy.{wanted})", written))
    if not cnp.PyArray_IS_C_CONTIGUOUS(a):
        raise ValueError(f"{name} must be C-contiguous ({'a tensor' if tensor else 'an array'} of shape {np.shape(a)} with strides "
                         f"{(<object>a).strides} is not)"
                         + way_out(name, "a contiguous one", "tensor.contiguous()" if tensor else "numpy.ascontiguousarray(array)", written))
    if not cnp.PyArray_ISALIGNED(a):
        raise ValueError(f"{name} must be aligned in memory")
    if written and not cnp.PyArray_ISWRITEABLE(a):
        raise ValueError(f"{name} must be writeable: {'keys are drawn' if name == 'keys' else 'values are pulled'} into this array")
    return a


cdef str wrong_dtype(str name, object wanted, object dtype, str copy, bint written):
    return f"{name} must be of dtype {wanted}, not {dtype}" + way_out(name, "one of that dtype", copy, written)


cdef str way_out(str name, str proper, str copy, bint written):
    """What to do instead. Not a copy where the call writes: what is written there would be lost."""
    return f": {'draw' if name == 'keys' else 'pull'} into {proper}, and copy from there" if written else f": use {copy}"


cdef array_of_tensor(str name, object x, object wanted, bint written):
    """The memory of a torch CPU tensor, as an ndarray."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, getattr(torch, "Tensor", ())):
        raise TypeError(f"{name} must be a NumPy array or a torch CPU tensor, not {type(x).__name__}")
    meet_torch(torch)
    if x.device.type != "cpu":
        raise TypeError(f"{name} must be in main memory, but this tensor is on device {x.device}"
                        + way_out(name, "one in main memory", "tensor.cpu()", written))
    if x.layout != torch.strided:
        copies = "tensor.to_dense(), or, of a sparse gradient, the indices and values of tensor.coalesce()"
        raise TypeError(f"{name} must be a dense tensor, not one of layout {x.layout}" + way_out(name, "a dense one", copies, written))
    if x.requires_grad:
        raise TypeError(f"{name} is a tensor that requires grad, and autograd does not see what happens here: use tensor.detach(), "
                        "which shares its memory")
    if x.dtype != getattr(torch, str(wanted)):
        raise TypeError(wrong_dtype(name, wanted, str(x.dtype).removeprefix("torch."), f"tensor.to(torch.{wanted})", written))
    try:
        a = x.numpy()
    except (RuntimeError, TypeError) as error:      # lazily negated, a subclass that has no numpy(), ...
        raise TypeError(f"{name} is a tensor of {x.dtype} without memory that NumPy can share: {error}") from None
    if a.flags.c_contiguous and a.size and not has_memory(x):
        raise TypeError(f"{name} is a tensor without memory: its storage has been freed or is too small, or it is a tracer's")
    return a


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
