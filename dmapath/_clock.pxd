# cython: language_level=3
"""The monotonic clock, without Python."""
from libc.stdint cimport uint64_t

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int, timespec *)
    int CLOCK_MONOTONIC


cdef inline uint64_t now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t>t.tv_sec * 1000000000 + <uint64_t>t.tv_nsec


# when a wait of so many seconds (addr.as_seconds) that begins now has to end
cdef inline uint64_t end_of(double seconds) noexcept nogil:
    return now_ns() + <uint64_t>(seconds * 1e9)
