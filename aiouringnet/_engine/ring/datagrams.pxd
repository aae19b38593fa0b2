from aiouringnet._engine.datagrams cimport Datagrams
from aiouringnet._engine.interface cimport flag


# RingDatagrams.polling
cdef enum:
    NOT_POLLING = 0
    POLLING
    POLL_ENDING


cdef class RingDatagrams(Datagrams):
    cdef flag polling               # what has become of the poll for input
    cdef flag room_polled           # there is one for room
    cdef flag room_ending

    cdef bint by_readiness(self) noexcept
