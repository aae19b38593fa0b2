# Read setup.pyx first.

cdef enum:
    BUFFER_GROUP = 1

cdef list flag_ladder(bint sqpoll)
cdef list flags_to_names(object flags)
cdef void* map_anonymous(size_t size, bint pinned) except NULL
