"""The devices that a plan knows. Never imports torch, so that an unknown one is answered at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """A GPU: bytes that torch can allocate, and dense FLOP/s in 16 bit (tensor cores) and in fp32 (without TF32).

    `half`: whether ``precision=auto`` computes in 16 bit there.
    """

    name: str
    memory: float
    flops: float
    flops_fp32: float
    half: bool = True


FLOP_A_CYCLE = 32
"""Of a core, in 32 bit: two multiply-adds of 8 numbers, as AVX2 has them."""
HERTZ = 2.5e9
"""Of a core where the machine does not say."""


def this_cpu(threads: int = 1) -> Device:
    """So many cores of this machine, with all its memory; the speed is what its clock allows at best."""
    try:
        said = re.search(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        said = None
    clock = float(said[1]) * 1e6 if said else HERTZ
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    speed = threads * FLOP_A_CYCLE * clock
    cores = f"{threads} core{'s' if threads > 1 else ''}"
    return Device(f"CPU of this machine ({cores} at {clock / 1e9:.1f} GHz)", memory, speed, speed, half=False)


GIB = 2.0**30
# FLOP/s: the makers' data sheets, dense (their "with sparsity" numbers halved), with fp32 accumulation.
# Bytes: torch.cuda.get_device_properties().total_memory, somewhat less than the size in the name.
DEVICES = {
    # NVIDIA A100 Tensor Core GPU data sheet (2021): BF16 312, FP32 19.5 TFLOPS; 80 GB SXM
    "a100": Device("NVIDIA A100 80GB", 79.1 * GIB, 312e12, 19.5e12),
    "a100_40gb": Device("NVIDIA A100 40GB", 39.4 * GIB, 312e12, 19.5e12),
    # NVIDIA H100 Tensor Core GPU data sheet (2023), SXM: BF16 1979 with sparsity, FP32 67; 80 GB
    "h100": Device("NVIDIA H100 SXM 80GB", 79.1 * GIB, 989.4e12, 67e12),
    # NVIDIA H200 Tensor Core GPU data sheet (2024), SXM: as the H100; 141 GB
    "h200": Device("NVIDIA H200 SXM 141GB", 139.7 * GIB, 989.4e12, 67e12),
    # NVIDIA HGX B200 data sheet (2024), one of eight: BF16 4500 with sparsity, FP32 75; 180 GB
    "b200": Device("NVIDIA B200 180GB", 178.0 * GIB, 2250e12, 75e12),
    # NVIDIA L40S data sheet (2023): BF16 362 dense, FP32 91.6; 48 GB
    "l40s": Device("NVIDIA L40S 48GB", 44.4 * GIB, 362e12, 91.6e12),
    # NVIDIA Ada GPU Architecture white paper (2022), table 2: BF16 165.2 with FP32 accumulation, FP32 82.6; 24 GB
    "rtx4090": Device("NVIDIA RTX 4090 24GB", 23.5 * GIB, 165.2e12, 82.6e12),
    # NVIDIA RTX 6000 Ada data sheet (2022): tensor 1457 FP8 with sparsity = BF16 364 dense, FP32 91.1; 48 GB
    "rtx6000ada": Device("NVIDIA RTX 6000 Ada 48GB", 47.4 * GIB, 364e12, 91.1e12),
    # this machine: its memory, and trainer.threads cores
    "cpu": this_cpu(),
}
