from aiouringnet._engine.pipes cimport End
from aiouringnet._engine.ring.stream cimport RingStream


cdef class RingPipe(RingStream):
    cdef End file_end
