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


def upsampled_cross_entropy(
    logits: Tensor, masks: Tensor, class_weights: Tensor | None = None
) -> Tensor:
    """Compute equation 3.7 of bilinearly upsampled logits.

    The weighted mean over the labelled pixels of the whole batch; 0 where there is none. Value and
    gradient equal ``cross_entropy(F.interpolate(logits, masks.shape[-2:], mode="bilinear"), masks,
    class_weights)`` to float32 rounding. Those two functions keep several arrays of (B, K, H, W)
    for the backward pass, which costs more time than the decoder itself. Here the gradient is
    computed in the forward pass, on a CPU one image at a time, so that all arrays stay in the
    processor's cache.

    Parameters
    ----------
    logits
        (B, K, h, w), any float type.
    masks
        (B, H, W) uint8; 255 is left out.
    class_weights
        (K,) float32 weight of each class's pixels, above 0. Default: 1 for all.
    """
    total = _SumOfCrossEntropies.apply(logits, masks, class_weights)
    weights = _pixel_weights(masks, class_weights)
    weight = average_over_processes(weights.sum(dtype=torch.float64).float())  # exact counts
    return total / torch.where(weight > 0, weight, 1)


def _pixel_weights(masks: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return the weight of each pixel of (B, H, W) masks: 0 without a label, else its class's."""
    known = masks != VOID
    if class_weights is None:
        return known.float()
    return class_weights[torch.where(known, masks, 0).long()] * known


class _SumOfCrossEntropies(Function):
    """The weighted sum over the labelled pixels."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, masks: Tensor, class_weights: Tensor | None) -> Tensor:
        device, coarse = logits.device, logits.float().contiguous()
        gradient, losses = torch.empty_like(coarse), []
        with torch.autocast(device.type, enabled=False):
            rows, columns = (
                interpolation(*sizes, device)
                for sizes in zip(logits.shape[-2:], masks.shape[-2:], strict=True)
            )
            for image in range(len(coarse)) if device.type == "cpu" else [slice(None)]:
                labels = masks[image].view(-1, 1, *masks.shape[1:])  # (b, 1, H, W)
                weights = _pixel_weights(labels, class_weights)
                labels = torch.where(labels != VOID, labels, 0).long()
                # (b, K, h, w) -> (b, K, H, W): one array for logits, exponentials and gradient
                fine = rows @ coarse[image].view(-1, *coarse.shape[1:]) @ columns.T
                fine -= fine.amax(1, keepdim=True)
                of_label = fine.gather(1, labels)
                partition = fine.exp_().sum(1, keepdim=True)
                losses.append(((partition.log() - of_label) * weights).sum())
                fine *= weights / partition
                fine.scatter_add_(1, labels, -weights)
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
