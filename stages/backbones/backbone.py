"""A frozen network and the normalisation of its input: images in, features out."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from typing_extensions import override

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Triple = tuple[float, float, float]
OUTPUT_STRIDE = 8  # image pixels a feature pixel, along each side


class BackboneError(Exception):
    """An unknown backbone, or weights that cannot be read or do not fit; the text says which."""


class Backbone(nn.Module):
    """Turn images into one feature map with a frozen network; made by ``build_backbone``.

    Attributes
    ----------
    name
        Name in ``params.yaml``.
    channels
        Number of feature channels, C.
    mean, std
        (3,) normalisation of images scaled to 0..1.
    nonnegative
        Whether every feature is >= 0 because the network ends in a ReLU.
    """

    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        *,
        name: str,
        network: nn.Module,
        channels: int,
        nonnegative: bool,
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.name, self.channels, self.nonnegative = name, channels, nonnegative
        self.network = network
        self.mean, self.std = mean, std
        scale = torch.tensor([1 / (255 * deviation) for deviation in std])
        shift = torch.tensor([-centre / width for centre, width in zip(mean, std, strict=True)])
        self.register_buffer("_scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_shift", shift.view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the backbone is frozen, its BatchNorm statistics too."""
        return super().train(False)

    @override
    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of images.

        Parameters
        ----------
        images
            (B, 3, H, W) uint8, red green blue.

        Returns
        -------
        Tensor
            (B, C, H/8, W/8), >= 0 where :attr:`nonnegative`.
        """
        normalised = images.to(self._scale.dtype) * self._scale + self._shift
        output = self.network(normalised)
        return output[-1] if isinstance(output, (list, tuple)) else output

    def digest(self) -> str:
        """Hash names, shapes, types and values of all weights with sha256."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()
