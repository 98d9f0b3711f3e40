# cython: language_level=3
"""Registers between drivers and devices, for those of either that are written in Python."""
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from libc.stdint cimport UINT64_MAX, uint64_t
from libc.stdlib cimport free, malloc

from dmapath._callbacks cimport enter, leave, show
from dmapath.abi cimport DMAPATH_MMIO_CAPSULE, dma_mmio

from dmapath.addr import as_length
from dmapath.errors import AddressTypeError, DmaValueError


cdef uint64_t py_read(void *owner, uint64_t offset, unsigned int width) noexcept with gil:
    enter()
    try:
        return (<object>owner).read_register(offset, width)
    except BaseException as e:
        show(e)
        return UINT64_MAX  # what a bus reads from where nobody answers
    finally:
        leave()


cdef void py_write(void *owner, uint64_t offset, unsigned int width, uint64_t value) noexcept with gil:
    enter()
    try:
        (<object>owner).write_register(offset, width, value)
    except BaseException as e:
        show(e)
    finally:
        leave()


cdef int py_relax(void *owner) noexcept with gil:
    enter()
    try:
        return (<object>owner).work()
    except BaseException as e:
        show(e)
        return 0
    finally:
        leave()


cdef void forget(object capsule) noexcept:
    free(PyCapsule_GetPointer(capsule, DMAPATH_MMIO_CAPSULE))


def registers(owner):
    """The capsule "dmapath.mmio.v1" of a device that is written in Python, for its attribute ``mmio``.

    ``owner`` has ``read_register(offset, width)``, ``write_register(offset, width, value)`` and ``work()``, which does what
    there is to do and returns how much that was. It must outlive the capsule, as it does where it holds it itself. A method
    that raises is shown by sys.unraisablehook; a read then gives all ones.
    """
    cdef dma_mmio *regs
    for name in ("read_register", "write_register", "work"):
        if not callable(getattr(owner, name, None)):
            raise AddressTypeError(f"an object with a method {name}", argument="owner", value=owner)
    regs = <dma_mmio *>malloc(sizeof(dma_mmio))
    if regs == NULL:
        raise MemoryError("no memory for the registers")
    regs.priv, regs.read, regs.write, regs.relax = <void *>owner, py_read, py_write, py_relax
    return PyCapsule_New(regs, DMAPATH_MMIO_CAPSULE, forget)


# a device's registers, for a driver whose parameter `argument` it is
cdef const dma_mmio *registers_of(object hardware, str argument) except NULL:
    capsule = getattr(hardware, "mmio", None)
    if not PyCapsule_IsValid(capsule, DMAPATH_MMIO_CAPSULE):
        raise AddressTypeError('an object whose attribute mmio is a capsule "dmapath.mmio.v1"', argument=argument,
                               value=hardware)
    return <const dma_mmio *>PyCapsule_GetPointer(capsule, DMAPATH_MMIO_CAPSULE)


cdef class Mmio:
    """A device's registers for a driver in Python: ``hardware`` has the capsule in its attribute ``mmio``."""

    cdef const dma_mmio *regs
    cdef object hardware

    def __cinit__(self, hardware):
        self.hardware, self.regs = hardware, registers_of(hardware, "hardware")

    cdef uint64_t place(self, offset, int width) except? 0:
        if width not in (4, 8):
            raise DmaValueError("4 or 8 bytes", argument="width", value=width)
        return as_length(offset, "offset", least=0)

    def read(self, offset, int width=4):
        """A register of ``width`` bytes (4 or 8) at a byte offset."""
        cdef uint64_t at = self.place(offset, width)
        return self.regs.read(self.regs.priv, at, width)

    def write(self, offset, value, int width=4):
        """Write a register."""
        cdef uint64_t at = self.place(offset, width), v = int(value)
        self.regs.write(self.regs.priv, at, width, v)

    def relax(self):
        """Wait a little: a simulated device works meanwhile. How much it did."""
        return self.regs.relax(self.regs.priv)
