"""Studies: experiments of many runs that survive any interruption, one small result file a run.

A study is a YAML file: a preset, its changes, and experiments, each a list of variants trained with
several seeds. A run with a result file of equal settings is not run again: a study resumes where it
stopped, on any machine that has the files. :mod:`stages.studies.runner` makes the runs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

import featurestore
from featurestore.files import file_sha256
from stages.augment.registry import VARIANTS
from stages.common.config import Config, Listed, Once, Plain, Seed, parse, with_settings
from stages.common.errors import ConfigError, DataError

Labels = dict[str, str]  # what a row is called -> its variant in section ``variants``
Check = Callable[[Plain], Config]  # plain parameters -> typed ones


class ExperimentConfig(Config):
    """Rows that are compared with each other, and the settings that they change."""

    set: Plain = Field({}, description="section.key: value of the parameters")
    variants: Annotated[Labels, Field(min_length=1)] = Field(
        description="names of variants, or label: name"
    )
    seeds: Annotated[tuple[Seed, ...] | None, Listed] = Field(
        None, description="default: the study's"
    )

    @field_validator("variants", mode="before")
    @classmethod
    def _named(cls, variants: object) -> object:
        if not isinstance(variants, list):
            return variants
        if not all(isinstance(name, str) for name in variants):
            message = "a list holds names of variants; rows of other names are label: variant"
            raise ValueError(message)
        return {name: name for name in variants}


class StudyConfig(Config):
    """Configure a study: experiments, their variants and seeds."""

    preset: str = Field(description="parameters that `set` changes")
    set: Plain = Field({}, description="section.key: value of the parameters")
    seeds: Annotated[tuple[Seed, ...], Listed, Field(min_length=1), Once] = Field(
        (0, 1, 2), description="seeds of the decoders"
    )
    gan: Literal["once", "per-seed"] = Field(
        "once", description="a GAN with train_gan.seed, or one for each seed of the decoders"
    )
    experiments: Annotated[dict[str, ExperimentConfig], Field(min_length=1)] = Field(
        description="rows that are compared with each other, by name"
    )


@dataclass(frozen=True)
class Run:
    """One decoder to train.

    Attributes
    ----------
    experiment, label, variant, seed
        Experiment, name of the row, name in section ``variants``, and seed.
    params
        All parameters, plain.
    protocol
        Digest of the settings that two compared runs share: data, features, training of decoders.
    digests
        Digests of the settings of the features, the GAN and the result: ``data``, ``gan``, ``run``.
    needs_gan
        Whether the run reads a pretrained generator.
    """

    experiment: str
    label: str
    variant: str
    seed: int
    params: Plain
    protocol: str
    digests: dict[str, str]
    needs_gan: bool

    @property
    def name(self) -> str:
        """Path of the result file in the study's folder, without its suffix."""
        return f"{self.experiment}/{self.label}-{self.seed}"

    def result(self, results: Path) -> Path:
        """Return the path of the result file."""
        return results / f"{self.name}.json"

    def is_done(self, results: Path) -> bool:
        """Return whether there is a result file of equal settings.

        Raises
        ------
        DataError
            When the file is no result.
        """
        path = self.result(results)
        try:
            return bool(
                json.loads(path.read_text(encoding="utf-8"))["digest"] == self.digests["run"]
            )
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                path, f"is no result of a study ({error!r}); remove it, and its run is repeated"
            ) from error


def plan(
    config: StudyConfig, preset: Plain, overrides: Mapping[str, object], check: Check
) -> list[Run]:
    """Return all runs of a study, seed by seed: a study cut short has whole comparisons.

    Parameters
    ----------
    config
        The study.
    preset
        Plain parameters.
    overrides
        Settings of this machine, such as ``prepare.root``; all others change results and digests.
    check
        Turns plain parameters into typed ones, or raises :class:`ConfigError`.

    Raises
    ------
    ConfigError
        For parameters that ``check`` refuses, a variant that is not described, weights that are not
        there, and a run that two experiments share.
    """
    runs = []
    for experiment, settings in config.experiments.items():
        plain = with_settings(preset, {**config.set, **settings.set, **overrides})
        described = parse(VARIANTS, plain["variants"], "variants")
        labels, seeds = settings.variants, settings.seeds or config.seeds
        for variant in labels.values():
            if variant not in described:
                message = f"{variant!r} is not described in variants ({', '.join(described)})"
                raise ConfigError(f"study.experiments.{experiment}.variants", message)
        plain["compare"] = {"seeds": list(seeds)}
        for key in ("variants", "unlabelled_variants", "gan_variants"):
            chosen = {name for name in labels.values() if described[name].listed == key}
            plain["compare"][key] = sorted(chosen)
        weights = _resolve_paths(plain)
        for seed in seeds:
            if config.gan == "per-seed":
                plain = with_settings(plain, {"train_gan.seed": seed})
            # Only what differs from the defaults: a key that is added later changes no digest.
            changed = check(plain).model_dump(mode="json", exclude_defaults=True)
            names = ("prepare", "extract", "train_decoder")
            protocol = {name: changed.get(name, {}) for name in names}
            protocol["prepare"].pop("root", None)  # results depend on the files, not on their place
            protocol["extract"].update(weights)
            gan = changed.get("train_gan", {})
            digests = {"data": digest(protocol["prepare"], protocol["extract"])}
            digests["gan"] = digest(digests["data"], gan)
            for label, variant in labels.items():
                chosen_variant = described[variant]
                needs_gan = chosen_variant.needs_gan
                of_variant = chosen_variant.model_dump(mode="json", exclude_defaults=True)
                digests["run"] = digest(protocol, of_variant, seed, gan if needs_gan else None)
                where = (experiment, label, variant, seed)
                runs.append(Run(*where, plain, digest(protocol), {**digests}, needs_gan))
    same = Counter(run.digests["run"] for run in runs)
    for run in runs:
        if same[run.digests["run"]] > 1:
            message = (
                f"{run.label!r} with seed {run.seed} is the same run as another experiment's; "
                "leave it out of one of them"
            )
            raise ConfigError(f"study.experiments.{run.experiment}.variants", message)
    order = {seed: number for number, seed in enumerate(config.seeds)}
    return sorted(runs, key=lambda run: order.get(run.seed, len(order)))


def _resolve_paths(plain: Plain) -> dict[str, str]:
    """Make paths absolute, because stages run in other folders; return the digest of the weights.

    Raises
    ------
    ConfigError
        When there is no file of weights.
    """
    plain["prepare"]["root"] = str(Path(plain["prepare"]["root"]).resolve())
    weights = Path(plain["extract"]["weights"])
    if str(weights) == "default":
        return {}
    if not weights.is_file():
        raise ConfigError("extract.weights", f"there is no file {weights}", actual=str(weights))
    plain["extract"]["weights"] = str(weights.resolve())
    return {"weights": file_sha256(weights)}


def digest(*values: object) -> str:
    """Return sixteen hexadecimal digits that differ when a value does."""
    return featurestore.fingerprint(values=values)[:16]
