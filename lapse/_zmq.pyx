"""Finds libzmq's functions in the library that pyzmq has loaded.

Design: Lapse's sockets are made by pyzmq and used from C, so both must use one and the same libzmq. pyzmq's compiled module is
already in memory; dlopen with RTLD_NOLOAD gives its handle, dlsym looks the functions up in it and in the libraries that it
is linked to. So Lapse needs no libzmq headers, no system package and no link flag. The handle is kept until the process ends.
dlopen and dlsym are called by way of ctypes: a module that is linked to them on a new system does not load on one with a C library older
than 2.34, where they were in a library of their own.
"""
import ctypes
import os

from libc.stdint cimport uintptr_t
from libc.string cimport memcpy

OLDEST = (4, 3, 3)
cdef object library                    # keeps the handle; ctypes never closes one


cdef int find(str name, void* pointer) except -1:
    """Store the address of the function `name` in the function pointer that `pointer` points to."""
    cdef uintptr_t address
    try:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        raise ImportError(f"lapse: the libzmq that pyzmq uses has no function {name}; install pyzmq >= 26 from a wheel") from None
    memcpy(pointer, &address, sizeof(address))
    return 0


cdef tuple load():
    """Set all function pointers; return libzmq's version."""
    global library
    cdef void (*zmq_version)(int*, int*, int*) noexcept nogil
    cdef int major = 0, minor = 0, patch = 0
    try:
        import zmq.backend.cython._zmq as backend
    except ImportError as error:
        raise ImportError("lapse: needs pyzmq >= 26 with its compiled (Cython) backend") from error
    try:
        library = ctypes.CDLL(backend.__file__, mode=os.RTLD_NOLOAD | os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        raise ImportError(f"lapse: cannot find pyzmq's library {backend.__file__} in memory: {error}") from None
    find("zmq_version", &zmq_version)
    zmq_version(&major, &minor, &patch)
    if (major, minor, patch) < OLDEST:
        raise ImportError(f"lapse: needs libzmq >= {'.'.join(map(str, OLDEST))}, pyzmq uses {major}.{minor}.{patch}")
    find("zmq_msg_init", &zmq_msg_init)
    find("zmq_msg_init_size", &zmq_msg_init_size)
    find("zmq_msg_init_data", &zmq_msg_init_data)
    find("zmq_msg_data", &zmq_msg_data)
    find("zmq_msg_size", &zmq_msg_size)
    find("zmq_msg_more", &zmq_msg_more)
    find("zmq_msg_send", &zmq_msg_send)
    find("zmq_msg_recv", &zmq_msg_recv)
    find("zmq_msg_close", &zmq_msg_close)
    find("zmq_msg_move", &zmq_msg_move)
    find("zmq_msg_gets", &zmq_msg_gets)
    find("zmq_errno", &zmq_errno)
    find("zmq_strerror", &zmq_strerror)
    find("zmq_poll", &zmq_poll)
    find("zmq_setsockopt", &zmq_setsockopt)
    find("zmq_getsockopt", &zmq_getsockopt)
    return major, minor, patch


libzmq_version: tuple[int, int, int] = load()
