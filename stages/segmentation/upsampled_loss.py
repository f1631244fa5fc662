"""Cross-entropy of upsampled logits that does not keep the upsampled logits."""

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


def upsampled_cross_entropy(logits: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute equation 3.7 of bilinearly upsampled logits.

    The mean over the labelled pixels of the whole batch; 0 where there is none. Value and gradient
    equal ``cross_entropy(F.interpolate(logits, masks.shape[-2:], mode="bilinear"), masks)`` to
    float32 rounding. Those two functions keep several arrays of (B, K, H, W) for the backward pass,
    which costs more time than the decoder itself. Here the gradient is computed in the forward
    pass, on a CPU one image at a time, so that all arrays stay in the processor's cache.

    Parameters
    ----------
    logits
        (B, K, h, w), any float type.
    masks
        (B, H, W) uint8; 255 is left out.
    weights
        (K,) weight of the pixels of each class; the mean is weighted. Default: 1 each.
    """
    total = _SumOfCrossEntropies.apply(logits, masks, weights)
    known = masks != VOID
    counted = known.sum().float() if weights is None else weights[masks[known].long()].sum()
    return total / average_over_processes(counted).clamp(min=1)


class _SumOfCrossEntropies(Function):
    """The sum over the labelled pixels."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, masks: Tensor, weights: Tensor | None) -> Tensor:
        device, coarse = logits.device, logits.float().contiguous()
        gradient, losses = torch.empty_like(coarse), []
        with torch.autocast(device.type, enabled=False):
            rows, columns = (
                interpolation(*sizes, device)
                for sizes in zip(logits.shape[-2:], masks.shape[-2:], strict=True)
            )
            for image in range(len(coarse)) if device.type == "cpu" else [slice(None)]:
                labels = masks[image].long().view(-1, *masks.shape[1:])
                known = labels != VOID
                labels = torch.where(known, labels, 0).unsqueeze(1)  # (b, 1, H, W)
                weight = (
                    known.unsqueeze(1) if weights is None else weights[labels] * known.unsqueeze(1)
                )
                # (b, K, h, w) -> (b, K, H, W): one array for logits, exponentials and gradient
                fine = rows @ coarse[image].view(-1, *coarse.shape[1:]) @ columns.T
                fine -= fine.amax(1, keepdim=True)
                of_label = fine.gather(1, labels)
                partition = fine.exp_().sum(1, keepdim=True)
                losses.append(((partition.log() - of_label) * weight).sum())
                fine *= weight / partition
                fine.scatter_add_(1, labels, -weight.float())
                gradient[image] = (rows.T @ fine @ columns).view(gradient[image].shape)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (factor * gradient).to(ctx.dtype), None, None


@cache
def interpolation(coarse: int, fine: int, device: torch.device) -> Tensor:
    """Compute the weights of bilinear interpolation along one side, without aligned corners.

    Returns
    -------
    Tensor
        (fine, coarse).
    """
    identity = torch.eye(coarse, device=device)[None]
    weights = F.interpolate(identity, fine, mode="linear", align_corners=False)
    return weights[0].T.contiguous()  # (1, coarse, fine) -> (fine, coarse)
