"""The command line: instant help, one clear line for every mistake, the right exit codes."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from stages.commands.options import load_params, load_preset, presets
from stages.commands.params import PARAMS, as_yaml
from stages.common.config import parse, read_params
from stages.datasets.config import PrepareConfig
from stages.extract import ExtractConfig
from stages.gan.monitor import MonitorConfig
from stages.train_decoder import TrainDecoderConfig
from stages.train_gan import TrainGanConfig
from tests.factories import LAYERED, call, flat, one_line, tiny_params
from tests.imports import ROOT

PRESETS = presets()
COMMANDS = (
    "init",
    "prepare",
    "extract",
    "train-gan",
    "train-decoder",
    "report",
    "doctor",
    "predict",
    "evaluate",
    "generate",
    "export",
    "inspect",
    "verify",
    "estimate",
)


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tiny parameters, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(tiny_params())
    return tmp_path / "params.yaml"


def change(path: Path, changes: dict[str, object]) -> None:
    """Set ``section.key`` of a parameters' file, whether the key is known or not."""
    values = read_params(path)
    for key, value in changes.items():
        *way, last = key.split(".")
        place = values
        for name in way:
            place = place[name]
        place[last] = value
    YAML(typ="safe", pure=True).dump(values, path)


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)])
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    code = (
        "import sys, pipeline\n"
        f"try: pipeline.main([*{command!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pandas', 'h5py', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage:")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_keeps_its_tables(command: str) -> None:
    """Click reads a backspace as the start of lines that it must not wrap."""
    assert "\\b" not in call(*filter(None, [command]), "--help").output


def test_the_list_of_stages_has_a_line_each() -> None:
    lines = call("--help").output.splitlines()
    assert "    prepare        images and masks             -> dataset/" in lines


def test_help_names_stages_options_and_environment_variables() -> None:
    assert all(command in call("--help").output for command in COMMANDS)
    text = call("train-gan", "--help").output
    for words in (
        "[auto|cpu|cuda]",
        "FEATUREGAN_DEVICE",
        "FEATUREGAN_WORKERS",
        "FEATUREGAN_SCRATCH",
        "x>=0",
    ):
        assert words in text
    assert "featuregan 0." in call("--version").output


@pytest.mark.medium
def test_init_lists_and_writes_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = call("init", "--list").output.splitlines()
    assert [line.split()[0] for line in listed] == list(PRESETS)
    for preset, line in zip(PRESETS, listed, strict=True):
        assert call("init", preset, "--force").exit_code == 0
        assert load_params(Path("params.yaml")) == load_preset(preset)
        assert Path("params.yaml").read_text().splitlines()[0] == f"# {line[16:].strip()}"
    changed = Path("params.yaml").read_text() + "# mine\n"
    Path("params.yaml").write_text(changed)
    assert "the old one is params.yaml.bak" in call("init", "quickstart", "--force").output
    assert Path("params.yaml.bak").read_text() == changed
    for preset in ("voc2012-lite", "quickstart"):  # a written preset must not replace the backup
        assert "old" not in call("init", preset, "--force").output
    assert Path("params.yaml.bak").read_text() == changed
    assert call("init", "quickstart", "--params", "elsewhere/mine.yaml").exit_code == 0
    assert load_params(Path("elsewhere/mine.yaml"))
    refused = call("init", "quickstart")
    assert refused.exit_code == 2
    assert "--force" in one_line(refused)
    assert "choose from" in one_line(call("init", "nonsense", "--force"))
    assert "next: set prepare.root in params.yaml" in call("init", "few-images", "--force").output
    (tmp_path / "photos").mkdir()
    written = call("init", "few-images", "--force", "--root", "photos").output
    assert "next: `dvc repro`" in written
    params = load_params(Path("params.yaml"))
    assert (params.prepare.root, params.prepare.unlabelled) == ("photos", "")
    (tmp_path / "photos" / "unlabelled").mkdir()
    for preset, students in (("few-images", ("self-training",)), ("voc2012-lite", ())):
        call("init", preset, "--force", "--root", "photos")
        params = load_params(Path("params.yaml"))
        assert params.prepare.unlabelled == "unlabelled"
        assert params.compare.unlabelled_variants == students


def test_params_yaml_is_what_init_writes(tmp_path: Path) -> None:
    written = tmp_path / "params.yaml"
    assert call("init", "quickstart", "--params", str(written)).exit_code == 0
    assert (ROOT / "params.yaml").read_text() == written.read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_written_file_reads_back_and_explains_every_key(preset: str) -> None:
    params = load_preset(preset)
    text = as_yaml(params, "# title")
    for typ in ("safe", "rt"):  # C loader of YAML 1.1, as DVC reads it, and YAML 1.2
        values = YAML(typ=typ).load(text)
        assert parse(PARAMS, json.loads(json.dumps(values))) == params
    assert max(map(len, text.splitlines())) <= 100
    keys = [line for line in text.splitlines() if re.match(r"  (?!variants)\w+:", line)]
    described = [line for line in keys if "#" in line]
    assert len(described) > 80
    for section in (PrepareConfig, ExtractConfig, TrainGanConfig, TrainDecoderConfig):
        assert all(field.description for field in section.model_fields.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_short_and_is_what_it_was(preset: str) -> None:
    """The snapshot was taken when each preset was a whole file."""
    lines = PRESETS[preset].read_text().splitlines()
    assert len(lines) <= 60
    assert lines[0].startswith("# ")
    assert len(lines[0]) <= 100
    kept = json.loads((ROOT / "tests/data/presets.json").read_text())[preset]
    params = load_preset(preset)
    assert flat(params.model_dump(mode="json", exclude={"variants"})) == kept["settings"]
    described = params.variants.items()
    variants = {name: each.model_dump(mode="json", exclude_none=True) for name, each in described}
    assert variants == kept["variants"]


def test_the_thesis_preset_has_the_thesis_figures() -> None:
    params = load_preset("voc2012-thesis")
    gan, decoder = params.train_gan, params.train_decoder
    assert (gan.frozen_epochs, gan.batch_size) == (75, 32)
    assert (gan.lambda_feat, gan.lambda_kld) == (7.0, 0.05)
    assert (gan.generator_lr, gan.discriminator_lr, gan.betas) == (2e-4, 8e-4, (0.0, 0.9))
    assert (gan.z_dim, gan.ngf, gan.spade_hidden) == (256, 64, 128)
    assert (gan.adversarial_loss, gan.image_encoder) == ("hinge", False)
    assert (decoder.lr, decoder.batch_size, decoder.width) == (5e-4, 32, 256)
    assert (params.extract.backbone, params.extract.input_size) == ("resnet101", (256, 256))
    assert (params.prepare.split, params.prepare.ratios) == ("random", (0.7, 0.15, 0.15))
    assert [params.variants[f"featuregan-{ratio}x"].ratio for ratio in (1, 2)] == [1, 2]


FROZEN = {"augmenter": "featuregan", "generator": "frozen"}
BAD_PARAMETERS: dict[str, tuple[dict[str, object], str]] = {
    "an unknown key": (
        {"train_gan.z_dims": 8},
        "train_gan.z_dims: unknown key; did you mean z_dim?",
    ),
    "an unknown section": ({"raport": {}}, "raport: unknown key; did you mean report?"),
    "a wrong type": (
        {"train_gan.z_dim": "8"},
        "train_gan.z_dim: input should be a valid integer, found '8'",
    ),
    "a section that is no section": ({"report": None}, "report: input should be a valid dict"),
    "several wrong keys": (
        {"train_gan.z_dim": "8", "train_gan.ngf": 0},
        "train_gan.z_dim: input should be a valid integer, found '8' (and 1 more wrong keys)",
    ),
    "a value out of range": (
        {"train_gan.lambda_feat": -1.0},
        "train_gan.lambda_feat: input should be greater than or equal to 0",
    ),
    "a choice that does not exist": (
        {"train_gan.norm": "layer"},
        "train_gan.norm: input should be 'batch' or 'instance', found 'layer'",
    ),
    "ratios that do not add up": (
        {"prepare.ratios": [0.7, 0.2, 0.15]},
        "prepare: ratios must add up to 1",
    ),
    "a variant whose GAN is not trained": (
        {"compare.generators": []},
        "compare: featuregan-1x reads models/gan; set generators to [gan], or empty gan_variants",
    ),
    "an unknown variant": (
        {"compare.gan_variants": ["featuregan-3x"]},
        "compare.gan_variants: 'featuregan-3x' is not described in variants (baseline",
    ),
    "nothing to compare": (
        {"compare.variants": [], "compare.gan_variants": []},
        "compare: all lists of variants are empty; name at least one variant",
    ),
    "a variant with a GAN among those without": (
        {"compare.variants": ["baseline", "featuregan-1x"]},
        "compare.variants: 'featuregan-1x' reads models/gan; move it to compare.gan_variants",
    ),
    "a variant without a GAN among those with one": (
        {"compare.gan_variants": ["featuregan-1x", "perturbed"]},
        "compare.gan_variants: 'perturbed' reads features only; move it to compare.variants",
    ),
    "mirrored images that nobody extracts": (
        {
            "compare.variants": ["mirrored"],
            "variants.mirrored": {"augmenter": "none", "view": "random"},
        },
        "extract.views: variant 'mirrored' draws among the views of an image; add hflip, rotate,",
    ),
    "added mirrored images that nobody extracts": (
        {
            "extract.views": ["identity", "random-2"],
            "compare.variants": ["mirrored"],
            "variants.mirrored": {"augmenter": "hflip-views"},
        },
        "extract.views: variant 'mirrored' adds mirrored images; add hflip to this list",
    ),
    "no random views": (
        {"extract.views": ["identity", "random-0"]},
        "extract.views.1: should be identity, hflip, rotate, crop, colour or random-K with K from",
    ),
    "mirrored images alone": (
        {"extract.views": ["hflip"]},
        "extract.views: must contain identity",
    ),
    "several draws without noise": (
        {"train_gan.z_dim": 0},
        "variants.featuregan-2x.ratio: without noise all draws of a mask are equal",
    ),
    "noise at every pixel that has no channels": (
        {"train_gan.z_dim": 0, "train_gan.noise": "spatial"},
        "train_gan: spatial noise is z at every pixel; set z_dim above 0",
    ),
    "a transform that is listed twice": (
        {"variants.perturbed.augment": ["flip", "flip"]},
        "variants.perturbed.augment: flip is listed twice",
    ),
    "a seed that is listed twice": (
        {"compare.seeds": [0, 0]},
        "compare.seeds: 0 is listed twice",
    ),
    "an unknown augmenter": (
        {"variants.mine": {"augmenter": "idsa"}},
        "variants.mine.augmenter: should be 'none', 'duplicate'",
    ),
    "no augmenter": (
        {"variants.mine": {"strength": 2.5}},
        "variants.mine.augmenter: this key is missing",
    ),
    "a key that an augmenter has not": (
        {"variants.isda": {"augmenter": "isda", "strenght": 2.5}},
        "variants.isda.strenght: unknown key; did you mean strength?",
    ),
    "a key of one of several combined augmenters": (
        {
            "variants.isda": {
                "augmenter": "combined",
                "of": [{"augmenter": "noise"}, {"augmenter": "isda", "strenght": 2.5}],
            }
        },
        "variants.isda.of.1.strenght: unknown key; did you mean strength?",
    ),
    "a value of one of several combined augmenters": (
        {
            "variants.isda": {
                "augmenter": "combined",
                "of": [{"augmenter": "noise"}, {"augmenter": "isda", "strength": -1.0}],
            }
        },
        "variants.isda.of.1.strength: input should be greater than 0",
    ),
    "an augmenter's keys that do not fit together": (
        {"variants.mine": {"augmenter": "featuregan", "new_masks": ["flip"]}},
        "variants.mine: new_masks have no real features",
    ),
    "a class swap that would move real features": (
        {"variants.featuregan-edited.new_masks": ["swap", "flip"]},
        "variants.featuregan-edited: class_swap needs generator: frozen and only paste or swap in",
    ),
    "a fraction of no masks": (
        {"variants.mine": {**FROZEN, "fraction": 0.5, "vary": 0.5}},
        "variants.mine: fraction needs new_masks; list a change or remove fraction",
    ),
    "variations by a GAN": (
        {"compare.gan_variants": ["mine"], "variants.mine": {**FROZEN, "vary": 0.5}},
        "train_gan.family: variant 'mine' works only with flow; set it to flow",
    ),
    "a flow trained jointly": (
        {"train_gan.family": "flow"},
        "train_gan.family: variant 'featuregan-1x' works only with gan or image; set it",
    ),
    "several class swaps of one image by a flow": (
        {
            "train_gan.family": "flow",
            "compare.gan_variants": ["featuregan-edited"],
            "variants.featuregan-edited.ratio": 2,
        },
        "train_gan.family: variant 'featuregan-edited' works only with gan or image; set it",
    ),
    "a discriminator's keys with a flow": (
        {"train_gan.family": "flow", "train_gan.diffaugment": ["flip"]},
        "train_gan: image_encoder, r1_gamma",
    ),
    "a generator of images without images": (
        {"train_gan.family": "image", "extract.store_images": False, "train_gan.prior": "none"},
        "extract.store_images: train_gan.family image reads the images; set it to true",
    ),
    "variations by a generator of images": (
        {
            "train_gan.family": "image",
            "train_gan.prior": "none",
            "compare.gan_variants": ["mine"],
            "variants.mine": {**FROZEN, "vary": 0.5},
        },
        "train_gan.family: variant 'mine' works only with flow; set it to flow",
    ),
    "several draws of an image without noise": (
        {"train_gan.family": "image", "train_gan.prior": "none", "train_gan.z_dim": 0},
        "variants.featuregan-2x.ratio: without noise all draws of a mask are equal",
    ),
    "class means behind a generator of images": (
        {"train_gan.family": "image", "train_gan.prior": "class-means"},
        "train_gan: prior class-means does not work with family image; set it to none, or family",
    ),
    "a flow without SPADE": (
        {
            "train_gan.family": "flow",
            "train_gan.conditioning": "concat",
            "compare.gan_variants": ["featuregan-frozen"],
        },
        "train_gan: family flow does not work with conditioning concat; set it to gan, or",
    ),
    "noise at every pixel without SPADE": (
        {
            "train_gan.noise": "spatial",
            "train_gan.conditioning": "concat",
            "train_gan.prior": "none",
        },
        "train_gan: noise spatial does not work with conditioning concat; set it to vector, or",
    ),
    "variations that would move real features": (
        {"variants.mine": {**FROZEN, "new_masks": ["flip"], "vary": 0.5}},
        "variants.mine: vary needs generator: frozen, no class_swap, and no new_masks but paste",
    ),
    "an image encoder without images": (
        {"train_gan.image_encoder": True, "extract.store_images": False},
        "extract.store_images: train_gan.image_encoder reads the images; set it to true",
    ),
    "fp16 where a gradient is penalized": (
        {"train_gan.r1_gamma": 1.0, "train_decoder.mixed_precision": "fp16"},
        "train_decoder.mixed_precision: fp16 does not go together with r1_gamma or",
    ),
    "an unknown backbone": (
        {"extract.backbone": "resnet1001"},
        "extract.backbone: unknown backbone",
    ),
    "a layer that is not stored": (
        {"train_decoder.layers": ["blocks.2"]},
        "train_decoder.layers: 'blocks.2' is not stored; extract.layers stores the last layer",
    ),
    "an input size too small for the discriminator": (
        {"extract.input_size": [64, 32]},
        "extract.input_size.1: input should be greater",
    ),
    "an infinite number": (
        {"train_gan.lambda_feat": math.inf},
        "train_gan.lambda_feat: input should be a finite number",
    ),
    "a batch of one": (
        {"train_decoder.batch_size": 1},
        "train_decoder.batch_size: input should be greater than or equal to 2",
    ),
    "micro-batches that are not equal": (
        {"train_decoder.gradient_accumulation": 3},
        "train_decoder.batch_size: 4 samples do not divide into 1 processes times 3 micro-batches",
    ),
}


@pytest.mark.parametrize("case", BAD_PARAMETERS)
@pytest.mark.parametrize("command", ["prepare", "extract"])
def test_bad_parameters_stop_every_stage_before_it_starts(
    params: Path, command: str, case: str
) -> None:
    changes, words = BAD_PARAMETERS[case]
    change(params, changes)
    result = call(command)
    assert result.exit_code == 2
    assert words in one_line(result)
    assert not Path("dataset").exists()


def test_a_variant_outside_of_compare_is_refused_before_its_features_are_read(params: Path) -> None:
    change(params, {"variants.mirrored": {"augmenter": "none", "view": "random"}})
    result = call("train-decoder", "--variant", "mirrored", "--device", "cpu")
    assert result.exit_code == 2
    assert "'mirrored' draws among the views of an image; add hflip" in one_line(result)


def test_a_file_that_is_no_yaml(params: Path) -> None:
    params.write_text(params.read_text().replace("prepare:", "prepare: ["))
    assert "is not valid YAML" in one_line(call("prepare"))


def test_a_section_that_is_missing_has_its_defaults(params: Path) -> None:
    values = read_params(params)
    del values["monitor"], values["train_gan"]["betas"]
    YAML(typ="safe", pure=True).dump(values, params)
    loaded = load_params(params)
    assert loaded.monitor == MonitorConfig()
    assert loaded.train_gan.betas == (0.0, 0.9)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_decoder_that_cannot_be_trained_here_is_refused_before_the_gan(
    precision: str, params: Path
) -> None:
    change(params, {"train_decoder.mixed_precision": precision})
    result = call("train-gan", "--device", "cpu")
    assert result.exit_code == 2
    expected = f"train_decoder.mixed_precision: {precision} needs a GPU; use bf16 or 'no' on the"
    assert expected in one_line(result)


def test_a_missing_params_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("prepare")
    assert result.exit_code == 2
    assert "init` writes one" in one_line(result)


def test_options_out_of_range_are_usage_errors(params: Path) -> None:
    assert call("prepare", "--workers", "-1").exit_code == 2
    assert call("extract", "--device", "tpu").exit_code == 2
    assert call("train-decoder").exit_code == 2
    unknown = call("train-decoder", "--variant", "nonsense")
    assert unknown.exit_code == 2
    assert "describes baseline" in one_line(unknown)


def test_cuda_that_is_not_there_is_a_usage_error(
    params: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (("extract",), ("train-gan",), ("train-decoder", "--variant", "baseline")):
        result = call(*command, "--device", "cuda")
        assert result.exit_code == 2
        assert "no CUDA device" in one_line(result)


def test_a_data_set_that_cannot_be_downloaded_is_a_usage_error(params: Path) -> None:
    change(params, {"prepare.dataset": "cityscapes"})
    result = call("prepare", "--download")
    assert result.exit_code == 2
    assert (
        "cityscapes cannot be downloaded: get it yourself (leftImg8bit_trainvaltest.zip"
        in one_line(result)
    )
    assert "FEATUREGAN_DOWNLOAD" in call("prepare", "--help").output


def test_stages_out_of_order_say_what_to_run_first(params: Path) -> None:
    for command, words in (
        (("extract",), "run the prepare stage first"),
        (("train-gan",), "run the extract stage first"),
        (("train-decoder", "--variant", "baseline"), "run the extract stage first"),
        (("report",), "train-decoder --variant baseline --seed 0"),
    ):
        result = call(*command)
        assert result.exit_code == 1
        assert words in one_line(result)


def test_bad_data_exits_with_1_and_names_the_file(params: Path, photos: Path) -> None:
    (photos / "masks" / "train" / "0.png").unlink()
    result = call("prepare")
    assert result.exit_code == 1
    assert "photos/masks/train/0.png: this mask is missing" in one_line(result)


def test_variants_that_the_classes_do_not_suffice_for_are_refused_by_prepare(
    params: Path, photos: Path
) -> None:
    (photos / "classes.csv").write_text("name\nbelt\nwaste\n")
    for file in (photos / "masks").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file)).astype(bool).astype(np.uint8)).save(file)
    change(params, {"compare.gan_variants": ["featuregan-edited"]})
    result = call("prepare")
    assert result.exit_code == 2
    words = (
        "compare.gan_variants: variant 'featuregan-edited' needs 3 classes, background included, "
        "found 2; remove it"
    )
    assert words in one_line(result)
    change(params, {"compare.gan_variants": ["featuregan-2x"]})
    assert call("prepare").exit_code == 0


@pytest.mark.parametrize(("repeats", "told"), [(1, False), (60, False), (200, True), (8, True)])
def test_prepare_tells_the_repeats_that_fit_the_images(
    params: Path, photos: Path, repeats: int, told: bool
) -> None:
    """Six training images: 50 repeats make epochs of 300 samples; 1 is the thesis's setting."""
    change(params, {"train_decoder.repeats": repeats})
    result = call("prepare")
    assert result.exit_code == 0
    line = (
        f"params.yaml: 6 training images: set repeats in train_gan and train_decoder to 50, which "
        f"makes epochs of 300 samples (now {6 * repeats})"
    )
    assert (line in result.output) == told


def test_a_full_disk_is_one_line(
    params: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "manifest.csv"))

    monkeypatch.setattr("stages.prepare.write_manifest", full)
    result = call("prepare")
    assert result.exit_code == 1
    assert "manifest.csv: cannot be written (No space left on device); make room" in one_line(
        result
    )


@pytest.mark.slow
def test_a_store_of_other_parameters_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(project)
    other = tmp_path / "other.yaml"
    for changes, words in (
        (
            {"extract.input_size": 96},
            "was extracted with input_size (64, 64), but the parameters say (96, 96)",
        ),
        (
            {"extract.backbone": "resnet50"},
            "was extracted with backbone efficientnet_lite0",
        ),
    ):
        other.write_text(tiny_params({**LAYERED, **changes}))
        for command in (("train-gan",), ("train-decoder", "--variant", "baseline")):
            result = call(*command, "--params", str(other), "--scratch", str(tmp_path))
            assert result.exit_code == 1
            assert words in one_line(result)
    other.write_text(tiny_params({**LAYERED, "report.headline_classes": ["dragon"]}))
    for command in (("train-gan",), ("train-decoder", "--variant", "baseline")):
        result = call(*command, "--params", str(other), "--scratch", str(tmp_path))
        assert result.exit_code == 2
        assert "report.headline_classes: 'dragon' is no class of this data set" in one_line(result)


@pytest.mark.slow
def test_inspect_and_verify(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(project)
    shown = call("inspect", "features/train").output
    for words in (
        "10 samples",
        "568 x 8 x 8 float16",
        "blocks.1 (24 x 16 x 16), blocks.2 (40 x 8 x 8)",
        "efficientnet_lite0",
        "plastic bottle",
        "shard-00000.h5",
    ):
        assert words in shown
    assert "10 samples" in call("inspect", "features/train/shard-00000.h5").output
    assert "every byte as written" in call("verify", "features/test").output
    missing = call("verify", str(tmp_path / "nothing"))
    assert missing.exit_code == 1
    assert "there is no feature store here" in one_line(missing)
