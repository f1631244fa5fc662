"""Cross-entropy of scores at the features' resolution against masks at the images', without keeping the scores in between."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from featurestore import VOID
from stages.common.distributed import average_over_processes


def upsampled_cross_entropy(scores: Tensor, masks: Tensor) -> Tensor:
    """Equation 3.7 of bilinearly upsampled scores: mean over the labelled pixels of the whole batch; 0 where there is none.

    What ``cross_entropy(F.interpolate(scores, size=masks.shape[-2:], mode="bilinear"), masks)`` gives, to float32 rounding, and its
    gradient. Those two keep several arrays of (B, K, H, W) for the way back, which costs more time than the decoder
    itself; here the gradient is made on the way there, on a CPU a image at a time, so that everything stays in the cache.

    Parameters
    ----------
    scores
        (B, K, h, w) unnormalised, any float type.
    masks
        (B, H, W) uint8; 255 is left out.
    """
    total = _UpsampledCrossEntropy.apply(scores, masks)
    return total / average_over_processes((masks != VOID).sum().float()).clamp(min=1)


class _UpsampledCrossEntropy(Function):
    """The sum over labelled pixels."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, masks: Tensor) -> Tensor:
        device, coarse = scores.device, scores.float().contiguous()
        gradient, losses = torch.empty_like(coarse), []
        with torch.autocast(device.type, enabled=False):
            down, across = (
                interpolation(*sizes, device)
                for sizes in zip(scores.shape[-2:], masks.shape[-2:], strict=True)
            )
            for some in range(len(coarse)) if device.type == "cpu" else [slice(None)]:
                labels = masks[some].long().view(-1, *masks.shape[1:])
                known = labels != VOID
                labels = torch.where(known, labels, 0).unsqueeze(1)  # (b, 1, H, W)
                # (b, K, h, w) -> (b, K, H, W), of which there is only this one: scores, exponentials, gradient in turn
                fine = down @ coarse[some].view(-1, *coarse.shape[1:]) @ across.T
                fine -= fine.amax(1, keepdim=True)
                of_label = fine.gather(1, labels)
                partition = fine.exp_().sum(1, keepdim=True)
                losses.append(((partition.log() - of_label) * known.unsqueeze(1)).sum())
                fine *= known.unsqueeze(1) / partition
                fine.scatter_add_(1, labels, -known.unsqueeze(1).float())
                gradient[some] = (down.T @ fine @ across).view(gradient[some].shape)
        ctx.save_for_backward(gradient)
        ctx.dtype = scores.dtype
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (ours,) = ctx.saved_tensors
        return (gradient * ours).to(ctx.dtype), None


@cache
def interpolation(coarse: int, fine: int, device: torch.device) -> Tensor:
    """(fine, coarse) weights of bilinear interpolation along one side, as ``F.interpolate`` has them without aligned corners."""
    rows = F.interpolate(
        torch.eye(coarse, device=device)[None], size=fine, mode="linear", align_corners=False
    )  # (1, coarse, fine)
    return rows[0].T.contiguous()
