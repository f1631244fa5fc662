"""SPADE: normalisation modulated by a mask, and the residual block of it (Park et al. 2019)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import NORMS, xavier_
from stages.models.spectral import SpectralConv2d
from stages.models.winograd import WideConv2d


class SPADE(nn.Module):
    """Spatially adaptive denormalisation, ``norm(x) * (1 + gamma(mask)) + beta(mask)`` (eq. 1).

    Parameters
    ----------
    channels
        Channels of the features.
    label_channels
        Channels of the one-hot mask.
    hidden
        Channels of the mask's embedding.
    norm
        ``batch`` or ``instance``, without learned scale and shift.
    gain
        Gain of the Xavier initialisation.
    """

    def __init__(
        self, *, channels: int, label_channels: int, hidden: int, norm: str, gain: float
    ) -> None:
        super().__init__()
        self.norm = NORMS[norm](channels, affine=False)
        self.shared = xavier_(nn.Conv2d(label_channels, hidden, 3, padding=1), gain)
        # One convolution for gamma and beta: the values of two, in one pass over the embedding.
        self.gamma_beta = WideConv2d(hidden, 2 * channels, 3, padding=1)
        for half in self.gamma_beta.weight.data.split(channels):
            nn.init.xavier_normal_(half, gain)
        nn.init.zeros_(self.gamma_beta.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Modulate features by masks.

        Parameters
        ----------
        x
            (k*B, C, h, w), k groups of features of the same B masks.
        labels
            (B, L, h, w) one-hot masks at the features' resolution.

        Returns
        -------
        Tensor
            (k*B, C, h, w).
        """
        gamma, beta = self.gamma_beta(F.relu(self.shared(labels))).chunk(2, dim=1)
        x = self.norm(x).unflatten(0, (-1, len(labels)))  # (k*B, C, h, w) -> (k, B, C, h, w)
        return torch.addcmul(x + beta, x, gamma).flatten(0, 1)


class SPADEResBlk(nn.Module):
    """Residual block of two SPADE layers, each followed by a spectrally normalised convolution.

    The shortcut is learned where the widths differ.

    Parameters
    ----------
    in_channels, out_channels
        Widths.
    label_channels, hidden, norm, gain
        See :class:`SPADE`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        label_channels: int,
        hidden: int,
        norm: str,
        gain: float,
    ) -> None:
        super().__init__()
        spade = partial(SPADE, label_channels=label_channels, hidden=hidden, norm=norm, gain=gain)
        middle = min(in_channels, out_channels)
        self.spade_0, self.spade_1 = spade(channels=in_channels), spade(channels=middle)
        self.conv_0 = SpectralConv2d(in_channels, middle, 3, padding=1, gain=gain)
        self.conv_1 = SpectralConv2d(middle, out_channels, 3, padding=1, gain=gain)
        self.learned_shortcut = in_channels != out_channels
        if self.learned_shortcut:
            self.spade_s = spade(channels=in_channels)
            self.conv_s = SpectralConv2d(in_channels, out_channels, 1, bias=False, gain=gain)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """(k*B, in_channels, h, w) and (B, L, h, w) -> (k*B, out_channels, h, w)."""
        shortcut = self.conv_s(self.spade_s(x, labels)) if self.learned_shortcut else x
        x = self.conv_0(F.leaky_relu(self.spade_0(x, labels), 0.2))
        x = self.conv_1(F.leaky_relu(self.spade_1(x, labels), 0.2))
        return shortcut + x
