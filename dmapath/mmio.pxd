# cython: language_level=3
from dmapath.abi cimport dma_mmio

cdef const dma_mmio *registers_of(object hardware, str argument) except NULL
