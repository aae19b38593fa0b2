"""What transports have in common: protocols, threads, limits, and the bytes that are written."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromObject, PyBytes_GET_SIZE
from cpython.object cimport PyObject, PyObject_TypeCheck, PyTypeObject

from aiouringnet._engine.engine cimport Engine

import asyncio

from aiouringnet._transports.public import Protocol, aiofn_is_buffered_protocol, tells_what_it_holds


cdef extern from "Python.h":
    bint PyMemoryView_Check(object)
    PyObject* PyMemoryView_GET_BASE(object)
    PyObject** _PyObject_GetDictPtr(object)
    void Py_CLEAR(PyObject*)


cdef object plain_protocol = asyncio.Protocol
cdef object buffered_protocol = asyncio.BufferedProtocol
cdef object public_protocol = Protocol


cdef void drop_empty_dict(object instance) noexcept:
    """Cython makes the dictionary of attributes with each instance: memory, and slower calls of all methods.

    CPython makes it where it is missing, when the first attribute is set.
    """
    Py_CLEAR(_PyObject_GetDictPtr(instance)[0])


cdef bint is_buffered(object protocol) except -1:
    """aiofn_is_buffered_protocol(protocol), which is for those that are not asyncio's and no more."""
    if (
        PyObject_TypeCheck(protocol, <PyTypeObject*>plain_protocol)
        and not PyObject_TypeCheck(protocol, <PyTypeObject*>buffered_protocol)
        and getattr(protocol, "is_buffered_protocol", None) is None
        and getattr(protocol, "data_received", None) is not None
    ):
        return False
    return aiofn_is_buffered_protocol(protocol)


cdef bint tells(object protocol) except -1:
    """tells_what_it_holds(protocol)."""
    return PyObject_TypeCheck(protocol, <PyTypeObject*>public_protocol) and tells_what_it_holds(protocol)


cdef bint called_soon_threadsafe(Engine engine, object call) except -1:
    """Whether this is another thread than the loop's, which makes the call now: the collector runs anywhere."""
    if engine.closed or not engine.is_foreign():
        return False
    try:
        engine.loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not engine.loop.is_closed():
            raise
    return True


cdef tuple limits(object high, object low, Py_ssize_t default):
    if high is None:
        high = default if low is None else 4 * low
    if low is None:
        low = high // 4
    if not high >= low >= 0:
        raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
    return high, low


cdef object immutable(object data, const char** start, Py_ssize_t* size):
    """An immutable bytes object that holds `data`, and where in it the data lies."""
    cdef Py_buffer view
    cdef PyObject* base
    if PyMemoryView_Check(data):
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        except BufferError:
            pass  # not contiguous
        else:
            try:
                base = PyMemoryView_GET_BASE(data)
                if base != NULL and PyBytes_CheckExact(<object>base):
                    start[0] = <const char*>view.buf
                    size[0] = view.len
                    return <object>base
            finally:
                PyBuffer_Release(&view)
    if PyBytes_CheckExact(data):
        copy = data
    elif PyObject_CheckBuffer(data):
        copy = PyBytes_FromObject(data)  # whatever a subclass says in __bytes__()
    else:
        raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
    start[0] = PyBytes_AS_STRING(copy)
    size[0] = PyBytes_GET_SIZE(copy)
    return copy
