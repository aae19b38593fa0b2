from aiouringnet._engine.engine cimport Engine
from aiouringnet._transports.input cimport StreamInput


# The mode of a pipe's file, which does not block from now on; ValueError(refusal) for a file that is none
cdef int open_end(StreamInput transport, Engine engine, object pipe, object extra, str refusal) except -1
cdef int check_usable(StreamInput transport) except -1
# Something that asyncio's event loop would report, too
cdef void failed(StreamInput transport, object exc, str message) noexcept
cdef void log_end(StreamInput transport) noexcept

# What connecting ends with
cdef int call_connection_made(StreamInput transport, object self_, object start, object waiter) except -1

# The end
# Its I/O ends; whether connection_lost() can be called
cdef bint begins_to_close(StreamInput transport) noexcept
cdef int end_connection(StreamInput transport, object exc) except -1
cdef void close_file(StreamInput transport) noexcept
