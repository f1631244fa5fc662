from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.gan.losses import cross_entropy
from stages.segmentation import upsampled_loss
from stages.segmentation.class_weights import class_weights
from stages.segmentation.upsampled_loss import upsampled_cross_entropy


def in_two_steps(logits: Tensor, masks: Tensor) -> Tensor:
    size = masks.shape[-2:]
    fine = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    return cross_entropy(fine, masks).mean()


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


# -- weighted by class -----------------------------------------------------------------------------


def weighted_reference(logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    fine = F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(fine, masks.long(), weights, ignore_index=255)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 7.5, 2.0], [0.01, 0.2, 0.003, 0.1]])
def test_weighted_value_and_gradient_are_pytorchs(weights: list[float]) -> None:
    torch.manual_seed(0)
    logits, class_weight = 5 * torch.randn(3, 4, 4, 5), torch.tensor(weights)
    masks = torch.randint(0, 4, (3, 17, 31), dtype=torch.uint8)
    masks[1, :9] = 255
    masks[2] = 255
    fused, reference = (logits.clone().requires_grad_() for _ in range(2))
    loss = upsampled_cross_entropy(fused, masks, class_weight)
    expected = weighted_reference(reference, masks, class_weight)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(fused.grad, reference.grad, rtol=1e-4, atol=1e-6)


def test_equal_weights_change_no_bit_and_void_alone_gives_0() -> None:
    logits = torch.randn(2, 3, 4, 4)
    masks = torch.randint(0, 3, (2, 16, 16), dtype=torch.uint8)
    plain, ones = (
        upsampled_cross_entropy(logits, masks, weights) for weights in (None, torch.ones(3))
    )
    assert torch.equal(plain, ones)
    void = torch.full((2, 8, 8), 255, dtype=torch.uint8)
    assert upsampled_cross_entropy(logits, void, torch.full((3,), 4.0)) == 0


def test_processes_average_to_the_weighted_mean_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DDP averages the processes' losses; each divides by the mean of their summed weights."""
    torch.manual_seed(0)
    logits, weights = torch.randn(4, 3, 4, 4), torch.tensor([1.0, 9.0, 3.0])
    masks = torch.randint(0, 3, (4, 16, 16), dtype=torch.uint8)
    masks[2:, :, 3:] = 255
    halves = [slice(0, 2), slice(2, 4)]
    sums = [weights[masks[half][masks[half] != 255].long()].sum() for half in halves]
    assert sums[0] > 2 * sums[1]
    monkeypatch.setattr(
        upsampled_loss, "average_over_processes", lambda _: torch.stack(sums).mean()
    )
    losses = [upsampled_cross_entropy(logits[half], masks[half], weights) for half in halves]
    torch.testing.assert_close(
        torch.stack(losses).mean(), weighted_reference(logits, masks, weights)
    )


def test_class_weights_are_inverse_frequencies_up_to_a_cap() -> None:
    pixels = np.array([1000, 500, 1000, 10, 0])
    weights = class_weights(pixels, 8.0)
    assert weights is not None
    assert weights.dtype == torch.float32
    assert weights.tolist() == [1, 2, 1, 8, 8]
    assert class_weights(pixels, 1.0) is None
