# cython: language_level=3
from dmapath.backends.base cimport Backend


cdef class PythonBackend(Backend):
    cdef readonly object owner
