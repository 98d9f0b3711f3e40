# cython: language_level=3
from dmapath.request cimport Mappable


cdef class Bio(Mappable):
    cdef readonly str op
    cdef readonly object sector
    cdef readonly Bio integrity


cdef class Request(Mappable):
    cdef readonly str op
    cdef readonly tuple bios
    cdef readonly Bio integrity
