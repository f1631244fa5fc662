"""Atrous spatial pyramid pooling equals torchvision's, to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision

from stages.models.aspp import ASPP, AtrousConv


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (64, 64)])  # 32: all three code paths run
def test_aspp_equals_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    reference = torchvision.models.segmentation.deeplabv3.ASPP(20, [12, 24, 36], 8)
    torch.manual_seed(0)
    aspp = ASPP(20, 8, (12, 24, 36))
    assert all(
        torch.equal(aspp.state_dict()[name], tensor)
        for name, tensor in reference.state_dict().items()
    )  # drawn in the same order
    assert len(aspp.state_dict()) == len(reference.state_dict())
    results = []
    for network in (reference, aspp):
        features = torch.randn(
            3, 20, *size, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        torch.manual_seed(2)  # dropout
        output = network(features)
        (
            output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        ).sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        results.append([output.detach(), features.grad, *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )


@pytest.mark.parametrize("rate", [2, 5, 8])
def test_an_atrous_convolution_equals_pytorchs(rate: int) -> None:
    torch.manual_seed(0)
    convolution = AtrousConv(3, 2, rate).double()
    features = torch.randn(2, 3, 8, 7, dtype=torch.float64)
    expected = F.conv2d(features, convolution.weight, padding=rate, dilation=rate)
    torch.testing.assert_close(convolution(features), expected)
    assert torch.autograd.gradcheck(
        lambda values, weight: torch.func.functional_call(convolution, {"weight": weight}, values),
        (features.requires_grad_(), convolution.weight),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = convolution.float()(features.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("channels", [24, 32])
def test_gradients_in_bfloat16_are_numbers(channels: int) -> None:
    layer = AtrousConv(channels, 8, 6)
    features = torch.randn(4, channels, 32, 32).to(memory_format=torch.channels_last)
    layer(features).square().sum().backward()
    assert layer.weight.grad is not None
    exact, layer.weight.grad = layer.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        layer(features).square().sum().backward()
    assert (layer.weight.grad - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(("channels", "rate"), [(12, 2), (16, 2), (24, 1), (320, 2)])
def test_pytorchs_convolution_in_bfloat16_is_kept_where_it_works(channels: int, rate: int) -> None:
    layer = AtrousConv(channels, 8, rate)
    results = []
    for convolve in (layer, lambda x: F.conv2d(x, layer.weight, padding=rate, dilation=rate)):
        features = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))
        features = features.to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = convolve(features)
        gradients = torch.autograd.grad(output.float().square().sum(), (layer.weight, features))
        results.append([output, *gradients])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
