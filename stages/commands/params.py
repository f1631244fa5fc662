"""All parameters as one typed object, and the params.yaml that describes it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import Field, TypeAdapter, model_validator
from ruamel.yaml import YAML
from typing_extensions import Self

from stages.augment.base import VariantConfig
from stages.augment.registry import VARIANTS, Variant, check_variant
from stages.common.config import Config, Plain, parse, read_params, with_settings
from stages.common.errors import ConfigError
from stages.common.runtime import check_batch_divides
from stages.datasets.config import PrepareConfig
from stages.extract import ExtractConfig, check_spec
from stages.gan.monitor import MonitorConfig
from stages.report import CompareConfig, ReportConfig
from stages.segmentation import transforms
from stages.train_decoder import TrainDecoderConfig
from stages.train_gan import TrainGanConfig

WIDTH, COMMENTS = 100, 36  # columns of params.yaml, and where its comments begin
GENERATED = {"augmenter": "featuregan", "statistics": "real"}
SAMPLES = 300  # that an epoch reads at least, by repeating few images
READ = {  # what the variants of each list of section compare read
    "variants": "features only",
    "unlabelled_variants": "features/unlabelled",
    "gan_variants": "models/gan",
}
DEFAULT_VARIANTS = VARIANTS.validate_python(
    {
        "baseline": {"augmenter": "none"},
        "duplicate": {"augmenter": "duplicate"},
        "perturbed": {"augmenter": "none", "augment": transforms.USUAL},
        "class-transfer-perturbed": {
            "augmenter": "class-transfer",
            "augment": transforms.USUAL,
            "statistics": "real",
        },
        "featuregan-1x": GENERATED,
        "featuregan-2x": {**GENERATED, "ratio": 2},
        "featuregan-frozen": {**GENERATED, "generator": "frozen"},
        "featuregan-edited": {
            **GENERATED,
            "generator": "frozen",
            "new_masks": ["swap"],
            "class_swap": True,
        },
    }
)


class Params(Config):
    """Everything that params.yaml says; sections in the order of the file."""

    prepare: PrepareConfig = Field(PrepareConfig(), description="images and masks")
    extract: ExtractConfig = Field(ExtractConfig(), description="frozen backbone and its features")
    train_gan: TrainGanConfig = Field(TrainGanConfig(), description="FeatureGAN, before decoders")
    monitor: MonitorConfig = Field(MonitorConfig(), description="measures the GAN on masks of val")
    train_decoder: TrainDecoderConfig = Field(
        TrainDecoderConfig(), description="what all decoders have in common"
    )
    variants: dict[str, Variant] = Field(
        DEFAULT_VARIANTS, description="augmenters with their settings: docs/augmenters.md"
    )
    compare: CompareConfig = Field(CompareConfig(), description="decoders that `dvc repro` trains")
    report: ReportConfig = Field(ReportConfig(), description="tables and figures")

    @property
    def compared(self) -> dict[str, VariantConfig]:
        """The variants that are compared, in the order of tables."""
        return {name: self.variants[name] for name in self.compare.names}

    def plain(self) -> Plain:
        """Return the values as params.yaml holds them; variants without keys at their default."""
        variants = {
            name: variant.model_dump(mode="json", exclude_defaults=True)
            for name, variant in self.variants.items()
        }
        return {**self.model_dump(mode="json"), "variants": variants}

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        """Check settings of several sections against each other."""
        self._check_names()
        self._check_generator()
        self._check_layers()
        for key in ("train_gan", "train_decoder"):
            training = getattr(self, key)
            check_batch_divides(
                training.batch_size, 1, training.gradient_accumulation, f"{key}.batch_size"
            )
        if (reader := self.train_gan.reads_images) and not self.extract.store_images:
            message = f"train_gan.{reader} reads the images; set it to true"
            raise ConfigError("extract.store_images", message)
        self._check_trained_backbones()
        for name in self.compared:
            self.check_views(name)
        return self

    def check_views(self, name: str) -> None:
        """Refuse a variant that reads views which are not extracted.

        Raises
        ------
        ConfigError
            When ``extract.views`` lacks them.
        """
        variant, views = self.variants[name], self.extract.views
        if variant.needs_mirrored and "hflip" not in views:
            message = f"variant {name!r} adds mirrored images; add hflip to this list"
            raise ConfigError("extract.views", message)
        if variant.view == "random" and len(views) == 1:
            message = (
                f"variant {name!r} draws among the views of an image; add hflip, rotate, crop,"
                " colour or random-K to this list"
            )
            raise ConfigError("extract.views", message)

    def _check_trained_backbones(self) -> None:
        """Refuse compared variants that do not work with a trained backbone."""
        for name, variant in self.compared.items():
            if (variant.backbone or self.train_decoder.backbone) == "frozen":
                continue
            if not self.extract.store_images:
                message = f"variant {name!r} trains the backbone on the images; set it to true"
                raise ConfigError("extract.store_images", message)
            check_variant(variant, name)

    def _check_names(self) -> None:
        """Refuse a compared variant without description, or in the wrong list."""
        for key in ("variants", "unlabelled_variants", "gan_variants"):
            for name in getattr(self.compare, key):
                if name not in self.variants:
                    known = ", ".join(self.variants)
                    message = f"{name!r} is not described in variants ({known})"
                    raise ConfigError(f"compare.{key}", message)
                if (listed := self.variants[name].listed) != key:
                    message = f"{name!r} reads {READ[listed]}; move it to compare.{listed}"
                    raise ConfigError(f"compare.{key}", message)

    def _check_generator(self) -> None:
        """Refuse compared variants that do not work with the generator of ``train_gan``."""
        gan = self.train_gan
        penalized = gan.r1_gamma or gan.adversarial_loss == "wasserstein-gp"
        for name, variant in self.compared.items():
            if (families := variant.needs_family) and gan.family not in families:
                known = " or ".join(families)
                message = f"variant {name!r} works only with {known}; set it to {families[0]}"
                raise ConfigError("train_gan.family", message)
            if gan.family != "flow" and not gan.z_dim and _draws(variant) > 1:
                message = (
                    "without noise all draws of a mask are equal; "
                    "set it to 1, or train_gan.z_dim above 0"
                )
                raise ConfigError(f"variants.{name}.ratio", message)
            if (
                getattr(variant, "generator", None) == "joint"
                and penalized
                and self.train_decoder.mixed_precision == "fp16"
            ):
                message = (
                    "fp16 does not go together with r1_gamma or adversarial_loss wasserstein-gp, "
                    f"and {name!r} trains the GAN; use bf16 or 'no'"
                )
                raise ConfigError("train_decoder.mixed_precision", message)

    def _check_layers(self) -> None:
        """Refuse layers that are not extracted, and decoders that read others than their GAN."""
        stored = self.extract.layers
        selections = {
            "train_gan.layers": self.train_gan.layers,
            "train_decoder.layers": self.train_decoder.layers,
            **{
                f"variants.{name}.layers": each.layers or () for name, each in self.compared.items()
            },
        }
        for key, layers in selections.items():
            if missing := [layer for layer in layers if layer not in stored]:
                known = ", ".join(stored) or "the last layer, without a name"
                message = f"{missing[0]!r} is not stored; extract.layers stores {known}"
                raise ConfigError(key, message)
        generated = self.train_gan.layers or stored
        for name, variant in self.compared.items():
            read = self.train_decoder.layers if variant.layers is None else variant.layers
            if variant.needs_gan and set(read or stored) != set(generated):
                message = (
                    f"variant {name!r} reads {', '.join(read or stored)}, and the GAN generates"
                    f" {', '.join(generated)}; both must be the same layers"
                )
                raise ConfigError("train_gan.layers", message)

    def check_classes(self, classes: Sequence[str]) -> None:
        """Refuse parameters that do not fit the classes of a data set.

        Raises
        ------
        ConfigError
            For a headline class that is none of them; for a variant that needs more classes.
        """
        for name in self.report.headline_classes:
            if name not in classes:
                message = f"{name!r} is no class of this data set ({', '.join(classes)})"
                raise ConfigError("report.headline_classes", message)
        for name, variant in self.compared.items():
            if len(classes) < variant.needs_classes:
                key = f"compare.{variant.listed}"
                message = (
                    f"variant {name!r} needs {variant.needs_classes} classes, background included, "
                    f"found {len(classes)}; remove it"
                )
                raise ConfigError(key, message)

    def check_features(self, features: Path, splits: Sequence[str]) -> None:
        """Refuse stores that do not fit the parameters, before a training reads them.

        Raises
        ------
        ConfigError
            As :meth:`check_classes` says.
        FeatureStoreError
            When a store is missing or damaged, or was extracted with other parameters.
        """
        for split in splits:
            self.check_classes(check_spec(self.extract, features / split).class_names)


def _draws(variant: VariantConfig) -> int:
    """Return how many generated samples of one mask a variant adds."""
    members = getattr(variant, "of", (variant,))
    return max((getattr(member, "ratio", 1) for member in members if member.needs_gan), default=1)


PARAMS = TypeAdapter(Params)


def fitting_repeats(images: int) -> int:
    """Return the repeats of so many training images that make epochs of at least 300 samples."""
    return max(1, math.ceil(SAMPLES / images))


def read_preset(path: Path) -> Params:
    """Read a preset: the defaults, changed by a file of ``section.key: value``."""
    return parse(PARAMS, with_settings(Params().plain(), read_params(path)))


def as_yaml(params: Params, title: str) -> str:
    """Return parameters as the text of a params.yaml, commented with descriptions and choices."""
    lines = [title]
    for name, values in params.plain().items():
        section, field = getattr(params, name), Params.model_fields[name]
        lines += ["", *_commented(f"{name}:", field.description or "")]
        if isinstance(section, Config):
            lines += _section(type(section), values, "  ")
        else:
            lines += [line for key, entry in values.items() for line in _entry(key, entry, "  ")]
    return "\n".join(lines) + "\n"


def _section(kind: type[Config], values: Plain, indent: str) -> list[str]:
    """Return one line for each key, with its description."""
    lines: list[str] = []
    for key, field in kind.model_fields.items():
        choices = " | ".join(map(str, _choices(field.annotation)))
        comment = "; ".join(filter(None, [choices, field.description]))
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            lines += _commented(f"{indent}{key}:", comment)
            lines += _section(field.annotation, values[key], f"{indent}  ")
        else:
            first, *more = _entry(key, values[key], indent)
            lines += [*_commented(first, comment), *more]
    return lines


def _choices(kind: object) -> tuple[object, ...]:
    """Return the values that a type allows, where it lists them."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(choice for inner in get_args(kind) for choice in _choices(inner))


def _commented(text: str, comment: str) -> list[str]:
    """Put a comment beside a line, continued below it; above it where the line is long."""
    lines = textwrap.wrap(comment, WIDTH - COMMENTS - 2, break_on_hyphens=False)
    if len(text) >= COMMENTS:
        indent = text[: len(text) - len(text.lstrip())]
        return [*(f"{indent}# {line}" for line in lines), text]
    return [
        f"{begin:{COMMENTS}}# {line}" for begin, line in zip_longest([text], lines, fillvalue="")
    ]


def _entry(key: str, value: object, indent: str) -> list[str]:
    """Return ``key: value`` on one line, or on several where one is too long."""
    line = f"{indent}{key}: {_yaml(value, flow=True)}"
    block = textwrap.indent(_yaml({key: value}, flow=None), indent).splitlines()
    return [line] if len(line) <= WIDTH else block


def _yaml(value: object, *, flow: bool | None) -> str:
    """Return YAML that versions 1.1 and 1.2 read alike; ``flow`` None: nested values as blocks."""
    writer, text = YAML(), StringIO()
    writer.version, writer.default_flow_style, writer.width = (1, 1), flow, 1000
    writer.dump(value, text)
    return text.getvalue().partition("---")[2].removesuffix("...\n").strip()
