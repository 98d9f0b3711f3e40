# cython: language_level=3
"""Users' Python code that native code calls (observers, back ends, registers): what it raises is shown, not raised, since
there is nobody to raise it to; and Ctrl-C in it waits until the operation around it has ended.
"""

from cpython.ref cimport Py_INCREF, PyObject

cdef extern from "Python.h":
    void PyErr_Restore(PyObject *, PyObject *, PyObject *)
    void PyErr_WriteUnraisable(PyObject *)
    int Py_AddPendingCall(int (*)(void *) noexcept, void *)
    void PyErr_SetInterrupt()

cdef extern from *:
    """
    static __thread int dmapath_callback_depth; /* calls of users' code that this thread is in */
    """
    int dmapath_callback_depth


cdef void enter() noexcept:
    global dmapath_callback_depth
    dmapath_callback_depth += 1


cdef void leave() noexcept:
    global dmapath_callback_depth
    dmapath_callback_depth -= 1


# run by the main thread between two byte codes: inside another callback the operation still goes on
cdef int interrupt(void *_) noexcept:
    if dmapath_callback_depth:
        Py_AddPendingCall(interrupt, NULL)
    else:
        PyErr_SetInterrupt()
    return 0


cdef void show(object error) noexcept:
    if isinstance(error, KeyboardInterrupt):
        Py_AddPendingCall(interrupt, NULL)
        return
    kind, traceback = type(error), error.__traceback__
    Py_INCREF(kind)  # PyErr_Restore takes a reference of each
    Py_INCREF(error)
    if traceback is not None:
        Py_INCREF(traceback)
    PyErr_Restore(<PyObject *>kind, <PyObject *>error, NULL if traceback is None else <PyObject *>traceback)
    PyErr_WriteUnraisable(NULL)
