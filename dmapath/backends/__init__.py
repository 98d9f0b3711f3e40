"""Backends: each fills in one ops table (``dmapath.h``, ``struct dma_ops``)."""
