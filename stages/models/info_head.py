"""InfoGAN's head on a discriminator: it estimates z from generated features (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.models.blocks import xavier_


class InfoHead(nn.Module):
    """A linear layer from the mean activations of a discriminator's layers to z.

    Means of all layers, because the discriminator's instance normalisation removes from all but the
    first what a whole map has in common. No spectral normalisation, and Xavier's gain is 1: the
    estimate must reach the range of z.

    Parameters
    ----------
    widths
        Channels of the layers.
    z_dim
        Length of z.
    """

    def __init__(self, widths: Sequence[int], z_dim: int) -> None:
        super().__init__()
        self.linear = xavier_(nn.Linear(sum(widths), z_dim), 1.0)

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """Estimate z.

        Parameters
        ----------
        layers
            Activations (k*B, width, h', w'), in the order of the widths.

        Returns
        -------
        Tensor
            (k*B, z_dim).
        """
        return self.linear(torch.cat([layer.mean((2, 3)) for layer in layers], dim=1))
