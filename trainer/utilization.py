"""How much of a device training uses: the model FLOPs utilization (MFU).

Chowdhery et al. 2022 (arXiv 2204.02311), appendix B: the FLOP/s of matrix products and attention,
relative to the most that the device makes.
"""

import re
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# FLOP/s of NVIDIA's data sheets, without sparsity, with weights of 16 bits, TF32 and float32.
# A name is words of torch.cuda.get_device_name; the first that fits counts.
PEAKS = {
    "B200": (2250e12, 1125e12, 75e12),
    "H200 NVL": (835.5e12, 417.5e12, 60e12),
    "H200": (989.5e12, 494.5e12, 67e12),
    "H100 NVL": (835.5e12, 417.5e12, 60e12),
    "H100 PCIe": (756.5e12, 378e12, 51e12),
    "H100": (989.5e12, 494.5e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "L4": (121e12, 60e12, 30.3e12),
}
HALF_PRECISIONS = ("bf16-mixed", "bf16-true", "16-mixed", "16-true")


def find_peak(device: str, precision: str, matmul_precision: str = "highest") -> float | None:
    """Return the FLOP/s that a device makes at most; None if it is not known.

    Args:
        device: name of the device, as in torch.cuda.get_device_name.
        precision: of the Trainer, e.g. bf16-mixed.
        matmul_precision: of torch.get_float32_matmul_precision; TF32 unless "highest".
    """
    if "MIG" in device:  # a part of a device
        return None
    for name, (half, tensor_float, single) in PEAKS.items():
        if not re.search(rf"\b{name}\b", device):
            continue
        if precision in HALF_PRECISIONS:
            return half
        if precision == "32-true":
            return single if matmul_precision == "highest" else tensor_float
        return None
    return None


def peak_of(device: torch.device, precision: str) -> float | None:
    """Return the FLOP/s that training makes on a device at most; None if it is not known.

    Args:
        device: the device.
        precision: of the Trainer.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return find_peak(name, precision, torch.get_float32_matmul_precision())


class FlopCount(TorchDispatchMode):
    """Counts the FLOPs of this process in `total`, inside the block.

    torch's FlopCounterMode has the same formulas, but with its hooks the weights of this step
    differ in the last bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True: torch.compile would leave compiled functions for good in another mode."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count its FLOPs."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.total += formula(*args, **kwargs, out_val=result)
        return result
