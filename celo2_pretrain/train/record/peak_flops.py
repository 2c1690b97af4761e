"""How many FLOP/s the device could do, against which a run's model FLOPs are held (MFU)."""

import time
from dataclasses import dataclass

import torch

from celo2_pretrain.common.devices import DEVICES
from celo2_pretrain.config import Config

# What torch calls the devices of common/devices.py; the parts must all be in the name. PCIe cards have other peaks.
GPU_NAMES = {
    "h100": ("H100", "HBM3"),
    "h200": ("H200",),
    "b200": ("B200",),
    "a100-80": ("A100-SXM4-80GB",),
    "a100-40": ("A100-SXM4-40GB",),
    "mi300x": ("MI300X",),
    "l4": ("NVIDIA L4",),
    "4090": ("RTX 4090",),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATMUL_SIZE, MATMUL_TIMES = 768, 4


@dataclass
class Peak:
    """FLOP/s of one rank's device (None: not known), and where the figure is from."""

    flops: float | None
    source: str


def peak_of(config: Config, device: torch.device) -> Peak:
    """The peak that `track.peak_tflops` gives, or the data sheet's of a GPU that common/devices.py knows; on a CPU the rate of
    a product of matrices, measured now, so every rank must call it at the same time."""
    if config.track.peak_tflops is not None:
        return Peak(config.track.peak_tflops * 1e12, "track.peak_tflops")
    precision = config.train.precision
    if device.type == "cpu":
        return Peak(
            matmul_rate(DTYPES[precision]),
            f"a {MATMUL_SIZE}² matrix product in {precision} at the start, on this rank's {torch.get_num_threads()} thread(s)",
        )
    name = torch.cuda.get_device_name(device)
    for key, parts in GPU_NAMES.items():
        if all(part in name for part in parts) and not (key == "l4" and "L40" in name):
            known = DEVICES[key]
            return Peak(known.fp32 if precision == "fp32" else known.bf16, f"{known.source}, {precision}")
    return Peak(None, f"not known for {name}: give track.peak_tflops")


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s, the best of a few: a fraction of a second in all."""
    x = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)
    seconds = []
    for _ in range(MATMUL_TIMES):
        begin = time.perf_counter()
        torch.mm(x, x)
        seconds.append(time.perf_counter() - begin)
    return 2 * MATMUL_SIZE**3 / min(seconds)
