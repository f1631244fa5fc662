"""Weights of backbones: downloading, reading and fitting state dicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.backbones.backbone import BackboneError

State = dict[str, Tensor]


def download(name: str, source: str, load: Callable[[], State]) -> State:
    """Load a backbone's default weights from a hub or its cache.

    Parameters
    ----------
    name, source
        Backbone and address, for the error message.
    load
        Function that downloads the weights and returns them.

    Raises
    ------
    BackboneError
        When the download fails.
    """
    try:
        return load()
    except Exception as error:  # URLError, HTTPError, OSError and the hubs' own errors
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(
            f"the default weights of {name} cannot be downloaded ({reason}); "
            f"download {source} elsewhere and give the file as the weights"
        ) from error


def read_state(path: str) -> State:
    """Read a state dict from a ``.safetensors`` or ``.pth`` file; of a whole model, its backbone.

    Raises
    ------
    BackboneError
        When the file is missing, damaged, or holds no state dict.
    """
    file = Path(path)
    try:
        state: object = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except FileNotFoundError:
        raise BackboneError(
            f"{path}: there is no such weights file; give `default` or the path of a state dict",
            "weights",
        ) from None
    except Exception as error:  # errors of pickle, zip, safetensors and the operating system
        reason = " ".join(str(error).split())[:120]
        raise BackboneError(
            f"{path}: cannot be read as a state dict ({reason})", "weights"
        ) from error
    if isinstance(state, dict):
        state = state.get("state_dict", state.get("model", state))
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BackboneError(f"{path}: holds no state dict (names to tensors)", "weights")
    prefix = "backbone."
    backbone = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return backbone or state


def fit(network: nn.Module, state: State, source: str, *, head: tuple[str, ...]) -> None:
    """Load a state dict into a network.

    Parameters
    ----------
    network
        Backbone without a classification head.
    state
        Tensors by name.
    source
        Origin of ``state``, for the error message.
    head
        Prefixes of the classification head's tensors; only these may be left over.

    Raises
    ------
    BackboneError
        When a tensor is missing, unknown or of another shape.
    """
    wanted = network.state_dict()
    problems = {
        "lacks": [
            name
            for name in wanted
            if name not in state and not name.endswith("num_batches_tracked")
        ],
        "has the unknown": [
            name for name in state if name not in wanted and not name.startswith(head)
        ],
        "has another shape of": [
            name for name in wanted if name in state and state[name].shape != wanted[name].shape
        ],
    }
    for what, names in problems.items():
        if names:
            raise BackboneError(
                f"{source}: does not fit this backbone: it {what} tensor {names[0]!r} "
                f"(and {len(names) - 1} more); give weights of this very network",
                "weights",
            )
    network.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)
