from aiouringnet._engine.pipes cimport Pipe


cdef class RingPipe(Pipe):
    pass
