"""Real RDMA through libibverbs: the back end, and the objects that move bytes over it."""
