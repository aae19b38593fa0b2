# Read ownership.pyx first.

from aiouringnet._engine.interface cimport Handle
from aiouringnet._engine.readiness cimport Readiness
from aiouringnet._engine.selecting cimport Selecting


cdef extern from *:
    """
    /* list.append() and set.add(); 0: there was no memory.
     *
     * Not by an except clause of Cython's: where there is no memory for a traceback either, what is compiled of it,
     * unless it is a mere pass, counts down the references to that. */
    static inline int airn_append(PyObject *list, PyObject *item)
    {
        if (PyList_Append(list, item) == 0)
            return 1;
        PyErr_Clear();
        return 0;
    }
    static inline int airn_add(PyObject *set, PyObject *item)
    {
        if (PySet_Add(set, item) == 0)
            return 1;
        PyErr_Clear();
        return 0;
    }
    """
    bint airn_append(list items, object item) noexcept
    bint airn_add(set items, object item) noexcept


cdef class Owner(Selecting):
    cdef set live                   # handles with operations in flight: their owner
    cdef set cancelled              # those of them that were asked to end
    cdef list kept                  # what a pass has let go of, which its callers may still be using

    cdef void begin(self, Handle handle) noexcept
    cdef void end(self, Handle handle) noexcept
    cdef int watch_in(self, Readiness ready, Handle handle, int fd, unsigned int events) noexcept
    cdef void cancel_failed(self, int result) noexcept
    cdef void keep(self, object thing) noexcept
    cdef void leave(self) noexcept
