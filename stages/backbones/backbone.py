"""A frozen network and the normalisation of its input: images in, features of its layers out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from featurestore.layers import Layer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Triple = tuple[float, float, float]
DILATED_STRIDE = 8  # image pixels a feature pixel of a dilated network, along each side


class BackboneError(Exception):
    """A backbone that cannot be built as section ``extract`` says.

    Attributes
    ----------
    key
        The key that is wrong: ``backbone``, ``weights``, ``layers``, ``dilate`` or ``input_size``.
    """

    def __init__(self, message: str, key: str = "backbone") -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class BackboneLayer:
    """One layer whose features a backbone gives.

    Attributes
    ----------
    name
        Name of the module, such as ``layer3``; number of the block in a ViT, such as ``11``.
    channels
        Number of feature channels, c.
    stride
        Image pixels a feature pixel, along each side.
    """

    name: str
    channels: int
    stride: int


def choose_layers(name: str, known: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Find the positions of layers among all, in ascending order; none wanted: the last one.

    Raises
    ------
    BackboneError
        For an unknown layer; the text lists the known ones.
    """
    for layer in wanted:
        if layer not in known:
            raise BackboneError(
                f"{name} has no layer {layer!r}; known are {', '.join(known)}", "layers"
            )
    return sorted(known.index(layer) for layer in wanted) or [len(known) - 1]


class Backbone(nn.Module):
    """Turn images into feature maps with a frozen network; made by ``build_backbone``.

    Attributes
    ----------
    name
        Name in ``params.yaml``.
    network
        Normalised images (B, 3, H, W) to one map a layer, as a list or a dict.
    layers
        Layers whose features it gives, shallow to deep.
    nonnegative
        Whether every feature is >= 0 because each layer ends in a ReLU.
    mean, std
        (3,) normalisation of images scaled to 0..1.
    multiple
        Sides of images must be multiples of this.
    any_size
        Whether the network also takes images whose sides are no multiples, as a CNN does.
    """

    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        *,
        name: str,
        network: nn.Module,
        layers: Sequence[BackboneLayer],
        nonnegative: bool,
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
        multiple: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.layers, self.nonnegative = name, tuple(layers), nonnegative
        coarse = [layer.stride for layer in layers if layer.stride >= DILATED_STRIDE]
        self.multiple = multiple or min(coarse, default=DILATED_STRIDE)  # the grid's stride
        self.any_size = multiple is None
        self.network = network
        self.mean, self.std = mean, std
        scale = torch.tensor([1 / (255 * deviation) for deviation in std])
        shift = torch.tensor([-centre / width for centre, width in zip(mean, std, strict=True)])
        self.register_buffer("_scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_shift", shift.view(1, 3, 1, 1), persistent=False)
        self._trained: Literal["eval", "train"] | None = None  # None: frozen
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self, batchnorm: Literal["eval", "train"], size: tuple[int, int]) -> None:
        """Let the weights that the layers depend on be trained.

        Parameters
        ----------
        batchnorm
            Mode of BatchNorm in training; ``eval`` keeps the pretrained statistics.
        size
            (H, W) of an image on which these weights are found.
        """
        self._trained = batchnorm
        self.requires_grad_(True)
        images = torch.zeros(1, 3, *size, dtype=torch.uint8, device=self._scale.device)
        torch.stack([features.sum() for features in self.maps(images)]).sum().backward()
        for parameter in self.parameters():  # timm may keep blocks behind the last layer
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode of a backbone that is trained; a frozen one stays in evaluation mode."""
        super().train(mode and self._trained is not None)
        if self._trained == "eval":
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    @override
    @torch.inference_mode()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the features of images without gradients, see :meth:`maps`."""
        return self.maps(images)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the features of images; gradients reach the images.

        Parameters
        ----------
        images
            (B, 3, H, W) red green blue, uint8 or float in 0..255.

        Returns
        -------
        list of Tensor
            (B, c, h, w) of each layer, >= 0 where :attr:`nonnegative`.
        """
        normalised = images.to(self._scale.dtype) * self._scale + self._shift
        output = self.network(normalised)
        return list(output.values() if isinstance(output, dict) else output)

    def stored_layers(self, size: tuple[int, int]) -> list[Layer]:
        """Describe what a store holds of each layer for images (H, W), by computing one.

        Raises
        ------
        BackboneError
            When the network cannot take images of this size.
        """
        images = torch.zeros(1, 3, *size, dtype=torch.uint8, device=self._scale.device)
        try:
            maps = self(images)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            message = f"{self.name} cannot take images of {size[0]} x {size[1]} ({reason})"
            raise BackboneError(f"{message}; use another size", "input_size") from error
        return [
            Layer(layer.name, (features.shape[1], features.shape[2], features.shape[3]))
            for layer, features in zip(self.layers, maps, strict=True)
        ]

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse images (H, W) that the network cannot take.

        Raises
        ------
        BackboneError
            When a side is no multiple of :attr:`multiple`; the text names the nearest valid ones.
        """
        for side in size:
            if side % self.multiple:
                below = max(self.multiple, side - side % self.multiple)
                raise BackboneError(
                    f"{self.name} takes sides that are multiples of {self.multiple}, found {side};"
                    f" use {below} or {below + self.multiple}",
                    "input_size",
                )

    def digest(self) -> str:
        """Hash names, shapes, types and values of all weights with sha256."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()
