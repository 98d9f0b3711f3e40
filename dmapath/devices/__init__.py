"""Simulated devices: they see memory through ``struct dma_bus_ops`` alone, and drivers see their registers alone."""
