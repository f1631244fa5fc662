"""The command line: instant help, one clear line for every mistake, the right exit codes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.commands.options import load_params
from tests.factories import call, one_line, tiny_params
from tests.imports import ROOT

COMMANDS = (
    "init",
    "prepare",
    "extract",
    "train-gan",
    "train-decoder",
    "report",
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


def change(params: Path, before: str, after: str) -> None:
    text = params.read_text()
    assert before in text
    params.write_text(text.replace(before, after, 1))


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


def test_init_lists_and_writes_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = call("init", "--list").output
    for preset in ("quickstart", "voc2012-thesis", "voc2012-lite", "camvid-lite"):
        assert preset in listed
        assert call("init", preset, "--force").exit_code == 0
        assert load_params(Path("params.yaml"))["train_gan"].lambda_feat == 7.0
    changed = Path("params.yaml").read_text() + "# mine\n"
    Path("params.yaml").write_text(changed)
    assert "the old one is params.yaml.bak" in call("init", "quickstart", "--force").output
    assert Path("params.yaml.bak").read_text() == changed
    for preset in (
        "voc2012-lite",
        "quickstart",
    ):  # presets are no one's work, and must not take its place
        assert "old" not in call("init", preset, "--force").output
    assert Path("params.yaml.bak").read_text() == changed
    assert call("init", "quickstart", "--params", "elsewhere/mine.yaml").exit_code == 0
    assert load_params(Path("elsewhere/mine.yaml"))
    refused = call("init", "quickstart")
    assert refused.exit_code == 2
    assert "--force" in one_line(refused)
    assert "choose from" in one_line(call("init", "nonsense", "--force"))


def test_the_committed_parameters_are_the_quickstart() -> None:
    assert (ROOT / "params.yaml").read_text() == (
        ROOT / "stages" / "presets" / "quickstart.yaml"
    ).read_text()


def test_the_thesis_preset_has_the_thesis_figures() -> None:
    sections = load_params(ROOT / "stages" / "presets" / "voc2012-thesis.yaml")
    gan, decoder, extract, prepare = (
        sections[name] for name in ("train_gan", "train_decoder", "extract", "prepare")
    )
    assert (gan.frozen_epochs, gan.lambda_feat, gan.lambda_kld, gan.batch_size) == (
        75,
        7.0,
        0.05,
        32,
    )
    assert (gan.generator_lr, gan.discriminator_lr, gan.betas) == (2e-4, 8e-4, (0.0, 0.9))
    assert (gan.z_dim, gan.ngf, gan.spade_hidden, gan.adversarial_loss, gan.image_encoder) == (
        256,
        64,
        128,
        "hinge",
        False,
    )
    assert (decoder.lr, decoder.batch_size, decoder.width) == (5e-4, 32, 256)
    assert (extract.backbone, extract.input_size) == ("resnet101", (256, 256))
    assert (prepare.split, prepare.ratios) == ("random", (0.7, 0.15, 0.15))
    assert [sections["variants"][name].ratio for name in ("featuregan-1x", "featuregan-2x")] == [
        1,
        2,
    ]


BAD_PARAMETERS = {
    "an unknown key": (
        "  z_dim: 8",
        "  z_dims: 8",
        "train_gan.z_dims: unknown key; did you mean z_dim?",
    ),
    "an unknown section": ("report:", "raport:", "raport: unknown section"),
    "a wrong type": (
        "  z_dim: 8",
        "  z_dim: '8'",
        "train_gan.z_dim: input should be a valid integer, found '8'",
    ),
    "a value out of range": (
        "  lambda_feat: 7.0",
        "  lambda_feat: -1.0",
        "train_gan.lambda_feat: input should be greater than or equal to 0",
    ),
    "a choice that does not exist": (
        "norm: batch",
        "norm: layer",
        "train_gan.norm: input should be 'batch' or 'instance', found 'layer'",
    ),
    "ratios that do not add up": (
        "[0.7, 0.15, 0.15]",
        "[0.7, 0.2, 0.15]",
        "prepare: ratios must add up to 1",
    ),
    "an unknown variant": (
        "[baseline, featuregan-1x",
        "[baseline, featuregan-3x",
        "compare.variants: 'featuregan-3x' is not described",
    ),
    "mirrored images that nobody extracts": (
        "[baseline, featuregan-1x",
        "[mirrored-perturbed, featuregan-1x",
        "extract.views: variant 'mirrored-perturbed' reads mirrored images; set it to [identity, hflip]",
    ),
    "mirrored images alone": (
        "views: [identity]",
        "views: [hflip]",
        "extract.views: must have identity",
    ),
    "several draws without noise": (
        "  z_dim: 8",
        "  z_dim: 0",
        "variants.featuregan-2x.ratio: without noise all draws of a mask are equal",
    ),
    "noise at every pixel that has no channels": (
        "  z_dim: 8\n  noise: vector",
        "  z_dim: 0\n  noise: spatial",
        "train_gan: spatial noise is z at every pixel; set z_dim above 0",
    ),
    "a change that stands twice": (
        "perturb: [flip, translation",
        "perturb: [flip, flip, translation",
        "flip stands twice",
    ),
    "a seed that stands twice": ("seeds: [0]", "seeds: [0, 0]", "compare.seeds: 0 stands twice"),
    "an unknown augmenter": (
        "{augmenter: isda, ",
        "{augmenter: idsa, ",
        "variants.isda.augmenter: should be 'none', 'duplicate'",
    ),
    "a key that an augmenter has not": (
        "{augmenter: isda, strength",
        "{augmenter: isda, strenght",
        "variants.isda.strenght: unknown key; did you mean strength?",
    ),
    "a key of one of several combined augmenters": (
        "{augmenter: isda, strength: 2.5}",
        "{augmenter: combined, of: [{augmenter: noise}, {augmenter: isda, strenght: 2.5}]}",
        "variants.isda.of.1.strenght: unknown key; did you mean strength?",
    ),
    "a value of one of several combined augmenters": (
        "{augmenter: isda, strength: 2.5}",
        "{augmenter: combined, of: [{augmenter: noise}, {augmenter: isda, strength: -1.0}]}",
        "variants.isda.of.1.strength: input should be greater than 0",
    ),
    "an augmenter's keys that do not fit together": (
        "generator: frozen, new_masks: [flip",
        "generator: joint, new_masks: [flip",
        "variants.featuregan-new-masks: new_masks have no real features",
    ),
    "an edit that would move real features": (
        "new_masks: [swap], edit",
        "new_masks: [swap, flip], edit",
        "variants.featuregan-edited: edit needs generator: frozen and new_masks of paste and swap alone",
    ),
    "a share of no masks": (
        "generator: frozen, vary: 0.5",
        "generator: frozen, share: 0.5, vary: 0.5",
        "variants.featuregan-varied: share is of the masks that new_masks changes; name some, or leave it out",
    ),
    "variations by a GAN": (
        "[baseline, featuregan-1x",
        "[featuregan-varied, featuregan-1x",
        "train_gan.family: variant 'featuregan-varied' works with a flow alone; set it to flow",
    ),
    "a flow trained jointly": (
        "family: gan ",
        "family: flow ",
        "train_gan.family: variant 'featuregan-1x' works with a gan alone; set it to gan",
    ),
    "variations that would move real features": (
        "generator: frozen, vary: 0.5",
        "generator: frozen, new_masks: [flip], vary: 0.5",
        "variants.featuregan-varied: vary needs generator: frozen, no edit, and no new_masks but paste and swap",
    ),
    "an unknown backbone": (
        "backbone: efficientnet_lite0",
        "backbone: resnet1001",
        "extract.backbone: unknown backbone",
    ),
    "an input size that the stride cannot take": (
        "input_size: 64 ",
        "input_size: 60 ",
        "extract.input_size",
    ),
    "an input size that the generator cannot take": (
        "input_size: 64 ",
        "input_size: 72 ",
        "multiple of 32",
    ),
    "an input size too small for the discriminator": (
        "input_size: 64 ",
        "input_size: [64, 32] ",
        "extract.input_size.1: input should be greater",
    ),
    "an infinite number": (
        "lambda_feat: 7.0",
        "lambda_feat: .inf",
        "train_gan.lambda_feat: input should be a finite number",
    ),
    "a batch of one": (
        "  batch_size: 4\n  gradient_accumulation: 1\n  decoder",
        "  batch_size: 1\n  gradient_accumulation: 1\n  decoder",
        "train_decoder.batch_size: input should be greater than or equal to 2",
    ),
    "parts of a batch that are not equal": (
        "  batch_size: 4\n  gradient_accumulation: 1\n  decoder",
        "  batch_size: 4\n  gradient_accumulation: 3\n  decoder",
        "train_decoder.batch_size: 4 samples do not divide into 1 processes times 3 micro-batches",
    ),
    "no YAML": ("prepare:", "prepare: [", "is not valid YAML"),
}


@pytest.mark.parametrize("case", BAD_PARAMETERS)
@pytest.mark.parametrize("command", ["prepare", "extract"])
def test_bad_parameters_stop_every_stage_before_it_starts(
    params: Path, command: str, case: str
) -> None:
    before, after, words = BAD_PARAMETERS[case]
    change(params, before, after)
    result = call(command)
    assert result.exit_code == 2
    assert words in one_line(result)
    assert not Path("dataset").exists()


def test_keys_that_do_not_go_together(params: Path) -> None:
    whole = params.read_text()
    for changes, words in (
        (
            {
                "image_encoder: false": "image_encoder: true",
                "store_images: true": "store_images: false",
            },
            "extract.store_images: train_gan",
        ),
        (
            {"family: gan ": "family: flow ", "diffaugment: []": "diffaugment: [flip]"},
            "train_gan: image_encoder, r1_gamma",
        ),
        (
            {
                "family: gan ": "family: flow ",
                "[baseline, featuregan-1x, featuregan-2x]": "[featuregan-edited]",
                "new_masks: [swap], edit: true, statistics": "new_masks: [swap], edit: true, ratio: 2, statistics",
            },
            "train_gan.family: variant 'featuregan-edited' works with a gan alone; set it to gan",
        ),
        (
            {
                "r1_gamma: 0.0": "r1_gamma: 1.0",
                "mixed_precision: 'no'          # of": "mixed_precision: fp16  # of",
            },
            "train_decoder.mixed_precision: fp16 does not go together with r1_gamma or adversarial_loss",
        ),
    ):
        for before, after in changes.items():
            change(params, before, after)
        result = call("prepare")
        assert result.exit_code == 2
        assert words in one_line(result)
        params.write_text(whole)


def test_a_decoder_that_cannot_be_trained_here_is_refused_before_the_gan(params: Path) -> None:
    change(params, "mixed_precision: 'no'          # of", "mixed_precision: fp16  # of")
    result = call("train-gan", "--device", "cpu")
    assert result.exit_code == 2
    assert (
        "train_decoder.mixed_precision: fp16 needs a GPU; use bf16 or 'no' on the CPU"
        in one_line(result)
    )


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
    change(params, "dataset: folder ", "dataset: cityscapes ")
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
    change(params, "featuregan-2x]", "featuregan-2x, featuregan-edited]")
    result = call("prepare")
    assert result.exit_code == 2
    words = "compare.variants: variant 'featuregan-edited' needs 3 classes, the background among them, found 2; leave it out"
    assert words in one_line(result)
    change(params, "featuregan-2x, featuregan-edited]", "featuregan-2x]")
    assert call("prepare").exit_code == 0


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
    for before, after, words in (
        (
            "input_size: 64 ",
            "input_size: 96 ",
            "was extracted with input_size (64, 64), but the parameters say (96, 96)",
        ),
        (
            "backbone: efficientnet_lite0",
            "backbone: resnet50",
            "was extracted with backbone efficientnet_lite0",
        ),
    ):
        other.write_text(tiny_params().replace(before, after))
        for command in (("train-gan",), ("train-decoder", "--variant", "baseline")):
            result = call(*command, "--params", str(other), "--scratch", str(tmp_path))
            assert result.exit_code == 1
            assert words in one_line(result)
    other.write_text(tiny_params().replace("headline_classes: []", "headline_classes: [dragon]"))
    for command in (("train-gan",), ("train-decoder", "--variant", "baseline")):
        result = call(*command, "--params", str(other), "--scratch", str(tmp_path))
        assert result.exit_code == 2
        assert "report.headline_classes: 'dragon' is no class of this data set" in one_line(result)


def test_inspect_and_verify(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(project)
    shown = call("inspect", "features/train").output
    for words in (
        "10 samples",
        "320 x 8 x 8 float16",
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
