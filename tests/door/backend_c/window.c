/* SPDX-License-Identifier: MIT */
/* Another package's back end, in C: a bridge that shows memory 1 TiB higher, and counts. */
#include <Python.h>

#include <dmapath/dmapath.h>

#define HIGHER (1ull << 40)

struct window { PyObject_HEAD uint64_t maps, unmaps, live; };
static const struct dmapath_memory_api *memory;

static int window_map(struct dma_device *d, phys_addr_t p, uint64_t n, enum dma_data_direction dir, unsigned long attrs,
                      dma_addr_t *out)
{
    struct window *w = d->priv;
    (void)attrs;
    if (dir == DMA_NONE || !n)
        return -EINVAL;
    __atomic_add_fetch(&w->maps, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&w->live, n, __ATOMIC_RELAXED);
    *out = dma_addr(p.v + HIGHER);
    return 0;
}
static int window_unmap(struct dma_device *d, dma_addr_t a, uint64_t n, enum dma_data_direction dir, unsigned long attrs)
{
    struct window *w = d->priv;
    (void)a, (void)dir, (void)attrs;
    __atomic_add_fetch(&w->unmaps, 1, __ATOMIC_RELAXED);
    __atomic_sub_fetch(&w->live, n, __ATOMIC_RELAXED);
    return 0;
}
static const struct dma_ops ops = { .abi = DMAPATH_ABI, .size = sizeof(struct dma_ops), .name = "window",
                                    .map_phys = window_map, .unmap_phys = window_unmap };

static int window_access(struct dma_device *d, dma_addr_t a, uint64_t n, void *buf, int write, struct dma_fault *fault)
{
    if (a.v < HIGHER)
        return dma_fault_at(fault, a.v, 0, DMA_FAULT_NOT_PRESENT, write);
    return memory->access(d, phys_addr(a.v - HIGHER), n, buf, write, fault);
}
static const struct dma_bus_ops bus = { window_access };

static PyObject *get_ops(PyObject *self, void *unused)
{
    PyObject *capsule = PyCapsule_New((void *)&ops, DMAPATH_OPS_CAPSULE, NULL);
    (void)unused;
    if (capsule)
        PyCapsule_SetContext(capsule, self); /* becomes dma_device.priv; the Device keeps us alive */
    return capsule;
}
static PyObject *get_bus(PyObject *self, void *unused)
{
    (void)self, (void)unused;
    return PyCapsule_New((void *)&bus, DMAPATH_BUS_CAPSULE, NULL);
}
static PyObject *counters(PyObject *self, PyObject *unused)
{
    struct window *w = (struct window *)self;
    (void)unused;
    return Py_BuildValue("{s:K,s:K,s:K}", "maps", w->maps, "unmaps", w->unmaps, "mapped_bytes", w->live);
}
static PyGetSetDef getset[] = { { "dma_ops", get_ops, NULL, NULL, NULL }, { "dma_bus", get_bus, NULL, NULL, NULL },
                                { NULL, NULL, NULL, NULL, NULL } };
static PyMethodDef methods[] = { { "counters", counters, METH_NOARGS, NULL }, { NULL, NULL, 0, NULL } };
static PyTypeObject type = { PyVarObject_HEAD_INIT(NULL, 0).tp_name = "dmapath_window.Window",
                             .tp_basicsize = sizeof(struct window), .tp_flags = Py_TPFLAGS_DEFAULT,
                             .tp_new = PyType_GenericNew, .tp_getset = getset, .tp_methods = methods };
static struct PyModuleDef module = { PyModuleDef_HEAD_INIT, .m_name = "dmapath_window", .m_size = -1 };

PyMODINIT_FUNC PyInit_dmapath_window(void)
{
    memory = PyCapsule_Import(DMAPATH_MEMORY_CAPSULE, 0);
    if (!memory || PyType_Ready(&type) < 0)
        return NULL;
    PyObject *m = PyModule_Create(&module);
    if (m && PyModule_AddObjectRef(m, "Window", (PyObject *)&type) < 0)
        Py_CLEAR(m);
    return m;
}
