# Memory that has ended for an instant.  What cannot be done without, and nobody would come back to, is tried again:
# ALLOCATION_TRIES times, the first few at once, then each millisecond, while other threads run and may free some.

cdef extern from *:
    """
    #include <unistd.h>
    #define AIRN_ALLOCATION_TRIES 100
    #define AIRN_TRIES_AT_ONCE 3
    static inline void airn_await_memory(int tries)
    {
        if (tries < AIRN_TRIES_AT_ONCE)
            return;
        Py_BEGIN_ALLOW_THREADS
        usleep(1000);
        Py_END_ALLOW_THREADS
    }
    /* A method, to be called later; None: there was no memory for it. */
    static inline PyObject *airn_method(PyObject *owner, PyObject *name)
    {
        PyObject *found;
        int tries;
        for (tries = 0; tries < AIRN_ALLOCATION_TRIES; tries++) {
            found = PyObject_GetAttr(owner, name);
            if (found != NULL)
                return found;
            PyErr_Clear();
            airn_await_memory(tries);
        }
        return Py_NewRef(Py_None);
    }
    """
    int ALLOCATION_TRIES "AIRN_ALLOCATION_TRIES"
    void await_memory "airn_await_memory"(int tries) noexcept
    object method "airn_method"(object owner, object name)
