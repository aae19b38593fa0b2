# Read waiting.pyx first.

from aiouringnet._engine.ring.queues cimport Queues


cdef class Waiting(Queues):
    pass
