"""Peak rates of GPUs by name: what model FLOP/s are a part of.

Dense bf16 with float32 sums, in TFLOP/s, from NVIDIA's data sheets (which print them twice as high, with sparsity, from Hopper on).
"""

from __future__ import annotations

PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.0),
    ("H200", 989.4),
    ("H100", 989.4),
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("A100", 311.9),
    ("A800", 311.9),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
"""Parts of device names, more special ones first."""


def peak_tflops(device_name: str) -> float | None:
    """Peak of the GPU that torch names so; None for an unknown one."""
    return next((peak for part, peak in PEAK_TFLOPS if part in device_name), None)
