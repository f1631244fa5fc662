"""Trained networks on disk: what a stage leaves behind, and how it is loaded.

Nothing is unpickled: tensors are read from safetensors or with ``weights_only=True``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from featurestore import StoreSpec
from featurestore.files import write_atomically, writing
from stages.common.errors import DataError
from stages.common.runtime import write_json
from stages.gan.networks import Networks, build_networks
from stages.models.decoder import Decoder
from stages.models.feature_generator import FeatureGenerator
from stages.training.checkpoint import save_atomically

CONFIG_NAME = "config.json"
OPTIMIZERS_NAME = "optimizers.pt"
TRAINED = "generator-trained"


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """A network's state dict as safetensors."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    with writing(path):
        write_atomically(path, content)


def load_weights(network: nn.Module, path: Path) -> None:
    """The inverse of :func:`save_weights`.

    Raises
    ------
    DataError
        When the file is missing, damaged, or of another network.
    """
    network.load_state_dict(_read_tensors(path, network))


def _read_tensors(path: Path, network: nn.Module) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise DataError(
            path, "there is no such weights file; run the stage that makes it"
        ) from None
    except Exception as error:  # safetensors raises its own error type, and OS errors
        raise DataError(
            path, f"cannot be read as safetensors ({error}); run the stage that makes it again"
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        differing = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        raise DataError(
            path,
            f"does not fit its {CONFIG_NAME}: tensor {differing[0]!r} differs",
            expected=expected,
            actual=found,
        )
    return tensors


def save_gan(folder: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write a trainer's state and config into a folder.

    ``generator.safetensors`` is the one to generate with. Where that is an average,
    ``generator-trained.safetensors`` is the one that training goes on from.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    average = state["training"]["average"]
    for name, weights in state["networks"].items():
        save_weights(
            weights, folder / f"{TRAINED if name == 'generator' and average else name}.safetensors"
        )
    if average:
        prefix = "module."
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in average.items()
            if name.startswith(prefix)
        }
        save_weights(weights, folder / "generator.safetensors")
    with writing(folder):
        save_atomically(state["training"], folder / OPTIMIZERS_NAME)
    write_json(folder / CONFIG_NAME, config)


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's ``config.json``.

    Raises
    ------
    DataError
        When it is missing or damaged.
    """
    path = folder / CONFIG_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            path, "there is no trained model here; run the stage that makes it"
        ) from None
    except NotADirectoryError:
        raise DataError(
            folder, "is a file; name the folder of the trained model that it lies in"
        ) from None
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(
            path, f"is not valid JSON ({error}); run the stage that makes it again"
        ) from error


def read_spec(path: str | Path) -> StoreSpec:
    """The spec of the features that a trained decoder or GAN works on: backbone, sizes, classes, palette.

    Raises
    ------
    DataError
        When there is no trained model at ``path``, or its config is damaged or of an older version.
    """
    folder = Path(path)
    try:
        return StoreSpec.from_dict(read_config(folder)["features"])
    except (KeyError, TypeError, ValueError) as error:
        message = f"does not describe the features that the model was trained on ({error!r}); run the stage that makes it again"
        raise DataError(folder / CONFIG_NAME, message) from error


def read_precision(path: str | Path) -> str:
    """The precision that a trained decoder was trained and evaluated in: ``no`` (float32), ``bf16`` or ``fp16``.

    Raises
    ------
    DataError
        When there is no trained decoder at ``path``, or its config is damaged or of an older version.
    """
    folder = Path(path)
    try:
        return str(read_config(folder)["mixed_precision"])
    except KeyError as error:
        message = "does not say in which precision the decoder was trained; run the stage that makes it again"
        raise DataError(folder / CONFIG_NAME, message) from error


def load_gan(folder: Path) -> tuple[Networks, dict[str, Any]]:
    """Networks and config as :func:`save_gan` wrote them, on the CPU, for training to go on from.

    Raises
    ------
    DataError
        When there is no trained GAN, or it is damaged.
    """
    networks, config = _untrained(folder), read_config(folder)
    for name, network in networks.by_name().items():
        trained = name == "generator" and (folder / f"{TRAINED}.safetensors").is_file()
        load_weights(network, folder / f"{TRAINED if trained else name}.safetensors")
    return networks, config


def _untrained(folder: Path) -> Networks:
    """The networks of a GAN folder, as its config describes them."""
    try:
        return build_networks(read_config(folder)["architecture"])
    except (KeyError, TypeError) as error:
        message = f"does not describe networks of this version ({error!r}); run train-gan again"
        raise DataError(folder / CONFIG_NAME, message) from error


def load_training_state(folder: Path) -> dict[str, Any]:
    """What :meth:`stages.gan.trainer.Trainer.load_training_state` takes, on the CPU.

    Raises
    ------
    DataError
        When they are missing or damaged.
    """
    path = folder / OPTIMIZERS_NAME
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and OS errors
        raise DataError(
            path, f"cannot be read ({' '.join(str(error).split())[:100]}); run train-gan again"
        ) from error


def load_generator(path: str | Path, *, weights: str = "generator") -> FeatureGenerator:
    """A trained generator, ready to use.

    >>> generator = load_generator("models/gan")
    >>> features = generator.generate(masks)  # (B, H, W) uint8 -> (B, C, h, w), like a store's

    Parameters
    ----------
    path
        Folder that ``train-gan`` wrote, or the ``gan`` folder of a jointly trained decoder.
    weights
        ``generator``, or ``generator-initial`` for the untrained one.

    Returns
    -------
    Generator or FlowGenerator
        In evaluation mode, on the CPU, without gradients.

    Raises
    ------
    DataError
        When there is no trained GAN at ``path``, or it is damaged.
    """
    folder = Path(path)
    generator = _untrained(folder).generator
    load_weights(generator, folder / f"{weights}.safetensors")
    return generator.eval().requires_grad_(False)


def load_decoder(path: str | Path, *, weights: str = "decoder") -> Decoder:
    """A trained decoder in evaluation mode, on the CPU; ``weights`` is ``decoder`` (last epoch) or ``decoder-best``.

    Raises
    ------
    DataError
        When there is no trained decoder at ``path``, or it is damaged.
    """
    folder = Path(path)
    settings = read_config(folder).get("architecture", {})
    if "head" not in settings:
        raise DataError(
            folder, "holds a trained model, but no decoder; name a folder that train-decoder left"
        )
    try:
        decoder = Decoder(**{**settings, "atrous_rates": tuple(settings["atrous_rates"])})
    except (KeyError, TypeError, ValueError) as error:
        message = (
            f"does not describe a decoder of this version ({error!r}); run train-decoder again"
        )
        raise DataError(folder / CONFIG_NAME, message) from error
    load_weights(decoder, folder / f"{weights}.safetensors")
    return decoder.eval().requires_grad_(False)
