"""The cross-entropy of upsampled logits against PyTorch's interpolation and cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoder import plain_cross_entropy
from benchmarks.gpu.device import DTYPES, Size
from benchmarks.gpu.timing import free_memory, measure
from stages.segmentation.upsampled_loss import upsampled_cross_entropy

COLUMNS = ("logits", "masks", "dtype", "implementation", "ms", "speedup", "memory_mib")
SHAPES = {  # (batch, classes, side of the logits, side of the masks)
    "thesis": ((32, 21, 32, 256), (32, 21, 64, 512), (8, 150, 64, 512)),
    "lite": ((16, 21, 32, 256), (16, 21, 64, 512), (4, 150, 64, 512)),
    "small": ((2, 21, 8, 64),),
}
LOSSES = {"plain": plain_cross_entropy, "upsampled": upsampled_cross_entropy}


def rows(device: torch.device, size: Size, name: str) -> list[dict[str, Any]]:
    """Measure forward and backward pass of both; memory is what they allocate in MiB."""
    found = []
    for batch, classes, coarse, fine in SHAPES[name]:
        for dtype in ("fp32", "bf16"):
            logits = torch.randn(batch, classes, coarse, coarse, device=device, dtype=DTYPES[dtype])
            logits.requires_grad_()
            masks = torch.randint(0, classes, (batch, fine, fine), device=device, dtype=torch.uint8)
            plain = None
            for implementation, loss in LOSSES.items():
                free_memory(device)
                timing = measure(_call(loss, logits, masks), device, size.seconds)
                plain = plain or timing.ms
                row = {
                    "logits": f"{batch} x {classes} x {coarse} x {coarse}",
                    "masks": f"{fine} x {fine}",
                    "dtype": dtype,
                    "implementation": implementation,
                    "ms": timing.ms,
                    "speedup": plain / timing.ms,
                    "memory_mib": timing.added_mib,
                }
                found.append(row)
    return found


def _call(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, masks: Tensor
) -> Callable[[], object]:
    """Return a call of forward and backward pass that keeps no gradient."""
    return lambda: torch.autograd.grad(loss(logits, masks), logits)
