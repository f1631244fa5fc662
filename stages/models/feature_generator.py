"""What all generators of features have in common, whatever family they belong to."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureGenerator(nn.Module, ABC):
    """Noise z and a mask in, features out.

    Attributes
    ----------
    z_dim
        Length of the noise vector.
    nonnegative
        Whether the backbone's features are >= 0.
    feature_scale
        (1, C, 1, 1) > 0: what features are divided by before the networks see them.
    """

    z_dim: int
    nonnegative: bool
    feature_scale: Tensor

    @abstractmethod
    def forward(self, z: Tensor, masks: Tensor) -> Tensor:
        """Generate scaled features.

        Parameters
        ----------
        z
            (k*B, z_dim) noise, k draws a mask.
        masks
            (B, H, W) uint8, 255 = void.

        Returns
        -------
        Tensor
            (k*B, C, h, w); draw j of mask i is row j*B + i.
        """

    @torch.no_grad()
    def generate(
        self, masks: Tensor, *, z: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Generate features in the backbone's own scale, for use outside of training.

        Parameters
        ----------
        masks
            (B, H, W) uint8, 255 = void.
        z
            (k*B, z_dim); default: one draw a mask.
        generator
            Source of the default draw.

        Returns
        -------
        Tensor
            (k*B, C, h, w), like the features of a store.
        """
        if z is None:
            z = torch.randn(len(masks), self.z_dim, generator=generator, device=masks.device)
        return self(z, masks) * self.feature_scale

    @torch.no_grad()
    def swap_classes(self, features: Tensor, old: Tensor, new: Tensor, *, z: Tensor) -> Tensor:
        """Swap classes: change real features as the generator does when the mask changes.

        The default adds the difference of two generated maps: ``x + G(z, new) - G(z, old)``.

        Parameters
        ----------
        features
            (k*B, C, h, w) float32 in the backbone's scale, k of each mask.
        old, new
            (B, H, W) uint8, 255 = void: what the features show, and what they should show.
        z
            (k*B, z_dim) noise.

        Returns
        -------
        Tensor
            (k*B, C, h, w) float32 in the backbone's scale.
        """
        moved = features + (self.generate(new, z=z).float() - self.generate(old, z=z).float())
        return F.relu(moved) if self.nonnegative else moved

    def vary(self, features: Tensor, masks: Tensor, *, z: Tensor, strength: float) -> Tensor:
        """Vary real features without a change of their masks.

        Parameters
        ----------
        features
            (B, C, h, w) in the backbone's scale.
        masks
            (B, H, W) uint8, 255 = void: what the variations should show.
        z
            (B, z_dim) noise.
        strength
            0 < strength <= 1: fraction of noise at the start; 1 keeps nothing of the features.

        Returns
        -------
        Tensor
            (B, C, h, w) float32 in the backbone's scale.

        Raises
        ------
        NotImplementedError
            When the generator is not a flow.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot vary features; use a flow")
