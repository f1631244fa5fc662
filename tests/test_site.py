"""The site builds without a warning, and its reference pages describe everything."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest

import featurestore
from pipeline import main
from stages.augment.base import VariantConfig
from stages.augment.registry import AUGMENTERS, CombinedConfig
from stages.commands.params import Params
from stages.common.config import Config
from tests.imports import ROOT

OTHER_NAMES = [  # of docs/api.md, beside those of featurestore
    "featurestore.layers.Layer",
    "stages.models.decoder.Decoder",
    "stages.models.feature_generator.FeatureGenerator",
    "stages.training.load_decoder",
    "stages.training.load_generator",
    "stages.use.segmenter.Segmentation",
    "stages.use.segmenter.Segmenter",
    "stages.use.windows.View",
]


@pytest.fixture(scope="module")
def generated() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "generated.py"))


def keys(kind: type[Config], prefix: str) -> Iterator[tuple[str, str]]:
    """Name and description of every key of a section, and of the sections in it."""
    for key, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from keys(field.annotation, f"{prefix}{key}.")
        else:
            assert field.description, key
            yield prefix + key, field.description


def entries(text: str) -> dict[str, str]:
    """Text of every parameter by its name."""
    blocks = [block.split("```")[0] for block in text.split("```{confval} ")[1:]]
    return {name: rest for name, _, rest in (block.partition("\n") for block in blocks)}


def test_every_parameter_is_described(generated: dict[str, Any]) -> None:
    described = entries(generated["parameters"]())
    expected = dict(keys(VariantConfig, "variants.NAME."))
    for name, field in Params.model_fields.items():
        if name != "variants":
            expected |= dict(keys(field.annotation, f"{name}."))
    for kind in (*AUGMENTERS, CombinedConfig):
        (augmenter,) = get_args(kind.model_fields["augmenter"].annotation)
        for key in kind.model_fields.keys() - VariantConfig.model_fields.keys():
            expected[f"{key} ({augmenter})"] = kind.model_fields[key].description or ""
    assert len(expected) > 150
    assert described.keys() - expected.keys() == {"view (hflip-views)"}  # has fewer choices
    for name, description in expected.items():
        assert description in described[name], name
        assert ':type: "' in described[name], name
        assert ':default: "' in described[name], name


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("ratio (featuregan)", "integer, at least 1 and at most 16", "`1`"),
        ("of (combined)", "list of variants", "none; the key is required"),
        ("train_gan.noise", "one of `vector`, `spatial`", "`vector`"),
        ("train_gan.betas", "list of 2 numbers, at least 0 and below 1", "`[0.0, 0.9]`"),
        ("train_gan.diffaugment", "list of any of `flip`", "`[]`"),
        ("variants.NAME.width", "integer, at least 1 or `null`", "`null`"),
        ("prepare.fold", "string", '`\\"\\"`'),
        ("prepare.binary", "`true` or `false`", "`false`"),
    ],
)
def test_types_and_defaults_are_in_words(
    generated: dict[str, Any], name: str, kind: str, default: str
) -> None:
    entry = entries(generated["parameters"]())[name]
    assert f':type: "{kind}' in entry
    assert f':default: "{default}"' in entry


def test_presets_are_named_at_the_keys_that_they_change(generated: dict[str, Any]) -> None:
    entry = entries(generated["parameters"]())["prepare.dataset"]
    assert "In presets: `camvid-lite` `camvid`, `few-images-gpu` `auto`" in entry


def test_every_command_and_option_has_an_entry(generated: dict[str, Any]) -> None:
    sections = {
        name: rest
        for name, _, rest in (
            part.partition("`\n") for part in generated["commands"]().split("\n## `")[1:]
        )
    }
    assert list(sections) == list(main.commands)
    for name, command in main.commands.items():
        for parameter in command.params:
            option = isinstance(parameter, click.Option)
            shown = parameter.opts[0] if option else parameter.human_readable_name
            assert shown in sections[name], f"{name} {shown}"


def test_every_section_of_the_index_has_pages(generated: dict[str, Any]) -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    sidebar = generated["navigation"](index)
    for kind in ("Tutorials", "How-to", "Reference", "Explanation"):
        assert f':caption: "{kind}"' in sidebar
    assert sidebar.count(">\n") == index.count("\n- ")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    out = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--fresh-env", "--quiet"]
    done = subprocess.run(
        [*command, "-c", "docs", ".", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert 'url=docs/index.html"' in (out / "index.html").read_text(encoding="utf-8")
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (out / "docs").glob("*.html")}
    for name in [*(f"featurestore.{public}" for public in featurestore.__all__), *OTHER_NAMES]:
        assert f'id="{name}"' in pages["api"], name
    assert 'id="confval-train_gan.frozen_epochs"' in pages["parameters"]
    assert 'id="cmdoption-train-decoder-variant"' in pages["commands"]
