# Into a connection's context for its callbacks, and out of it; the engine knows which one is entered.

from cpython.object cimport PyObject

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport flag


cdef extern from "Python.h":
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1


cdef inline bint enter(object context, flag* entered, Engine engine, PyObject** before) except -1:
    """False where it is entered already, by a callback that runs the loop."""
    if entered[0]:
        return False
    PyContext_Enter(context)
    entered[0] = True
    before[0] = engine.entered
    engine.entered = <PyObject*>context
    return True


cdef inline int leave(object context, flag* entered, Engine engine, PyObject* before) except -1:
    entered[0] = False
    engine.entered = before
    PyContext_Exit(context)
    return 0
