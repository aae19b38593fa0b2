from aiouringnet._engine.engine cimport Engine


cdef void drop_empty_dict(object instance) noexcept

# Whether a protocol wants get_buffer() and buffer_updated() called, not data_received()
cdef bint is_buffered(object protocol) except -1

# Whether a protocol has a get_local_write_buffer_size() of its own
cdef bint tells(object protocol) except -1

# Leave a call to the loop's thread if this is another one
cdef bint called_soon_threadsafe(Engine engine, object call) except -1

# Both limits of a write buffer, in bytes, from what set_write_buffer_limits() was given
cdef tuple limits(object high, object low, Py_ssize_t default)

# An immutable bytes object that holds `data`, and where in it the data lies
cdef object immutable(object data, const char** start, Py_ssize_t* size)
