"""Winograd's filtering against PyTorch's convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stages.models.generator import Generator
from stages.models.winograd import WideConv2d, conv2d, disabled, winograd_conv2d


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (7, 5), (1, 2), (32, 30)])
def test_values_and_gradients_equal_those_of_the_convolution(height: int, width: int) -> None:
    x = torch.randn(3, 5, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    winograd, direct = winograd_conv2d(x, weight), F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(winograd, direct, rtol=0, atol=1e-12)
    gradient = torch.randn_like(direct)
    for one, other in zip(
        torch.autograd.grad(winograd, (x, weight), gradient),
        torch.autograd.grad(direct, (x, weight), gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_gradients_of_gradients() -> None:
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(winograd_conv2d, (x, weight))


@pytest.mark.parametrize("inputs", [128, 1024])
def test_float32_loses_one_digit_at_most(inputs: int) -> None:
    x, weight = torch.rand(2, inputs, 16, 16), torch.randn(256, inputs, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    winograd, direct = (
        (y - exact).abs().max() / exact.abs().max()
        for y in (winograd_conv2d(x, weight), F.conv2d(x, weight, padding=1))
    )
    assert winograd < 3e-5
    assert winograd < 30 * direct


def test_the_result_has_channels_last() -> None:
    x, weight = (
        torch.randn(size).to(memory_format=torch.channels_last)
        for size in ((2, 128, 32, 32), (256, 128, 3, 3))
    )
    assert winograd_conv2d(x, weight).is_contiguous(memory_format=torch.channels_last)


def test_wide_layers_use_it_and_add_their_bias() -> None:
    layer, x = WideConv2d(128, 256, 3, padding=1), torch.randn(2, 128, 16, 16)
    assert layer.bias is not None
    assert torch.equal(layer(x), winograd_conv2d(x, layer.weight) + layer.bias.view(1, -1, 1, 1))


@pytest.mark.parametrize(
    ("shape", "filters", "stride", "padding"),
    [
        ((2, 64, 16, 16), (256, 64, 3, 3), 1, 1),  # narrow
        ((2, 128, 8, 8), (256, 128, 3, 3), 1, 1),  # few pixels
        ((2, 128, 16, 16), (256, 128, 3, 3), 2, 1),
        ((2, 128, 16, 16), (256, 128, 3, 3), 1, 0),
        ((2, 128, 16, 16), (256, 128, 1, 1), 1, 1),
    ],
)
def test_other_layers_are_pytorchs_to_the_bit(
    shape: tuple[int, ...], filters: tuple[int, ...], stride: int, padding: int
) -> None:
    x, weight = torch.randn(shape), torch.randn(filters)
    assert torch.equal(
        conv2d(x, weight, None, (stride, stride), (padding, padding)),
        F.conv2d(x, weight, None, stride, padding),
    )


def test_half_precision_is_pytorchs_to_the_bit() -> None:
    x, weight = torch.randn(2, 128, 16, 16), torch.randn(256, 128, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv2d(x, weight, None, (1, 1), (1, 1)), F.conv2d(x, weight, padding=1))


def test_a_wide_generator_generates_equal_features_without_it() -> None:
    torch.manual_seed(0)
    generator = Generator(
        num_classes=3,
        feature_shape=(256, 16, 16),
        nonnegative=False,
        feature_scale=torch.ones(256),
        z_dim=4,
        ngf=8,
    )
    generator.eval()
    z, masks = torch.randn(2, 4), torch.randint(0, 3, (2, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        winograd = generator(z, masks)
        with disabled():
            plain = generator(z, masks)
    assert not torch.equal(winograd, plain), (
        "this generator is too narrow to use Winograd's filtering"
    )
    torch.testing.assert_close(winograd, plain, rtol=0, atol=1e-5 * plain.abs().max().item())
