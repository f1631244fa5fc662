"""generate: a feature store of generated features, from masks that need no image."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import featurestore
import stages.augment.new_masks
import stages.backbones
import stages.data.images
import stages.models
import stages.use.mask_source
from featurestore import FeatureStore, StoreSpec
from featurestore.dataset import split_map
from featurestore.files import file_sha256
from featurestore.index import INDEX_NAME
from featurestore.prefetch import prefetch
from stages.augment.new_masks import NewMasks
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import generator as random_generator
from stages.common.runtime import make_accelerator, progress, source_digest, to_channels_last
from stages.models.feature_generator import FeatureGenerator
from stages.models.image_encoder import sample_z
from stages.training.models import load_gan, load_generator, read_config, read_spec
from stages.use.mask_source import Masks, open_masks

NOISE, CHANGES = 0, 1  # purposes of random numbers
BATCH = {"cpu": 1, "cuda": 16}  # samples that a device generates at once


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

    The noise of a sample is a function of seed, id and number. A CPU generates each sample by
    itself: its bytes do not depend on other samples. A GPU generates batches of 16, on which the
    last bits depend; no batch crosses a shard. On one kind of device the bytes of the store depend
    neither on interruptions nor on threads.

    Parameters
    ----------
    gan
        Folder that ``train-gan`` wrote, or the ``gan`` folder of a jointly trained decoder.
    masks
        Folder of mask files, or a feature store. If the GAN has an image encoder and the store has
        images, z comes from the images as in training; otherwise from N(0, I).
    out
        The store; it appears whole or not at all.
    per_mask
        Samples a mask: ``ID-0``, ``ID-1`` and so on.
    seed
        Seed of the noise and of the changes of masks.
    scratch
        Folder of finished shards; an interrupted run with the same inputs resumes from them.
    device
        ``auto``, ``cpu`` or ``cuda``.
    workers
        Threads that read masks.
    new_masks
        Random changes of the mask of each sample; see :class:`stages.augment.new_masks.NewMasks`.
    overwrite
        Whether to replace a store at ``out``.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        When options contradict each other, there is no generator, it cannot use the masks, or the
        store cannot be written.
    """
    check_out(out, overwrite=overwrite)
    spec, encodes = describe(gan)
    generator = load_generator(gan)
    if per_mask > 1 and not generator.z_dim and not new_masks:
        raise ConfigError(
            "--per-mask",
            "this generator takes no noise, so all samples of a mask would be equal; "
            "use 1, or --new-masks",
        )
    source = open_masks(masks, spec, images=encodes)
    if encodes and not source.has_images:
        tqdm.write(f"{masks}: has no images for the image encoder, so z is drawn from N(0, I)")
    sampler = Sampler(gan, generator, source, new_masks, seed=seed, device=device, workers=workers)
    fingerprint = featurestore.fingerprint(per_mask=per_mask, **sampler.identity)
    writer = featurestore.create(
        out,
        spec,
        scratch=scratch / "generate" / fingerprint[:16],
        fingerprint=fingerprint,
        overwrite=overwrite,
    )
    total = len(source) * per_mask
    with ExitStack() as stack:
        # The threads of PyTorch change below; float32 is exact: no TF32.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.enter_context(torch.backends.cudnn.flags(True, deterministic=True, allow_tf32=False))
        stack.enter_context(writer)
        bar = stack.enter_context(progress((), f"generate: {out.name}", total, "sample"))
        missing = writer.resume(total)
        bar.update(total - sum(map(len, missing)))
        # No batch crosses a shard, so that a resumed run generates the same batches.
        todo = [
            [divmod(sample, per_mask) for sample in span[start : start + sampler.batch_size]]
            for span in missing
            for start in range(0, len(span), sampler.batch_size)
        ]
        for sample, features in sampler.samples(todo, workers=workers):
            layers = [
                layer[0].numpy() for layer in split_map(torch.from_numpy(features)[None], spec)
            ]
            writer.append(
                id=sample.id,
                features=dict(zip((layer.name for layer in spec.layers), layers, strict=True)),
                mask=sample.mask,
                view=sample.view,
            )
            bar.update()
    return featurestore.open(out)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse to replace an existing store unless asked, and to replace anything else.

    Raises
    ------
    ConfigError
        When ``out`` exists.
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


def describe(gan: Path) -> tuple[StoreSpec, bool]:
    """Describe the features that a generator makes.

    Returns
    -------
    spec
        Spec of generated features: its ``generator`` is the family and the weights' sha256.
    encodes
        Whether the generator was trained with an image encoder.

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
            "holds no generator; name a folder that train-gan wrote, "
            "or the gan/ folder of a jointly trained decoder",
        )
    made_by = f"{architecture['family']} {file_sha256(weights)}"
    height, width = spec.feature_shape[1:]
    shapes = [(count, height * factor, width * factor) for count, factor in spec.folds]
    spec = dataclasses.replace(
        spec,
        has_images=False,
        generator=made_by,
        layer_shapes=tuple(shapes) if spec.layer_names else (),  # coarse layers at the map's size
    )
    return spec, bool(architecture["image_encoder"])


def noise(z_dim: int, *, seed: int, id: str, view: str, number: int) -> Tensor:
    """Draw the noise of one sample, (1, z_dim) standard normal, a function of the arguments."""
    return torch.randn(1, z_dim, generator=_rng(seed, id, view, number, NOISE))


def _rng(seed: int, id: str, view: str, number: int, purpose: int) -> torch.Generator:
    name = int.from_bytes(hashlib.sha256(f"{view} {id}".encode()).digest(), "big")
    return random_generator(torch.device("cpu"), seed, name, number, purpose)


@dataclass(frozen=True)
class Sample:
    """The inputs of one generated sample."""

    id: str
    view: str
    image: np.ndarray | None  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) uint8
    z: Tensor  # (1, z_dim) standard normal


class Sampler:
    """A generator and the masks that it generates features for.

    Parameters
    ----------
    gan, generator
        Folder of the networks, and the generator, which moves to ``device``.
    source
        Masks; all are read once, to check them.
    new_masks, seed, device, workers
        See :func:`run`.

    Attributes
    ----------
    batch_size
        Samples that are generated at once.
    identity
        Everything that the features of a sample depend on, by name.

    Raises
    ------
    ConfigError, DataError
        When a network or a mask is damaged, or the masks have too few classes for a change.
    """

    def __init__(
        self,
        gan: Path,
        generator: FeatureGenerator,
        source: Masks,
        new_masks: Sequence[str],
        *,
        seed: int,
        device: str,
        workers: int,
    ) -> None:
        self._source, self._seed = source, seed
        self._device = make_accelerator(device, "no").device
        self.batch_size = BATCH[self._device.type]
        self._generator = to_channels_last(generator, self._device)
        self._encoder = load_gan(gan)[0].image_encoder if source.has_images else None
        if self._encoder is not None:
            self._encoder.to(self._device).eval()
        digests = prefetch(
            lambda position: _sha256(*source.read(position)),
            range(len(source)),
            workers=workers,
            ahead=8,
        )
        self._digests = list(progress(digests, "generate: checking", len(source), "mask"))
        self._changes = NewMasks(new_masks, source, np.arange(len(source))) if new_masks else None
        self.identity = {
            "format_version": featurestore.FORMAT_VERSION,
            "spec": source.spec.to_dict(),
            "encoder": file_sha256(gan / "image_encoder.safetensors") if self._encoder else "",
            "seed": seed,
            "new_masks": list(new_masks),
            "masks": list(zip(source.names, self._digests, strict=True)),
            "code": source_digest(
                sys.modules[__name__],
                stages.augment.new_masks,
                stages.backbones,
                stages.data.images,
                stages.use.mask_source,
                stages.models,
            ),
            "torch": torch.__version__,
            "device": self._device.type,
        }

    def samples(
        self, batches: Sequence[Sequence[tuple[int, int]]], *, workers: int
    ) -> Iterator[tuple[Sample, np.ndarray]]:
        """Generate batches of samples, each named by its mask's position and its number.

        ``workers`` threads read ahead. A CPU generates one sample a thread, with as many threads as
        PyTorch has: their number changes no bit, and none waits for another.

        Yields
        ------
        sample, features
            The inputs, and features (C, h, w) float32.
        """
        threads = torch.get_num_threads() if self._device.type == "cpu" else 0
        places = (place for batch in batches for place in batch)
        inputs = prefetch(self._read, places, workers=workers, ahead=2 * self.batch_size + 6)
        chunks = (list(itertools.islice(inputs, len(batch))) for batch in batches)
        one_thread = partial(torch.set_num_threads, 1)
        generated = prefetch(self._generate, chunks, workers=threads, initializer=one_thread)
        return itertools.chain.from_iterable(generated)

    def _read(self, place: tuple[int, int]) -> Sample:
        """Read a mask and change it.

        Raises
        ------
        DataError
            When the mask is not what was checked.
        """
        position, number = place
        id, view = self._source.names[position]
        image, mask = self._source.read(position)
        if _sha256(image, mask) != self._digests[position]:
            message = f"mask {id!r} changed while features were generated; start again"
            raise DataError(self._source.path, message)
        if self._changes is not None:
            rng = _rng(self._seed, id, view, number, CHANGES)
            mask = self._changes(torch.tensor(mask)[None], rng)[0].numpy()
        z = noise(self._generator.z_dim, seed=self._seed, id=id, view=view, number=number)
        return Sample(f"{id}-{number}", view, image, mask, z)

    @torch.no_grad()
    def _generate(self, samples: Sequence[Sample]) -> list[tuple[Sample, np.ndarray]]:
        """Generate the features of B samples, each (C, h, w) float32."""
        z = torch.cat([sample.z for sample in samples]).to(self._device)
        if self._encoder is not None:
            given = [sample.image for sample in samples if sample.image is not None]
            images = torch.from_numpy(np.stack(given)).permute(0, 3, 1, 2)  # -> (B, 3, H, W)
            mu, logvar = self._encoder(images.to(self._device))
            z = sample_z(mu, logvar, z)
        masks = torch.from_numpy(np.stack([sample.mask for sample in samples])).to(self._device)
        features = self._generator.generate(masks, z=z).cpu().numpy()
        return list(zip(samples, features, strict=True))


def _sha256(image: np.ndarray | None, mask: np.ndarray) -> str:
    return hashlib.sha256(mask.tobytes() + (b"" if image is None else image.tobytes())).hexdigest()
