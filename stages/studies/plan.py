"""Studies: experiments of many runs that survive any interruption, one small result file a run.

A study is a YAML file: a preset, what it changes of it, and experiments, each a list of variants trained with several
seeds. A run whose result file is there and was made with the same settings is not run again, so a study goes on where it
stopped, on any machine that has the files. :mod:`stages.studies.runner` makes the runs.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

import featurestore
from featurestore.files import file_sha256
from stages.common.config import Config, Once, Seed
from stages.common.errors import ConfigError, DataError

Labels = dict[str, str]  # what a row is called -> its variant in section ``variants``
Check = Callable[
    [Mapping[str, Any], str], Mapping[str, Any]
]  # plain parameters, and whose they are -> typed sections


class ExperimentConfig(Config):
    """Rows that are compared with each other, under settings of their own."""

    set: dict[str, Any] = Field(default_factory=dict)  # ``section.key: value`` of the parameters
    variants: Annotated[Labels, Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...] | None, Field(strict=False)] = None  # default: the study's

    @field_validator("variants", mode="before")
    @classmethod
    def _named(cls, variants: Any) -> Any:
        if not isinstance(variants, list):
            return variants
        if not all(isinstance(name, str) for name in variants):
            raise ValueError(
                "a list holds names of variants; rows of other names are a mapping of label: variant"
            )
        return {name: name for name in variants}


class StudyConfig(Config):
    """A study file."""

    preset: str
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1), Once]
    gan: Literal[
        "once", "per-seed"
    ]  # pretrained once, with its own seed, or once for each seed of the decoders
    experiments: Annotated[dict[str, ExperimentConfig], Field(min_length=1)]


def with_settings(params: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with ``section.key: value`` changed.

    Raises
    ------
    ConfigError
        For a key that is not there.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(params))
    for key, value in changes.items():
        *way, last = key.split(".")
        place: Any = changed
        for part in way:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict) or (last not in place and way[:1] != ["variants"]):
            raise ConfigError(
                key, "there is no such parameter; a study sets parameters that its preset has"
            )
        place[last] = value
    return changed


@dataclass(frozen=True)
class Run:
    """One decoder to train.

    Attributes
    ----------
    experiment, label, variant, seed
        Where it belongs, what its row is called, and what it trains.
    params
        All parameters, plain.
    protocol
        Digest of the settings that must be equal for two runs to be compared: data, features, the decoder's training.
    digests
        Of what the features, the GAN and the result depend on, by ``data``, ``gan`` and ``run``.
    needs_gan
        Whether a pretrained generator is read.
    """

    experiment: str
    label: str
    variant: str
    seed: int
    params: dict[str, Any]
    protocol: str
    digests: dict[str, str]
    needs_gan: bool

    def result(self, results: Path) -> Path:
        """Where its result file belongs."""
        return results / self.experiment / f"{self.label}-{self.seed}.json"

    def is_done(self, results: Path) -> bool:
        """Whether that file is there, of a run with the same settings.

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
    config: StudyConfig, preset: Mapping[str, Any], overrides: Mapping[str, Any], check: Check
) -> list[Run]:
    """All runs of a study: seed by seed, so that a study cut short has whole comparisons.

    Parameters
    ----------
    config
        The study.
    preset
        Plain parameters.
    overrides
        Settings of this machine, such as ``prepare.root``; all others change what is computed, and the results' digests with it.
    check
        Turns plain parameters into typed sections, or raises :class:`ConfigError`.

    Raises
    ------
    ConfigError
        For parameters that ``check`` refuses, a variant that is not described, weights that are not there, and a run that stands
        in two experiments.
    """
    runs = []
    for experiment, settings in config.experiments.items():
        params = with_settings(preset, {**config.set, **settings.set, **overrides})
        for variant in settings.variants.values():
            if variant not in params["variants"]:
                known = ", ".join(params["variants"])
                raise ConfigError(
                    f"study.experiments.{experiment}.variants",
                    f"{variant!r} is not described in variants ({known})",
                )
        params["prepare"]["root"] = str(
            Path(params["prepare"]["root"]).resolve()
        )  # stages run in folders of their own
        weights = params["extract"]["weights"]
        if weights != "default":
            if not Path(weights).is_file():
                raise ConfigError("extract.weights", f"there is no file {weights}", actual=weights)
            params["extract"]["weights"] = str(Path(weights).resolve())
        params["compare"] = {
            "variants": sorted(set(settings.variants.values())),
            "gan_variants": [],
            "seeds": list(settings.seeds or config.seeds),
        }
        sections = check(params, f"experiment {experiment}")
        for seed in settings.seeds or config.seeds:
            if config.gan == "per-seed":
                params = with_settings(params, {"train_gan.seed": seed})
            plain = {
                name: sections[name].model_dump(mode="json")
                for name in ("prepare", "extract", "train_decoder")
            }
            plain["prepare"].pop(
                "root"
            )  # where files lie does not matter; which data they are is in the result's protocol
            plain["prepare"]["classes"] = (
                plain["prepare"]["classes"] or {}
            )  # so that results made when it was a mapping stay valid
            if weights != "default":
                plain["extract"]["weights"] = file_sha256(Path(params["extract"]["weights"]))
            gan = {
                **sections["train_gan"].model_dump(mode="json"),
                "seed": params["train_gan"]["seed"],
            }
            digests = {"data": digest(plain["prepare"], plain["extract"])}
            digests["gan"] = digest(digests["data"], gan)
            for label, variant in settings.variants.items():
                chosen = sections["variants"][variant]
                described = chosen.model_dump(
                    mode="json", exclude_defaults=True
                )  # a key that is added with a default changes nothing
                of_run = digest(plain, described, seed, gan if chosen.needs_gan else None)
                where = (experiment, label, variant, seed)
                runs.append(
                    Run(*where, params, digest(plain), {**digests, "run": of_run}, chosen.needs_gan)
                )
    same = Counter(run.digests["run"] for run in runs)
    for run in runs:
        if same[run.digests["run"]] > 1:
            message = f"{run.label!r} with seed {run.seed} is the same run as another experiment's; leave it out of one of them"
            raise ConfigError(f"study.experiments.{run.experiment}.variants", message)
    order = {seed: number for number, seed in enumerate(config.seeds)}
    return sorted(runs, key=lambda run: order.get(run.seed, len(order)))


def digest(*values: Any) -> str:
    """Sixteen hexadecimal digits that differ when a value does."""
    return featurestore.fingerprint(values=values)[:16]
