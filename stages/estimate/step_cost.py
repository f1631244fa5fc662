"""What a step of each kind costs: operations and memory, counted without computing, or seconds.

Networks have random weights: weights do not change what a step costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from featurestore import StoreSpec
from featurestore.dataset import Batch
from featurestore.layers import Layer, fold, map_shape
from stages.augment.featuregan import FeatureGANConfig, JointFeatureGAN
from stages.backbones.backbone import Backbone, BackboneError
from stages.backbones.build import build_backbone
from stages.common.errors import ConfigError
from stages.common.runtime import Machine, make_accelerator
from stages.gan.families import build_joint_trainer, build_trainer
from stages.gan.networks import build_networks
from stages.models import aspp, winograd
from stages.models.decoder import Decoder
from stages.segmentation.folds import Folds
from stages.segmentation.upsampled_loss import interpolation, upsampled_cross_entropy
from stages.training.update import backward

BATCH = 2  # the smallest that batch normalisation takes
ADAM = 16  # bytes a float32 parameter takes in training: itself, its gradient, two moments
FROZEN = 4  # bytes a float32 parameter takes that is not trained


@dataclass(frozen=True)
class Cost:
    """Cost of one sample in one kind of step.

    Attributes
    ----------
    operations
        Of convolutions and matrix products; a multiplication and an addition are two operations.
    weight_bytes
        Weights, gradients and Adam's moments, and the weights of a backbone behind a generator of
        images; they do not depend on the batch.
    activation_bytes
        What back-propagation keeps of a sample, in float32.
    """

    operations: float
    weight_bytes: int
    activation_bytes: float


@dataclass(frozen=True)
class Setup:
    """What the cost of a step depends on.

    Attributes
    ----------
    backbone, input_size, layers, dilate
        As in section ``extract`` of the parameters; (H, W) pixels.
    gan
        Section ``train_gan``.
    head
        Keys ``head``, ``width`` and ``atrous_rates`` of :class:`stages.models.decoder.Decoder`.
    decoder_layers
        Stored layers that decoders read; empty: all.
    num_classes
        Of the data set.
    ratios
        Generated samples a mask, of each joint training.
    trains_backbone
        Whether a decoder trains the backbone.
    """

    backbone: str
    input_size: tuple[int, int]
    gan: Mapping[str, Any]
    head: Mapping[str, Any]
    num_classes: int
    ratios: Sequence[int] = ()
    layers: Sequence[str] = ()
    dilate: bool = True
    decoder_layers: Sequence[str] = ()
    trains_backbone: bool = False


class Workload:
    """Networks of one configuration, and a step of each kind on a batch of random numbers.

    Parameters
    ----------
    setup
        The configuration.
    batch
        Samples a step.
    device
        Where the networks are: ``cpu`` or ``cuda``.
    """

    def __init__(self, setup: Setup, batch: int, device: str) -> None:
        size = (batch, *setup.input_size)
        torch.manual_seed(0)
        with torch.device(device):
            self.backbone, self.trained_backbone = untrained_backbone(setup), None
            if setup.trains_backbone:
                self.trained_backbone = untrained_backbone(setup)
                self.trained_backbone.unfreeze("eval", setup.input_size)
            self.images = torch.randint(0, 256, (batch, 3, *setup.input_size), dtype=torch.uint8)
            masks = torch.randint(0, setup.num_classes, size, dtype=torch.uint8)
            self.layers = self.backbone.stored_layers(setup.input_size)
            features, folds = self._features(setup, setup.gan["layers"], batch)
            spec = store_spec(
                self.layers,
                backbone=setup.backbone,
                input_size=setup.input_size,
                named=bool(setup.layers),
                dilate=setup.dilate,
                num_classes=setup.num_classes,
            ).select(setup.gan["layers"])
            architecture = {
                **setup.gan,
                "feature_shape": features.shape[1:],
                "output_stride": round(setup.input_size[0] / features.shape[2]),
                "nonnegative": True,
                "num_classes": setup.num_classes,
                "discriminates": "images" if setup.gan["family"] == "image" else "features",
                "features": spec.to_dict(),
            }
            networks = build_networks(architecture)
            self.features, decoder_folds = self._features(setup, setup.decoder_layers, batch)
            try:
                self.decoder = Decoder(
                    **setup.head,
                    in_channels=self.features.shape[1],
                    num_classes=setup.num_classes,
                    folds=decoder_folds,
                )
            except ValueError as error:
                raise ConfigError("train_decoder.decoder", str(error)) from error
        accelerator = make_accelerator(device, "no")  # the precision is that of the caller
        self.trainer = build_trainer(
            accelerator, networks, setup.gan, Machine(device=device), folds
        )
        self.trainer.steps = 1  # R1 is added every few steps, not in this one
        if setup.ratios:
            self.joint = build_joint_trainer(
                accelerator, networks, architecture, setup.gan, Machine(device=device), folds
            )
            self.joint.steps = 1
        self.batch = Batch(torch.arange(batch), features, masks, self.images)
        self.rng = torch.Generator(device).manual_seed(0)
        self.ratios = setup.ratios

    def kinds(self) -> dict[str, tuple[Callable[[], object], list[nn.Module]]]:
        """Return a step of each kind, and the networks that it trains, by name."""
        gans, decoder = list(self.trainer.networks.by_name().values()), self.decoder
        kinds: dict[str, tuple[Callable[[], object], list[nn.Module]]] = {
            "backbone": (self.extract_step, []),
            "gan": (self.gan_step, gans),
            "decoder": (lambda: self.decoder_loss(self.features).backward(), [decoder]),
            "generator": (self.generate_step, []),
        }
        for ratio in self.ratios:
            joint = [*self.joint.networks.by_name().values(), decoder]
            kinds[f"joint {ratio}:1"] = (partial(self.joint_step, ratio), joint)
        if self.trained_backbone is not None:
            kinds["trained backbone"] = (self.backbone_step, [self.trained_backbone.network])
        return kinds

    def _features(self, setup: Setup, names: Sequence[str], batch: int) -> tuple[Tensor, Folds]:
        """Make random features (B, C, h, w) of some of the layers, and describe them."""
        layers = [layer for layer in self.layers if not names or layer.name in names]
        shape = map_shape(layers, setup.input_size)
        folds = [(layer.shape[0], fold(layer, shape[1:])) for layer in layers]
        return torch.rand(batch, *shape), folds

    def extract_step(self) -> None:
        """Run the frozen backbone."""
        self.backbone(self.images)

    def backbone_step(self) -> None:
        """Run the backbone and back-propagate through it."""
        assert self.trained_backbone is not None
        maps = self.trained_backbone.maps(self.images)
        torch.stack([features.float().sum() for features in maps]).sum().backward()

    def generate_step(self) -> None:
        """Run a frozen generator."""
        generator, masks = self.trainer.networks.generator, self.batch.masks
        z = torch.randn(len(masks), generator.z_dim, device=masks.device)
        generator.generate(masks, z=z)

    def decoder_loss(self, features: Tensor) -> Tensor:
        """Compute the cross-entropy of one batch of features."""
        return upsampled_cross_entropy(self.decoder(features), self.batch.masks)

    def gan_step(self) -> None:
        """Compute losses and gradients of the first branch of Algorithm 1, or of a flow."""
        batch = self.batch
        step = self.trainer.forward(
            batch.features, batch.masks, batch.images, ratio=1, rng=self.rng
        )
        backward(self.trainer.accelerator, *self.trainer.losses_with_parameters(step))

    def joint_step(self, ratio: int) -> None:
        """Compute losses and gradients of the second branch of Algorithm 1."""
        variant = FeatureGANConfig(augmenter="featuregan", ratio=ratio)
        added = JointFeatureGAN(variant, self.joint, Path()).augment(self.batch, self.rng)
        seen = [self.features, *(each.features for each in added.batches)]
        losses = torch.stack([self.decoder_loss(features) for features in seen])
        trained = list(self.decoder.parameters())
        backward(self.joint.accelerator, *added.losses_with_parameters(losses.sum(), trained))


def count(setup: Setup) -> tuple[dict[str, Cost], list[Layer]]:
    """Count the cost of every kind of step; return it with the layers that are stored.

    PyTorch's fake tensors have shapes and no values: nothing is computed, nothing downloaded, no
    memory taken.
    """
    interpolation.cache_clear()  # it holds real values now, and fake ones later
    try:
        with FakeTensorMode(), _as_on_a_gpu():
            work = Workload(setup, BATCH, "cpu")
            costs = {}
            for name, (step, networks) in work.kinds().items():
                weights = sum(
                    parameter.numel() * (ADAM if parameter.requires_grad else FROZEN)
                    for network in networks
                    for parameter in network.parameters()
                )
                kept, counter = _Kept(), FlopCounterMode(display=False, custom_mapping=OPERATIONS)
                counter.mod_tracker = _Everything()  # type: ignore[assignment]
                with counter, kept:
                    step()
                operations = counter.get_total_flops() / BATCH
                costs[name] = Cost(operations, weights, kept.bytes / BATCH)
            return costs, work.layers
    finally:
        interpolation.cache_clear()


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Use the library's convolutions: ``aspp`` and ``winograd`` replace them only on a CPU.

    Networks without values stay on the device on which they were made.
    """
    dense, to = aspp.DENSE, nn.Module.to
    aspp.DENSE = 0.0
    nn.Module.to = lambda network, *_, **__: network  # type: ignore[method-assign,assignment]
    try:
        with winograd.disabled():
            yield
    finally:
        aspp.DENSE, nn.Module.to = dense, to  # type: ignore[method-assign]


class _Everything:
    """Replace the counter's tracker of modules: its hooks fail on a gradient of a gradient."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self) -> None: ...


def _convolution_backward(
    output: Any, inputs: Any, weight: Any, *others: Any, out_shape: Any
) -> int:
    """Count the operations of a convolution's gradients, from shapes.

    Each gradient, of the input and of the weight, has the multiplications of the forward pass.
    PyTorch's own count takes grouped convolutions for dense ones.
    """
    *_, transposed, _, _, wanted = others
    return sum(wanted[:2]) * conv_flop_count(inputs, weight, output, transposed=transposed)


OPERATIONS = {torch.ops.aten.convolution_backward: _convolution_backward}


class _Kept(saved_tensors_hooks):
    """Count the bytes that back-propagation keeps, without weights, each storage once."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base  # a view of a weight is a weight
        weight = whole.is_leaf and (whole.requires_grad or isinstance(whole, nn.Parameter))
        if not weight:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())


def measure(
    setup: Setup,
    batches: Mapping[str, int],
    precisions: Mapping[str, str],
    *,
    device: str,
    seconds: float = 10,
) -> dict[str, float]:
    """Measure the seconds that a sample takes in every kind of step on this device.

    Each step runs once on two samples to warm up, then on as many as fit into ``seconds``, at most
    a batch.

    Parameters
    ----------
    batches, precisions
        Samples of a batch, and ``no``, ``bf16`` or ``fp16``, by kind of step: ``backbone``, ``gan``
        and, for all others, ``decoder``.
    """
    measured: dict[str, float] = {}
    for name in Workload(setup, BATCH, device).kinds():
        precision = precisions.get(name, precisions["decoder"])
        guess = _time(setup, name, BATCH, precision, device)
        most = batches.get(name, batches["decoder"])
        batch = max(BATCH, min(most, int(seconds / max(guess, 1e-9))))
        measured[name] = min(_time(setup, name, batch, precision, device) for _ in range(2))
    return measured


def _time(setup: Setup, name: str, batch: int, precision: str, device: str) -> float:
    """Return the seconds a sample of a step and its optimizer."""
    step, networks = Workload(setup, batch, device).kinds()[name]
    parameters = _parameters(networks)
    optimizer = torch.optim.Adam(parameters, fused=True) if parameters else None
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    _synchronise(device)
    start = time.perf_counter()
    with torch.autocast(device, kinds.get(precision, torch.bfloat16), enabled=precision in kinds):
        step()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    _synchronise(device)
    return (time.perf_counter() - start) / batch


def _parameters(networks: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [
        parameter
        for network in networks
        for parameter in network.parameters()
        if parameter.requires_grad
    ]


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def store_spec(
    layers: Sequence[Layer],
    *,
    backbone: str,
    input_size: tuple[int, int],
    named: bool,
    dilate: bool,
    num_classes: int,
    **others: Any,
) -> StoreSpec:
    """Describe the stores that extract will write, as far as costs depend on it.

    Parameters
    ----------
    layers
        Stored layers; ``named``: under their names.
    backbone, input_size, dilate, num_classes
        See :class:`Setup`.
    others
        Further fields of :class:`featurestore.StoreSpec`.
    """
    shape = map_shape(layers, input_size)
    settings: dict[str, Any] = {
        "feature_shape": shape,
        "mask_shape": input_size,
        "class_names": tuple(map(str, range(num_classes))),
        "palette": ((0, 0, 0),) * num_classes,
        "backbone": backbone,
        "weights_digest": "",
        "output_stride": round(input_size[0] / shape[1]),
        "normalization_mean": (0, 0, 0),
        "normalization_std": (1, 1, 1),
        "resize": "stretch",
        "compute": "fp32",
        "nonnegative": False,
        "layer_names": tuple(layer.name for layer in layers if named),
        "layer_shapes": tuple(layer.shape for layer in layers if named),
        "native_strides": not dilate,
    }
    return StoreSpec(**{**settings, **others})


def untrained_backbone(setup: Setup) -> Backbone:
    """Build a backbone without its weights.

    Raises
    ------
    ConfigError
        When it has no such layers, or cannot take the images.
    """
    try:
        return build_backbone(
            name=setup.backbone,
            weights=None,
            layers=setup.layers,
            dilate=setup.dilate,
            size=setup.input_size,
        )
    except BackboneError as error:
        raise ConfigError(f"extract.{error.key}", str(error)) from error
