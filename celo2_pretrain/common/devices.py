"""The GPUs that a plan can be made for: what the vendors' data sheets say, and what is assumed of a node."""

import os
from dataclasses import dataclass, replace

from celo2_pretrain.common.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One GPU (or one rank's share of this machine) and its way to the others. Peaks are dense, bandwidths one way."""

    name: str
    memory: float  # bytes that a process can use, some percent below the name's
    bf16: float  # FLOP/s of matrix units with float32 accumulation
    fp32: float  # FLOP/s without tensor cores
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to the other GPUs of the node, one way
    per_node: int
    network: float  # bytes/s to other nodes, per GPU, one way
    source: str

    def peak(self, precision: str) -> float:
        """FLOP/s of products in that precision."""
        return self.fp32 if precision == "fp32" else self.bf16


def _gpu(name, gib, bf16, fp32, bandwidth, link, per_node, network, source) -> Device:
    """Units of the data sheets: GiB, TFLOP/s, GB/s; network in Gbit/s per GPU."""
    return Device(name, gib * GIB, bf16 * 1e12, fp32 * 1e12, bandwidth * 1e9, link * 1e9, per_node, network / 8 * 1e9, source)


# The network is not the GPU's: it is that of the vendor's reference node, named in the source.
DEVICES = {
    "h100": _gpu("H100 80GB SXM", 79, 989, 67, 3350, 450, 8, 400, "NVIDIA H100 datasheet (dense); DGX H100: 8 x 400 Gbit/s"),
    "h200": _gpu("H200 141GB SXM", 139, 989, 67, 4800, 450, 8, 400, "NVIDIA H200 datasheet (dense); DGX H200: 8 x 400 Gbit/s"),
    "b200": _gpu(
        "B200 180GB", 178, 2250, 75, 8000, 900, 8, 400, "NVIDIA DGX B200 datasheet, an eighth of it (dense); 8 x 400 Gbit/s"
    ),
    "a100-80": _gpu(
        "A100 80GB SXM", 79, 312, 19.5, 2039, 300, 8, 200, "NVIDIA A100 datasheet (dense); DGX A100: 8 x 200 Gbit/s"
    ),
    "a100-40": _gpu(
        "A100 40GB SXM", 39, 312, 19.5, 1555, 300, 8, 200, "NVIDIA A100 datasheet (dense); DGX A100: 8 x 200 Gbit/s"
    ),
    "mi300x": _gpu(
        "MI300X 192GB",
        191,
        1307,
        163,
        5300,
        448,
        8,
        400,
        "AMD MI300X data sheet (dense); 7 Infinity Fabric links of 64 GB/s; 8 x 400 Gbit/s assumed",
    ),
    "l4": _gpu(
        "L4 24GB",
        22,
        121,
        30.3,
        300,
        32,
        8,
        12.5,
        "NVIDIA L4 datasheet (half of its figure with sparsity); PCIe 4.0 x16; 100 Gbit/s a node assumed",
    ),
    "4090": _gpu(
        "RTX 4090 24GB",
        23.5,
        165,
        82.6,
        1008,
        32,
        8,
        12.5,
        "NVIDIA Ada architecture whitepaper (dense); PCIe 4.0 x16; 100 Gbit/s a node assumed",
    ),
}
# A CPU's peaks depend on the machine: these are assumed, for an order of magnitude.
CPU_FLOPS_PER_CORE, CPU_BANDWIDTH = 50e9, 20e9
NAMES = (*DEVICES, "cpu")


def device(name: str, ranks: int) -> Device:
    """The device called `name`; "cpu" is one rank's share of this machine. Raises UserError for an unknown name."""
    if name in DEVICES:
        return DEVICES[name]
    if name != "cpu":
        raise UserError(f"--gpu {name}: unknown; the known ones are {', '.join(NAMES)}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks
    flops = CPU_FLOPS_PER_CORE * (os.cpu_count() or 1) / ranks
    return Device(
        "CPU (a rank's share)",
        memory,
        flops,
        flops,
        CPU_BANDWIDTH / ranks,
        CPU_BANDWIDTH / ranks,
        ranks,
        CPU_BANDWIDTH / ranks,
        "this machine's cores and memory; 50 GFLOP/s a core and 20 GB/s assumed",
    )


def with_network(device: Device, gbits: float | None, per_node: int | None) -> Device:
    """The device in another node: Gbit/s of network per GPU, GPUs in a node."""
    if gbits is not None:
        device = replace(device, network=gbits / 8 * 1e9)
    return replace(device, per_node=per_node) if per_node is not None else device
