"""Trained networks on disk: what a stage leaves behind, and how it is loaded.

Nothing is unpickled: tensors are read from safetensors or with ``weights_only=True``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from featurestore import StoreSpec
from featurestore.files import write_atomically, writing
from stages.backbones.map_network import MapNetwork, build_map_network, load_map_network
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import write_json
from stages.gan.networks import Networks, build_networks
from stages.models.decoder import Decoder
from stages.models.feature_generator import FeatureGenerator
from stages.training.checkpoint import save_atomically

CONFIG_NAME = "config.json"
OPTIMIZERS_NAME = "optimizers.pt"
TRAINED = "generator-trained"


@contextmanager
def _reading(
    path: Path,
    problem: str,
    *,
    missing: str = "there is no trained model here",
    stage: str = "the stage that makes it",
) -> Iterator[None]:
    """Turn errors of reading a file, which every library raises in its own way, into one line."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(path, f"{missing}; run {stage}") from None
    except NotADirectoryError:
        message = "is a file; name the folder of the trained model that holds it"
        raise DataError(path.parent, message) from None
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(repr(error).split())[:100]
        raise DataError(path, f"{problem} ({reason}); run {stage} again") from error


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a network's state dict as safetensors."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    with writing(path):
        write_atomically(path, content)


def load_weights(network: nn.Module, path: Path) -> None:
    """Read what :func:`save_weights` wrote into a network.

    Raises
    ------
    DataError
        When the file is missing, damaged, or of another network.
    """
    with _reading(path, "cannot be read as safetensors", missing="there is no such weights file"):
        tensors = load_file(path)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != actual:
        names = sorted(expected.keys() | actual.keys())
        first = next(name for name in names if expected.get(name) != actual.get(name))
        message = f"does not fit its {CONFIG_NAME}: tensor {first!r} differs"
        raise DataError(path, message, expected=expected, actual=actual)
    network.load_state_dict(tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's ``config.json``.

    Raises
    ------
    DataError
        When it is missing or damaged.
    """
    path = folder / CONFIG_NAME
    with _reading(path, "is not valid JSON"):
        return json.loads(path.read_text(encoding="utf-8"))


def read_spec(path: str | Path) -> StoreSpec:
    """Read the spec of the features that a trained decoder or GAN works on.

    It holds backbone, sizes, classes and palette.

    Raises
    ------
    DataError
        When there is no trained model at ``path``, or its config is damaged or of an older version.
    """
    folder = Path(path)
    with _reading(folder / CONFIG_NAME, "does not describe the features of its training"):
        return StoreSpec.from_dict(read_config(folder)["features"])


def read_precision(path: str | Path) -> str:
    """Read the precision of a decoder's training, its ``mixed_precision``.

    Raises
    ------
    DataError
        When there is no trained decoder at ``path``, or its config is damaged or too old.
    """
    folder = Path(path)
    with _reading(folder / CONFIG_NAME, "does not name the precision of its training"):
        return str(read_config(folder)["mixed_precision"])


# -- GANs ----------------------------------------------------------------------------------------


def save_gan(folder: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write a trainer's state and config into a folder.

    ``generator.safetensors`` is the one to generate with. Where it is an average,
    ``generator-trained.safetensors`` is the one that training resumes from.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    average = state["training"]["average"]
    for name, weights in state["networks"].items():
        file = TRAINED if name == "generator" and average else name
        save_weights(weights, folder / f"{file}.safetensors")
    if average:
        save_weights(average, folder / "generator.safetensors")
    with writing(folder):
        save_atomically(state["training"], folder / OPTIMIZERS_NAME)
    write_json(folder / CONFIG_NAME, config)


def load_gan(folder: Path) -> tuple[Networks, dict[str, Any]]:
    """Load networks and config of a GAN on the CPU, for training to resume from.

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


def load_training_state(folder: Path) -> dict[str, Any]:
    """Load what :meth:`stages.gan.trainer.Trainer.load_training_state` takes, on the CPU.

    Raises
    ------
    DataError
        When it is missing or damaged.
    """
    path = folder / OPTIMIZERS_NAME
    with _reading(path, "cannot be read", stage="train-gan"):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_generator(path: str | Path, *, weights: str = "generator") -> FeatureGenerator:
    """Load a trained generator, ready to use.

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
    FeatureGenerator
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


def _untrained(folder: Path) -> Networks:
    """Build the networks that the config of a GAN's folder describes."""
    problem = "does not describe networks of this version"
    with _reading(folder / CONFIG_NAME, problem, stage="train-gan"):
        return build_networks(read_config(folder)["architecture"])


# -- decoders ------------------------------------------------------------------------------------


def save_networks(networks: Mapping[str, nn.Module], folder: Path, suffix: str = "") -> None:
    """Write each network to ``NAME + suffix.safetensors``."""
    for name, network in networks.items():
        save_weights(network.state_dict(), folder / f"{name}{suffix}.safetensors")


def has_trained_backbone(path: str | Path) -> bool:
    """Return whether the folder that ``train-decoder`` wrote holds a backbone of its own."""
    return read_config(Path(path)).get("backbone") == "trained"


def load_backbone(
    path: str | Path, *, weights: str = "decoder", backbone_weights: str = "default"
) -> MapNetwork:
    """Load the backbone of a decoder: the one trained with it, or the frozen one of its features.

    Parameters
    ----------
    path
        Folder that ``train-decoder`` wrote.
    weights
        ``decoder`` (last epoch) or ``decoder-best``.
    backbone_weights
        Of a frozen backbone, the value of ``extract.weights``.

    Raises
    ------
    ConfigError, DataError
        When there is no trained decoder at ``path``, or weights are missing, damaged or others than
        those of the features.
    """
    folder, spec = Path(path), read_spec(path)
    if not has_trained_backbone(folder):
        return load_map_network(spec, backbone_weights)
    if backbone_weights != "default":
        message = f"{folder} holds the backbone that was trained with it; leave this option out"
        raise ConfigError("--backbone-weights", message, actual=backbone_weights)
    network = build_map_network(spec, None)
    name = weights.replace("decoder", "backbone")
    load_weights(network.backbone.network, folder / f"{name}.safetensors")
    return network


def load_decoder(path: str | Path, *, weights: str = "decoder") -> Decoder:
    """Load a trained decoder in evaluation mode, on the CPU.

    Parameters
    ----------
    path
        Folder that ``train-decoder`` wrote.
    weights
        ``decoder`` (last epoch) or ``decoder-best`` (best mIoU on the validation split).

    Raises
    ------
    DataError
        When there is no trained decoder at ``path``, or it is damaged.
    """
    folder = Path(path)
    settings = read_config(folder).get("architecture", {})
    if "head" not in settings:
        message = "holds a trained model, but no decoder; name a folder that train-decoder wrote"
        raise DataError(folder, message)
    problem = "does not describe a decoder of this version"
    with _reading(folder / CONFIG_NAME, problem, stage="train-decoder"):
        decoder = Decoder(**settings)
    load_weights(decoder, folder / f"{weights}.safetensors")
    return decoder.eval().requires_grad_(False)
