"""What a step of each kind costs: floating-point operations and memory counted without computing anything, or seconds measured.

Networks are those of a preset, with random weights: weights do not change what a step costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from stages.backbones import build
from stages.backbones.backbone import OUTPUT_STRIDE, BackboneError
from stages.common.errors import ConfigError
from stages.gan.networks import build_networks
from stages.gan.objective import Objective, forward
from stages.models import aspp, winograd
from stages.models.decoder import Decoder
from stages.models.flow_generator import FlowGenerator
from stages.segmentation.upsampled_loss import interpolation, upsampled_cross_entropy

BATCH = 2  # the smallest that batch normalisation takes
ADAM = 16  # bytes a float32 parameter takes in training: itself, its gradient, two moments


@dataclass(frozen=True)
class Cost:
    """Of one sample in one kind of step.

    Attributes
    ----------
    operations
        Floating-point operations of convolutions and matrix products; a multiplication and an addition are two.
    weight_bytes
        What trained weights, gradients and Adam's moments take, however large the batch.
    activation_bytes
        What back-propagation keeps of a sample, in float32.
    """

    operations: float
    weight_bytes: int
    activation_bytes: float


class Workload:
    """One configuration's networks, and a step of each kind of work on a batch of random numbers.

    Parameters
    ----------
    extract, gan, decoder
        Sections ``extract``, ``train_gan`` and ``train_decoder`` of the parameters.
    num_classes
        Of the data set.
    ratios
        Draws a mask of each joint training.
    batch
        Samples a step.
    device
        Where the networks are.
    """

    def __init__(
        self,
        extract: Any,
        gan: Any,
        decoder: Any,
        *,
        num_classes: int,
        ratios: Sequence[int],
        batch: int,
        device: str,
    ) -> None:
        height, width = extract.input_size
        settings = gan.model_dump()
        torch.manual_seed(0)
        with torch.device(device):
            self.backbone = untrained_backbone(extract.backbone)
            self.images = torch.rand(batch, 3, height, width)
            self.masks = torch.randint(0, num_classes, (batch, height, width), dtype=torch.uint8)
            with torch.no_grad():
                self.features = self._features()
            channels, *size = self.features.shape[1:]
            shape = {
                "feature_shape": (channels, *size),
                "output_stride": OUTPUT_STRIDE,
                "nonnegative": True,
            }
            self.networks = build_networks({**settings, **shape, "num_classes": num_classes})
            head = {
                "head": decoder.decoder,
                "width": decoder.width,
                "atrous_rates": decoder.atrous_rates,
            }
            self.decoder = Decoder(**head, in_channels=channels, num_classes=num_classes)
        self.objective = Objective(
            **{
                field.name: settings[field.name]
                for field in fields(Objective)
                if field.name in settings
            }
        )
        self.ratios, self.precisions = ratios, (gan.mixed_precision, decoder.mixed_precision)
        self.steps = 1  # R1 is added every so many steps, not in this one

    def kinds(self) -> dict[str, tuple[Callable[[], object], list[nn.Module], str]]:
        """By name: a step, the networks that it trains, and its precision (``no``, ``bf16`` or ``fp16``)."""
        gans, decoder = list(self.networks.by_name().values()), self.decoder
        ours, theirs = self.precisions
        kinds: dict[str, tuple[Callable[[], object], list[nn.Module], str]] = {
            "backbone": (self.extract_step, [], "no"),
            "gan": (self.gan_step, gans, ours),
            "decoder": (lambda: self.decoder_loss(self.features).backward(), [decoder], theirs),
            "generator": (self.generate_step, [], theirs),
        }
        for ratio in self.ratios:
            joint = partial(self.joint_step, ratio)
            kinds[f"joint {ratio}:1"] = (joint, [*gans, decoder], theirs)
        return kinds

    def _features(self) -> Tensor:
        output = self.backbone(self.images)
        return output[-1] if isinstance(output, (list, tuple)) else output

    @torch.no_grad()
    def extract_step(self) -> None:
        """The frozen backbone, forwards."""
        self._features()

    def generate_step(self) -> None:
        """A finished generator, forwards."""
        generator = self.networks.generator
        generator.generate(
            self.masks, z=torch.randn(len(self.masks), generator.z_dim, device=self.masks.device)
        )

    def decoder_loss(self, features: Tensor) -> Tensor:
        """Cross-entropy on one batch of features."""
        return upsampled_cross_entropy(self.decoder(features), self.masks)

    def gan_step(self) -> None:
        """Losses and gradients of the first branch of Algorithm 1, or of a flow."""
        if isinstance(self.networks.generator, FlowGenerator):
            flow = self.networks.generator
            target = flow.reduce(self.features / flow.feature_scale)
            velocity = flow.velocity(
                flow.start(torch.randn_like(target).flatten(1)),
                torch.rand(len(target), device=target.device),
                self.masks,
            )
            (velocity - target).square().mean().backward()
            return
        self._step(1, lambda fake: [])

    def joint_step(self, ratio: int) -> None:
        """Losses and gradients of the second branch: the decoder sees real and generated features, apart."""
        scale = self.networks.generator.feature_scale
        self._step(
            ratio,
            lambda fake: [
                self.decoder_loss(some) for some in (self.features, *(fake * scale).chunk(ratio))
            ],
        )

    def _step(self, ratio: int, segment: Callable[[Tensor], list[Tensor]]) -> None:
        """As :meth:`stages.gan.gan_trainer.GanTrainer.update` does it, without its optimizers."""
        networks = self.networks
        assert networks.discriminator is not None
        step = forward(
            self.objective,
            generator=networks.generator,
            discriminator=networks.discriminator,
            image_encoder=networks.image_encoder,
            real=self.features / networks.generator.feature_scale,
            masks=self.masks,
            images=(255 * self.images).byte(),
            noise=torch.randn(
                ratio * len(self.masks), networks.generator.z_dim, device=self.masks.device
            ),
            rng=torch.Generator(self.masks.device).manual_seed(0),
            step=self.steps,
        )
        extra = segment(step.fake)
        total = step.generator_loss + (torch.stack(extra).sum() if extra else 0)
        trained = [
            networks.generator,
            *([networks.image_encoder] if networks.image_encoder else []),
            *([self.decoder] if extra else []),
        ]
        step.discriminator_loss.backward(
            inputs=list(networks.discriminator.parameters()), retain_graph=True
        )
        total.backward(
            inputs=[parameter for network in trained for parameter in network.parameters()]
        )


def count(
    extract: Any, gan: Any, decoder: Any, *, num_classes: int, ratios: Sequence[int] = ()
) -> tuple[dict[str, Cost], tuple[int, ...]]:
    """The cost of every kind of step, and the features' (C, h, w).

    PyTorch's fake tensors have shapes and no values: nothing is computed, nothing downloaded, no memory taken.
    """
    interpolation.cache_clear()  # what it holds is real, and what it will hold is not
    try:
        with FakeTensorMode(), _as_on_a_gpu():
            work = Workload(
                extract,
                gan,
                decoder,
                num_classes=num_classes,
                ratios=ratios,
                batch=BATCH,
                device="cpu",
            )
            costs = {}
            for name, (step, networks, _) in work.kinds().items():
                weights = sum(
                    parameter.numel() for network in networks for parameter in network.parameters()
                )
                kept = _Kept()
                counter = FlopCounterMode(display=False)
                counter.mod_tracker = _Everything()  # type: ignore[assignment]
                with counter, kept:
                    step()
                costs[name] = Cost(
                    counter.get_total_flops() / BATCH, ADAM * weights, kept.bytes / BATCH
                )
            return costs, tuple(work.features.shape[1:])
    finally:
        interpolation.cache_clear()


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Only the library's convolutions: what ``aspp`` and ``winograd`` do in their place, they do on a CPU alone."""
    least, aspp.DENSE = aspp.DENSE, 0.0
    try:
        with winograd.disabled():
            yield
    finally:
        aspp.DENSE = least


class _Everything:
    """In place of the counter's tracker of modules, whose hooks fail where a step takes a gradient of a gradient."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self) -> None: ...


class _Kept(saved_tensors_hooks):
    """Counts the bytes of what back-propagation keeps, weights aside, each piece of memory once."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        whole = (
            tensor if tensor._base is None else tensor._base
        )  # a part of a weight is no less a weight
        if not whole.is_leaf or not whole.requires_grad:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())


def measure(
    extract: Any,
    gan: Any,
    decoder: Any,
    *,
    num_classes: int,
    ratios: Sequence[int],
    device: str,
    seconds: float = 10,
) -> dict[str, float]:
    """Seconds a sample of every kind of step takes on this device, in the parameters' precision.

    Each step runs once on two samples to warm up, then on as many as fit into ``seconds``, at most a batch.
    """
    batches = {"backbone": extract.batch_size, "gan": gan.batch_size}
    work = Workload(
        extract, gan, decoder, num_classes=num_classes, ratios=ratios, batch=BATCH, device=device
    )
    least = {
        name: _time(step, networks, precision, device) / BATCH
        for name, (step, networks, precision) in work.kinds().items()
    }
    found: dict[str, float] = {}
    for name, guess in least.items():
        batch = max(
            BATCH, min(batches.get(name, decoder.batch_size), int(seconds / max(guess, 1e-9)))
        )
        work = Workload(
            extract,
            gan,
            decoder,
            num_classes=num_classes,
            ratios=ratios,
            batch=batch,
            device=device,
        )
        step, networks, precision = work.kinds()[name]
        found[name] = min(_time(step, networks, precision, device) for _ in range(2)) / batch
    return found


def _time(
    step: Callable[[], object], networks: Sequence[nn.Module], precision: str, device: str
) -> float:
    """Seconds of a step and its optimizer."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    optimizer = torch.optim.Adam(parameters, fused=True) if parameters else None
    kinds: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
    _synchronise(device)
    start = time.perf_counter()
    with torch.autocast(device, kinds.get(precision, torch.bfloat16), enabled=precision in kinds):
        step()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def untrained_backbone(name: str) -> nn.Module:
    """The network that :func:`stages.backbones.build.build_backbone` makes, without its weights.

    Raises
    ------
    ConfigError
        When timm's network of that name gives no dense features.
    """
    try:
        return build.untrained_backbone(name)
    except BackboneError as error:
        raise ConfigError("extract.backbone", str(error)) from error
