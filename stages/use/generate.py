"""generate: a feature store of generated features, from masks that need no image."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import featurestore
import stages.augment.new_masks
import stages.data.images
import stages.models
import stages.use.mask_source
from featurestore import FeatureStore, StoreSpec
from featurestore.files import file_sha256
from featurestore.index import INDEX_NAME
from featurestore.prefetch import prefetch
from stages.augment.new_masks import NewMasks
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import generator as random_generator
from stages.common.runtime import make_accelerator, progress, source_digest
from stages.models.feature_generator import FeatureGenerator
from stages.models.image_encoder import ImageEncoder, sample_z
from stages.training.models import load_gan, load_generator, read_config, read_spec
from stages.use.mask_source import Masks, open_masks

CPU = torch.device("cpu")
NOISE, CHANGES = 0, 1  # what random numbers are for


def run(
    gan: Path,
    masks: Path,
    *,
    out: Path,
    per_mask: int,
    seed: int,
    scratch: Path,
    device: str,
    workers: int,
    new_masks: Sequence[str] = (),
    overwrite: bool = False,
) -> FeatureStore:
    """Generate features for masks, into a store that reads like one of real features.

    Every sample passes through the generator by itself, and its noise is a function of seed, id and number. So its bytes
    depend neither on the samples beside it nor on where a killed run stopped nor on how many threads work; in batches, the
    last bits would differ with the batch's size.

    Parameters
    ----------
    gan
        Folder that ``train-gan`` wrote, or the ``gan`` folder of a jointly trained decoder.
    masks
        Folder of mask files, or a feature store. Where the GAN has an image encoder and the store has images, z comes
        from them as in training; else it is drawn from N(0, I).
    out
        The store; it appears whole or not at all.
    per_mask
        Samples a mask: ``ID-0``, ``ID-1`` and so on.
    seed
        Of the noise, and of what is done to masks.
    scratch
        Where finished shards wait; those of an interrupted run with the same inputs are taken over.
    device
        ``auto``, ``cpu`` or ``cuda``.
    workers
        Threads that read masks.
    new_masks
        What is done to a mask first, for each sample anew; see :class:`stages.augment.new_masks.NewMasks`.
    overwrite
        Replace a store at ``out``.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        Options that do not fit; no generator, or masks that it cannot take; a store that cannot be written.
    """
    # Everything that can be wrong, before the first sample.
    check_out(out, overwrite=overwrite)
    architecture, spec = describe(gan)
    if (
        per_mask > 1
        and architecture["family"] == "gan"
        and not architecture["z_dim"]
        and not new_masks
    ):
        raise ConfigError(
            "--per-mask",
            "this generator takes no noise, so all samples of a mask would be equal; use 1, or --new-masks",
        )
    encodes = architecture["family"] == "gan" and architecture["image_encoder"]
    source = open_masks(masks, spec, images=encodes)
    accelerator = make_accelerator(device, "no")
    network = load_generator(gan).to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    encoder = load_gan(gan)[0].image_encoder if source.has_images else None
    if encoder is not None:
        encoder.to(accelerator.device).eval()
    elif encodes:
        tqdm.write(f"{masks}: has no images for the image encoder, so z is drawn from N(0, I)")
    checked = prefetch(partial(_digest, source), range(len(source)), workers=workers, ahead=8)
    digests = list(progress(checked, "generate: checking", len(source), "mask"))
    changes = NewMasks(new_masks, source, np.arange(len(source))) if new_masks else None

    identity = featurestore.fingerprint(
        format_version=featurestore.FORMAT_VERSION,
        spec=spec.to_dict(),
        encoder="" if encoder is None else file_sha256(gan / "image_encoder.safetensors"),
        seed=seed,
        per_mask=per_mask,
        new_masks=list(new_masks),
        masks=[(*name, digest) for name, digest in zip(source.names, digests, strict=True)],
        code=source_digest(
            sys.modules[__name__],
            stages.augment.new_masks,
            stages.data.images,
            stages.use.mask_source,
            stages.models,
        ),
        torch=torch.__version__,
        device=accelerator.device.type,
    )
    writer = featurestore.create(
        out,
        spec,
        scratch=scratch / "generate" / identity[:16],
        fingerprint=identity,
        overwrite=overwrite,
    )

    # Masks are read ahead. The CPU generates as many samples at once as PyTorch has threads, with one for each: their number
    # then changes no bit, and none waits for another. A GPU has a queue of its own.
    read = partial(_read, source=source, digests=digests, changes=changes, seed=seed)
    generate = partial(_generate, network=network, encoder=encoder, device=accelerator.device)
    threads = torch.get_num_threads()
    streams = threads if accelerator.device.type == "cpu" else 0
    try:
        exact = torch.backends.cudnn.flags(
            enabled=True, deterministic=True, allow_tf32=False
        )  # fp32 means fp32
        with (
            exact,
            writer,
            progress((), f"generate: {out.name}", len(source) * per_mask, "sample") as bar,
        ):
            todo = [
                divmod(place, per_mask)
                for span in writer.resume(len(source) * per_mask)
                for place in span
            ]
            bar.update(len(source) * per_mask - len(todo))
            inputs = prefetch(read, todo, workers=workers, ahead=8)
            for sample, features in prefetch(
                generate, inputs, workers=streams, initializer=partial(torch.set_num_threads, 1)
            ):
                writer.append(id=sample.id, features=features, mask=sample.mask, view=sample.view)
                bar.update()
    finally:
        torch.set_num_threads(threads)
    return featurestore.open(out)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse to replace what is there unasked, and what is no feature store at all.

    Raises
    ------
    ConfigError
        The text says which.
    """
    if out.exists() and not overwrite:
        raise ConfigError(
            "--out", f"{out} is there already; add --force to replace it, or name another folder"
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / INDEX_NAME).is_file()):
        raise ConfigError(
            "--out",
            f"{out} is no feature store, and --force replaces nothing else; name another folder",
        )


def describe(gan: Path) -> tuple[dict[str, Any], StoreSpec]:
    """A generator's architecture, and the spec of the features that it generates.

    Raises
    ------
    DataError
        When there is no generator at ``gan``.
    """
    spec, architecture = read_spec(gan), read_config(gan).get("architecture", {})
    weights = gan / "generator.safetensors"
    if "family" not in architecture or not weights.is_file():
        raise DataError(
            gan,
            "holds no generator; name a folder that train-gan left, or the gan/ folder of a jointly trained decoder",
        )
    made_by = f"{architecture['family']} {file_sha256(weights)}"
    return architecture, dataclasses.replace(spec, has_images=False, generator=made_by)


def noise(z_dim: int, *, seed: int, id: str, view: str, number: int) -> Tensor:
    """(1, z_dim) standard normal noise of one sample, a function of these values alone."""
    return torch.randn(1, z_dim, generator=_rng(seed, id, view, number, NOISE))


def _rng(seed: int, id: str, view: str, number: int, purpose: int) -> torch.Generator:
    name = int.from_bytes(hashlib.sha256(f"{view} {id}".encode()).digest(), "big")
    return random_generator(CPU, seed, name, number, purpose)


@dataclass(frozen=True)
class _Sample:
    """What one sample is generated from."""

    id: str
    view: str
    image: np.ndarray | None  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) uint8
    draw: partial[Tensor]  # noise of a given length


def _digest(source: Masks, position: int) -> str:
    return _sha256(*source.read(position))


def _sha256(image: np.ndarray | None, mask: np.ndarray) -> str:
    return hashlib.sha256(mask.tobytes() + (b"" if image is None else image.tobytes())).hexdigest()


def _read(
    place: tuple[int, int],
    *,
    source: Masks,
    digests: list[str],
    changes: NewMasks | None,
    seed: int,
) -> _Sample:
    """A mask, as it was when it was checked, and what is done to it."""
    position, number = place
    id, view = source.names[position]
    image, mask = source.read(position)
    if _sha256(image, mask) != digests[position]:
        raise DataError(
            source.path, f"mask {id!r} changed while features were generated; start again"
        )
    if changes is not None:
        mask = changes(torch.tensor(mask)[None], _rng(seed, id, view, number, CHANGES))[0].numpy()
    return _Sample(
        f"{id}-{number}",
        view,
        image,
        mask,
        partial(noise, seed=seed, id=id, view=view, number=number),
    )


@torch.no_grad()
def _generate(
    sample: _Sample,
    *,
    network: FeatureGenerator,
    encoder: ImageEncoder | None,
    device: torch.device,
) -> tuple[_Sample, np.ndarray]:
    """The sample, and its features (C, h, w) float32."""
    z = sample.draw(network.z_dim).to(device)
    if encoder is not None:
        assert sample.image is not None
        mu, logvar = encoder(
            torch.tensor(sample.image).permute(2, 0, 1)[None].to(device)
        )  # (H, W, 3) -> (1, 3, H, W)
        z = sample_z(mu, logvar, z)
    features = network.generate(torch.tensor(sample.mask)[None].to(device), z=z)
    return sample, features[0].cpu().numpy()
