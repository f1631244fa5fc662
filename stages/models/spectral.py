"""Spectral normalisation of convolutions (Miyato et al. 2018).

It scales the output instead of the weight, which saves passes over large weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import xavier_
from stages.models.winograd import conv2d

START = 15  # power iterations at initialisation, as in PyTorch's spectral_norm


class PlainConv2d(nn.Conv2d):
    """A convolution that leaves its weight as it is, with the methods of :class:`SpectralConv2d`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, bias
        As of :class:`torch.nn.Conv2d`.
    gain
        Gain of the Xavier initialisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        bias: bool = True,
        gain: float,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        xavier_(self, gain)

    def scale(self) -> Tensor:
        """Return the factor of the output, 1."""
        return self.weight.new_ones(())

    def convolve(self, x: Tensor, scale: Tensor) -> Tensor:
        """Do what :meth:`forward` does, with a :meth:`scale` that several inputs share."""
        return self.rescale(conv2d(x, self.weight, None, self.stride, self.padding), scale)

    def rescale(self, y: Tensor, scale: Tensor) -> Tensor:
        """Compute ``y * scale + bias`` from the output of the bare convolution, (B, out, h, w)."""
        if self.bias is None:
            return y * scale.to(y.dtype)
        return torch.addcmul(self.bias.to(y.dtype).view(1, -1, 1, 1), y, scale.to(y.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        return self.convolve(input, self.scale())


class SpectralConv2d(PlainConv2d):
    """A convolution whose weight is divided by its largest singular value, sigma.

    The output is divided instead: ``conv(x, W / sigma) + b = conv(x, W) / sigma + b``. At the
    thesis's widths weights are many times larger than activations, and normalising weights takes a
    third to a half of a training step. Values and gradients are those of
    :func:`torch.nn.utils.parametrizations.spectral_norm`: sigma is ``u' W v``; each training step
    runs one power iteration for u and v, which count as constants.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, bias
        As of :class:`torch.nn.Conv2d`.
    gain
        Gain of the Xavier initialisation.
    """

    u: Tensor
    v: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        bias: bool = True,
        gain: float,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, bias=bias, gain=gain
        )
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(self.weight[0].numel()), dim=0))
        self._iterate(START)

    def _matrix(self) -> Tensor:
        """Return the weight as (out, kh*kw*in); the order of columns does not change sigma.

        It is a view if the weight is channels last in memory.
        """
        return self.weight.permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def _iterate(self, times: int) -> None:
        matrix = self._matrix()
        for _ in range(times):
            F.normalize(torch.mv(matrix, self.v), dim=0, out=self.u)
            F.normalize(torch.mv(matrix.T, self.u), dim=0, out=self.v)

    def scale(self) -> Tensor:
        """Return 1 / sigma; in training, after one more power iteration."""
        with torch.autocast(self.weight.device.type, enabled=False):
            if self.training:
                self._iterate(1)
            # Clones: the next call changes u and v in place, maybe before this call's backward.
            return 1 / torch.dot(self.u.clone(), torch.mv(self._matrix(), self.v.clone()))
