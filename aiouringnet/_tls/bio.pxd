# Read bio.pyx first.

from aiouringnet._tls.buffer cimport Buffer
from aiouringnet._tls.offload cimport Kernel


cdef struct Link:
    # ciphertext received and not yet read
    const char* input
    size_t input_size
    # ciphertext to send: into the room that expect_output() made, then into `spill`
    char* room
    size_t room_size, room_used
    Buffer spill
    Kernel* kernel              # of an Offload, or NULL


cdef int make_method() except -1
cdef void* new_bio(Link* link) noexcept
