"""Networks of timm: CNNs through ``features_only``, transformers through their intermediates.

A CNN gives the outputs of its stages, and can be dilated to stride 8. A ViT gives the maps of its
blocks, and a hierarchical transformer those of its stages: prefix tokens are dropped, and the final
norm is applied where timm applies one.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from stages.backbones.backbone import (
    DILATED_STRIDE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BackboneError,
    BackboneLayer,
    Triple,
    choose_layers,
)
from stages.backbones.weights import State, download, fit, read_state

HEAD = ("fc.", "classifier.", "head.", "conv_head.", "bn2.", "norm_head.", "norm.", "fc_norm.")
Load = Callable[[], State]


def known(name: str) -> bool:
    """Whether timm's registry has the model."""
    import timm  # takes a second, which only this family of backbones should cost

    return timm.is_model(name)


def build(
    name: str,
    timm_name: str,
    weights: str | None,
    layers: Sequence[str],
    *,
    dilate: bool,
    size: tuple[int, int] | None,
    default_state: Load | None = None,
) -> Backbone:
    """Make the backbone; see ``build_backbone``.

    Parameters
    ----------
    name, timm_name
        Names in params.yaml and in timm.
    default_state
        Loads the default weights; default: timm's, from its hub.
    """
    try:
        with torch.device("meta"):
            _create(name, timm_name, features_only=True, output_stride=DILATED_STRIDE)
    except BackboneError:
        return _transformer(name, timm_name, weights, layers, dilate, size)
    return _cnn(name, timm_name, weights, layers, dilate, default_state)


def _cnn(
    name: str,
    timm_name: str,
    weights: str | None,
    layers: Sequence[str],
    dilate: bool,
    default_state: Load | None,
) -> Backbone:
    options: dict[str, Any] = {"features_only": True}
    if dilate:
        options["output_stride"] = DILATED_STRIDE
    network = _create(name, timm_name, **options)
    info = network.feature_info
    indices = choose_layers(name, info.module_name(), layers)
    described = list(zip(info.module_name(), info.channels(), info.reduction(), strict=True))
    chosen = [BackboneLayer(*described[index]) for index in indices]
    if dilate and chosen[-1].stride > DILATED_STRIDE:
        raise BackboneError(f"{name} cannot be dilated to stride 8; set it to false", "dilate")
    if weights is not None:
        state = _state(name, timm_name, weights, network, default_state, options)
        fit(network, state, weights, head=HEAD)
    state = network.state_dict()
    network = _create(name, timm_name, out_indices=indices, **options)  # no deeper layers
    network.load_state_dict({tensor: state[tensor] for tensor in network.state_dict()})
    backbone = _backbone(name, network, network.pretrained_cfg, chosen)
    if weights is None:
        return backbone
    # Only a network that ends in a ReLU has no negative feature on noise.
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 3, 64, 64), generator=rng, dtype=torch.uint8)
    backbone.nonnegative = all(bool((features >= 0).all()) for features in backbone(noise))
    return backbone


def _transformer(
    name: str,
    timm_name: str,
    weights: str | None,
    layers: Sequence[str],
    dilate: bool,
    size: tuple[int, int] | None,
) -> Backbone:
    from timm.models._features import FeatureGetterNet

    options: dict[str, Any] = {"num_classes": 0}
    model = _create(name, timm_name, **options)
    is_vit = len({block["reduction"] for block in model.feature_info}) == 1
    # A ViT that interpolates its position embeddings takes any size; SAM does so unasked. Others
    # are made for one size.
    asked = getattr(getattr(model, "patch_embed", None), "strict_img_size", True)
    choices: list[dict[str, Any]] = [{"dynamic_img_size": True}] if is_vit else []
    choices += [{"img_size": size}] if size and (asked or not is_vit) else []
    for choice in choices:
        with suppress(BackboneError):
            model, options = _create(name, timm_name, **options, **choice), {**options, **choice}
            break
    if weights is not None:
        fit(
            model,
            _state(name, timm_name, weights, model, None, options),
            weights,
            head=HEAD,
        )
    blocks = model.feature_info
    strides = [block["reduction"] for block in blocks]
    names = [str(n) if is_vit else block["module"] for n, block in enumerate(blocks)]
    indices = choose_layers(name, names, layers)
    if dilate and not is_vit and strides[indices[-1]] > DILATED_STRIDE:
        raise BackboneError(f"{name} cannot be dilated to stride 8; set it to false", "dilate")
    norm = "hiera" not in type(model).__module__  # timm does not normalise Hiera's features
    network = FeatureGetterNet(model, out_indices=tuple(indices), norm=norm)
    channels = network.feature_info.channels()
    chosen = [
        BackboneLayer(names[index], count, strides[index])
        for index, count in zip(indices, channels, strict=True)
    ]
    return _backbone(name, network, model.pretrained_cfg, chosen, multiple=max(strides))


def _backbone(
    name: str,
    network: nn.Module,
    settings: dict[str, Any],
    layers: Sequence[BackboneLayer],
    multiple: int | None = None,
) -> Backbone:
    return Backbone(
        name=name,
        network=network,
        layers=layers,
        nonnegative=False,
        mean=cast("Triple", settings.get("mean", IMAGENET_MEAN)),
        std=cast("Triple", settings.get("std", IMAGENET_STD)),
        multiple=multiple,
    )


def _create(name: str, timm_name: str, **options: Any) -> Any:
    """Make a network of timm; under fake tensors (``estimate``) one without values.

    Raises
    ------
    BackboneError
        When the model does not take the options.
    """
    import timm

    try:
        # Some families read the values of tensors while they are made, which fake ones lack.
        with unset_fake_temporarily() as fake, torch.device("meta") if fake else nullcontext():
            network = timm.create_model(timm_name, **{"pretrained": False, **options})
    except Exception as error:  # each family of timm refuses in its own way
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        message = f"{name} cannot give dense features ({reason}); choose another"
        raise BackboneError(message) from error
    if fake:
        network._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    return network


def _state(
    name: str,
    timm_name: str,
    weights: str,
    network: nn.Module,
    default_state: Load | None,
    options: dict[str, Any],
) -> State:
    """Read the weights of a network, under its names.

    Raises
    ------
    BackboneError
        When they cannot be downloaded, or read, or are of another model.
    """
    import timm
    from timm.layers import resample_abs_pos_embed

    if weights == "default":
        if default_state is not None:
            return default_state()
        settings = cast("dict[str, object]", network.pretrained_cfg)
        source = f"https://huggingface.co/{settings.get('hf_hub_id') or 'timm'}"
        released = {key: value for key, value in options.items() if key != "img_size"}
        make = partial(timm.create_model, timm_name, pretrained=True, **released)
        state = download(name, source, lambda: make().state_dict())
        if released == options:
            return state
    else:
        state = read_state(weights)
    model = network
    if not hasattr(network, "forward_intermediates"):  # of ``features_only``
        with torch.device("meta"):
            model = timm.create_model(timm_name)
    state = _converted(state, model, weights)
    # timm resizes the position embeddings of all fixed networks but Hiera's.
    grid = getattr(model, "tokens_spatial_shape", None)
    if grid and "pos_embed" in state and state["pos_embed"].shape != model.pos_embed.shape:
        table = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=0)
        state = {**state, "pos_embed": table}
    names = {tensor.replace("_", "."): tensor for tensor in network.state_dict()}
    # ``features_only`` flattens some networks: stages.0.x becomes stages_0.x.
    return {names.get(tensor.replace("_", "."), tensor): state[tensor] for tensor in state}


def _converted(state: State, model: nn.Module, source: str) -> State:
    """Rename the tensors of the authors' release of a network as timm does; keep other names.

    Raises
    ------
    BackboneError
        When timm would leave out biases that are not zero.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        with redirect_stdout(io.StringIO()):  # timm prints a line for every bias it leaves out
            converted: State = convert(dict(state), model)
    except Exception:  # weights of another model: ``fit`` names the difference
        return state
    # DINOv3: timm has a network without the biases of queries and values, and one with them.
    for name, bias in state.items():
        if name.endswith("qkv.bias") and not {name, name.replace("qkv.", "q_")} & set(converted):
            queries, _, values = bias.chunk(3)
            if queries.any() or values.any():
                message = f"{source}: has biases {name!r}, for which this backbone has no place;"
                raise BackboneError(f"{message} use timm's network that ends in _qkvb", "weights")
    return converted
