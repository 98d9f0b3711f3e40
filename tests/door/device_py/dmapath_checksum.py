"""Another package's device, in Python: it sums bytes that it fetches by DMA. Registers of 8 bytes: address, length, go, sum,
state (1 done, 2 failed)."""

import dmapath
from dmapath.mmio import registers


class Checksum:
    def __init__(self):
        self.limits = {"dma_mask": 2**48 - 1, "max_segment_size": 1 << 20}
        self.mmio = registers(self)
        self.address = self.length = self.sum = self.state = 0
        self.pending = False

    def attach(self, device):
        self.engine = dmapath.DmaEngine(device)

    def read_register(self, offset, width):
        return {0: self.address, 8: self.length, 24: self.sum, 32: self.state}.get(offset, 0)

    def write_register(self, offset, width, value):
        if offset == 0:
            self.address = value
        elif offset == 8:
            self.length = value
        elif offset == 16:
            self.pending, self.state = True, 0
            self.sum = self.sum if value == 2 else 0  # 2: go on adding

    def work(self):
        if not self.pending:
            return 0
        self.pending = False
        try:
            self.sum += sum(self.engine.read([(self.address, self.length)]))
            self.state = 1
        except dmapath.DmaFault:
            self.state = 2
        return 1
