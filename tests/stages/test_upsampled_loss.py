from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.gan.losses import cross_entropy
from stages.segmentation.upsampled_loss import upsampled_cross_entropy


def in_two_steps(logits: Tensor, masks: Tensor) -> Tensor:
    return cross_entropy(
        F.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False),
        masks,
    )


@pytest.mark.parametrize("size", [(32, 24), (17, 31), (4, 5), (3, 4)])
def test_value_and_gradient_are_those_of_interpolation_and_cross_entropy(
    size: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(3, 6, 4, 5)
    # Far above the other logits: exponentials must neither overflow nor vanish.
    logits[0, 0] += 200
    masks = torch.randint(0, 6, (3, *size), dtype=torch.uint8)
    masks[1, 0] = 255
    masks[2] = 255
    fused, reference = (logits.clone().requires_grad_() for _ in range(2))
    loss, expected = upsampled_cross_entropy(fused, masks), in_two_steps(reference, masks)
    torch.testing.assert_close(loss, expected)
    (7 * loss).backward()
    (7 * expected).backward()
    torch.testing.assert_close(fused.grad, reference.grad, rtol=1e-4, atol=1e-6)


def test_without_a_label_there_is_neither_loss_nor_gradient() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = upsampled_cross_entropy(logits, torch.full((2, 8, 8), 255, dtype=torch.uint8))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_logits_of_a_decoder_in_bfloat16_are_upsampled_in_float32() -> None:
    logits = (
        torch.randn(2, 3, 4, 4)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    masks = torch.randint(0, 3, (2, 16, 16), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = upsampled_cross_entropy(logits, masks)
    loss.backward()
    expected = logits.detach().float().requires_grad_()
    in_two_steps(expected, masks).backward()
    assert logits.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(loss, in_two_steps(logits.detach(), masks))
    torch.testing.assert_close(logits.grad.float(), expected.grad, rtol=2**-7, atol=1e-7)
