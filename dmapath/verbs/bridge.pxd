# cython: language_level=3
from libc.stdint cimport uintptr_t

from dmapath.verbs.ibv cimport ibv_context, ibv_cq, ibv_mr, ibv_pd, ibv_qp

cdef ibv_context *as_context(object obj) except NULL
cdef ibv_pd *as_pd(object obj) except NULL
cdef ibv_cq *as_cq(object obj) except NULL
cdef ibv_qp *as_qp(object obj) except NULL
cdef ibv_mr *as_mr(object obj) except NULL

# where an object keeps its pointer, so that C code sees it go; NULL where that is not known for sure
cdef uintptr_t *field(object obj, str kind, uintptr_t now) noexcept

# the pointer now, 0 never: closed objects are refused; what it leads to is not looked at
cdef uintptr_t pointer(object obj, str kind) except 0
