"""Where a decoder's features come from: the store, or a backbone that is trained with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from featurestore.dataset import Batch
from stages.backbones.map_network import MapNetwork
from stages.common.errors import ConfigError
from stages.common.runtime import distribute
from stages.segmentation.image_transforms import ImageTransform, build_transform


class StoredFeatures:
    """Features of the frozen backbone, as the store holds them.

    Attributes
    ----------
    needs_images
        Whether :meth:`encode` and :meth:`evaluated` read the images of a batch.
    networks
        Networks that are trained, by the names of their files.
    modules
        What training calls of them.
    """

    needs_images: bool = False
    networks: Mapping[str, nn.Module] = {}
    modules: Sequence[nn.Module] = ()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that the decoder's loss trains beside the decoder's."""
        every = (each for network in self.networks.values() for each in network.parameters())
        return [parameter for parameter in every if parameter.requires_grad]

    def encode(self, batch: Batch) -> Batch:
        """Return a training batch with the features that the decoder learns from."""
        return batch

    def encode_all(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Return batches with the features that the decoder is scored on."""
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs."""
        return {name: network.state_dict() for name, network in self.networks.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, network in self.networks.items():
            network.load_state_dict(state[name])


class TrainedBackbone(StoredFeatures):
    """Features computed from the stored images in every step (thesis section 5.2.4).

    Parameters
    ----------
    accelerator
        Device and processes.
    network
        Pretrained network; it is changed in place.
    batchnorm
        ``eval``: BatchNorm keeps the pretrained statistics; ``train``: it normalises by each
        batch, and its statistics are trained.
    transforms
        Image transforms in training.
    compile
        Whether ``torch.compile`` compiles it.

    Raises
    ------
    ConfigError
        When several processes cannot share the statistics of its BatchNorm.
    """

    needs_images = True

    def __init__(
        self,
        accelerator: Accelerator,
        network: MapNetwork,
        *,
        batchnorm: Literal["eval", "train"],
        transforms: Sequence[ImageTransform],
        compile: bool = False,
    ) -> None:
        network.backbone.unfreeze(batchnorm, network.spec.mask_shape)
        if batchnorm == "train" and accelerator.num_processes > 1:
            _check_statistics(network)
        self.network = network
        self.networks = {"backbone": network.backbone.network}
        self.modules = (distribute(accelerator, network, compile=compile),)
        self._transform = build_transform(transforms, network.spec.mask_shape)

    @override
    def encode(self, batch: Batch) -> Batch:
        assert batch.images is not None
        self.network.train()
        images, masks = self._transform(batch.images, batch.masks)
        features = compute_features(self.modules[0], self.network.spec.compute, images)
        return replace(batch, features=features, masks=masks, images=images)

    @override
    def encode_all(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        return recomputed(self.network, batches)


def _check_statistics(network: MapNetwork) -> None:
    """Refuse BatchNorm of which there is no version for several processes."""
    kinds = {type(each) for each in network.modules() if isinstance(each, _BatchNorm)}
    if others := kinds - {nn.BatchNorm2d}:
        message = (
            f"train works in one process only with {network.backbone.name}, whose"
            f" {others.pop().__name__} does not share statistics; set it to eval"
        )
        raise ConfigError("train_decoder.backbone_batchnorm", message)


def compute_features(network: nn.Module, precision: str, images: Tensor) -> Tensor:
    """Compute features of images (B, 3, H, W), in the precision of ``extract.compute``.

    Returns
    -------
    Tensor
        (B, C, h, w) float32, channels last in memory.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = network(images)
    return features.float().contiguous(memory_format=torch.channels_last)


def recomputed(network: MapNetwork, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches with the features of their images, computed in evaluation mode."""
    network.eval()
    for batch in batches:
        assert batch.images is not None
        with torch.no_grad():
            features = compute_features(network, network.spec.compute, batch.images)
        yield replace(batch, features=features)
