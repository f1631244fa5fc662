"""Sizes are those of extracted stores; operations are those of the steps that train."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from ruamel.yaml import YAML
from torch.utils.flop_counter import FlopCounterMode

import pipeline
from benchmarks.train import Size, our_steps
from featurestore.layers import Layer
from stages.augment import registry
from stages.backbones.build import build_backbone
from stages.commands.estimate import _store_spec
from stages.commands.params import PARAMS
from stages.common.config import parse
from stages.common.errors import ConfigError
from stages.estimate import step_cost
from stages.estimate.sizes import (
    cache_bytes,
    joint_ratios,
    memory_rows,
    model_bytes,
    split_sizes,
    work_rows,
)
from stages.estimate.step_cost import Setup
from tests.factories import tiny_params
from tests.imports import ROOT


def call(*arguments: str) -> Result:
    return CliRunner().invoke(pipeline.main, ["estimate", *arguments])


def setup(ratios: Sequence[int] = (), **gan: object) -> Setup:
    """The tiny parameters' networks, with changes of the GAN."""
    params = parse(PARAMS, YAML(typ="safe", pure=True).load(tiny_params()))
    head = {"head": "deeplab", "width": params.train_decoder.width, "atrous_rates": (12, 24, 36)}
    settings = {**params.train_gan.model_dump(), "prior": "none", **gan}
    return Setup("efficientnet_lite0", (64, 64), settings, head, num_classes=21, ratios=ratios)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the tiny parameters and no data."""
    (tmp_path / "params.yaml").write_text(tiny_params())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_sizes_are_those_of_the_extracted_stores(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    said = json.loads(call("--json").stdout)
    assert said["images"] == {"train": 10, "val": 4, "test": 4}
    assert said["classes"] == 7
    for row in said["stores"]:
        index = json.loads((project / "features" / row["split"] / "index.json").read_text())
        size = sum(shard["bytes"] for shard in index["shards"])
        assert row["samples"] == sum(shard["samples"] for shard in index["shards"])
        # Attributes, ids and HDF5's own structures, of four layers.
        assert 0 <= size - row["bytes"] < 30_000 * len(index["shards"])
    models = sum(path.stat().st_size for path in (project / "models").rglob("*") if path.is_file())
    about = next(row["bytes"] for row in said["disk"] if row["what"].startswith("models"))
    assert about == pytest.approx(models, rel=0.2)


@pytest.mark.medium
def test_operations_are_those_of_the_steps_that_train() -> None:
    """Counted on real tensors in the trainer itself, and on fake ones."""
    costs, layers = step_cost.count(setup((1, 2)))
    assert layers == [Layer("blocks.6", (320, 8, 8))]
    size = Size("efficientnet_lite0", 320, step_cost.BATCH, 8, 1, 8, 4, 8, side=8)
    features, masks = torch.rand(2, 320, 8, 8), torch.randint(0, 21, (2, 64, 64), dtype=torch.uint8)
    for name, step in our_steps(size, "cpu", "no", features, masks).items():
        with FlopCounterMode(display=False) as counter:
            step()
        cost = costs[name.replace(" step", "")]
        assert cost.operations == counter.get_total_flops() / step_cost.BATCH, name
    backbone = build_backbone(name="efficientnet_lite0", weights="default")
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert costs["backbone"].operations == counter.get_total_flops()


@pytest.mark.medium
def test_counting_leaves_nothing_fake_behind() -> None:
    from stages.segmentation.upsampled_loss import upsampled_cross_entropy

    step_cost.count(setup())
    loss = upsampled_cross_entropy(
        torch.zeros(2, 7, 8, 8), torch.zeros(2, 64, 64, dtype=torch.uint8)
    )
    assert float(loss) == pytest.approx(1.9459, abs=1e-4)  # log 7
    assert torch.nn.Linear(1, 1).to(torch.float64).weight.dtype == torch.float64


@pytest.mark.medium
def test_memory_grows_with_what_is_kept() -> None:
    costs, _ = step_cost.count(setup((1, 2)))
    assert costs["backbone"].weight_bytes == costs["backbone"].activation_bytes == 0
    assert costs["decoder"].activation_bytes > 320 * 8 * 8 * 4  # the features themselves, at least
    assert (
        costs["joint 1:1"].weight_bytes == costs["gan"].weight_bytes + costs["decoder"].weight_bytes
    )
    assert (
        costs["gan"].activation_bytes
        < costs["joint 1:1"].activation_bytes
        < costs["joint 2:1"].activation_bytes
    )


@pytest.mark.medium
@pytest.mark.parametrize("gan", [{}, {"family": "flow", "flow_components": 16, "flow_width": 8}])
def test_sizes_that_are_not_multiples_of_32_are_counted(gan: dict) -> None:
    transforms = () if gan else ("flip", "translation", "cutout", "channel_dropout")
    odd = dataclasses.replace(setup(diffaugment=transforms, **gan), input_size=(72, 104))
    costs, layers = step_cost.count(odd)
    assert layers == [Layer("blocks.6", (320, 9, 13))]
    larger, _ = step_cost.count(dataclasses.replace(odd, input_size=(96, 128)))
    for name in ("backbone", "gan", "decoder", "generator"):
        assert 0 < costs[name].operations < larger[name].operations


CHANGES = [
    {"family": "flow"},
    {"conditioning": "concat"},
    {"image_encoder": True},
    {"discriminator_scales": 2},
    {"noise": "spatial"},
    {"adversarial_loss": "wasserstein-clip"},
    {"adversarial_loss": "wasserstein-gp"},
    {"adversarial_loss": "segmentation"},
    {"adversarial_loss": "non-saturating", "r1_gamma": 1.0},
]


def gan_operations(**changes: object) -> float:
    costs, _ = step_cost.count(setup(**changes))
    return costs["gan"].operations


@pytest.fixture(scope="module")
def operations_of_the_quickstart() -> float:
    return gan_operations()


@pytest.mark.medium
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_kind_of_gan_is_counted(change: dict, operations_of_the_quickstart: float) -> None:
    changed = gan_operations(**change, flow_components=16, flow_width=8)
    ratio = changed / operations_of_the_quickstart
    if "family" in change:
        assert 0 < ratio < 1  # a small flow, and no discriminator
    elif "conditioning" in change:
        assert 0.2 < ratio < 1  # no convolutions of the mask in every block
    elif change.get("adversarial_loss") in ("wasserstein-clip", "non-saturating"):
        assert ratio >= 1
    else:
        assert 1 < ratio < 20


@pytest.mark.medium
def test_a_generator_of_images_is_counted_with_its_backbone() -> None:
    image = {"family": "image", "flow_components": 64, "layers": ["blocks.1"]}
    layered = dataclasses.replace(
        setup((1,), **image),
        layers=("blocks.1", "blocks.6"),
        decoder_layers=("blocks.1",),
        dilate=False,
        input_size=(96, 128),
    )
    costs, layers = step_cost.count(layered)
    assert [layer.name for layer in layers] == ["blocks.1", "blocks.6"]
    backbone = build_backbone(
        name="efficientnet_lite0", weights=None, layers=["blocks.1"], dilate=False
    )
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, 96, 128, dtype=torch.uint8))
    forward = counter.get_total_flops()
    made, joint, gan = costs["generator"], costs["joint 1:1"], costs["gan"]
    assert made.operations > forward
    assert joint.operations > made.operations + forward  # gradients pass the backbone
    assert made.weight_bytes == 0
    networks = step_cost.Workload(layered, step_cost.BATCH, "cpu").trainer.networks.by_name()
    parameters = [tensor for network in networks.values() for tensor in network.parameters()]
    frozen = sum(tensor.numel() for tensor in parameters if not tensor.requires_grad)
    trained = sum(tensor.numel() for tensor in parameters) - frozen
    assert frozen == sum(tensor.numel() for tensor in backbone.parameters())
    assert gan.weight_bytes == 16 * trained + 4 * frozen


FROZEN = {"augmenter": "featuregan", "generator": "frozen"}
SWAPPED = {**FROZEN, "new_masks": ["swap"], "class_swap": True}
VARIANTS = registry.VARIANTS.validate_python(
    {
        "baseline": {"augmenter": "none"},
        "duplicate-2x": {"augmenter": "duplicate", "ratio": 2},
        "featuregan-2x": {"augmenter": "featuregan", "ratio": 2},
        "featuregan-frozen": FROZEN,
        "featuregan-edited": SWAPPED,
        "featuregan-varied": {**FROZEN, "vary": 0.5},
        "combined": {
            "augmenter": "combined",
            "of": [{"augmenter": "isda"}, FROZEN, {"augmenter": "noise"}],
        },
        "until": {"augmenter": "featuregan", "ratio": 2, "until": 0.25},
        "edited until": {**SWAPPED, "until": 0.25},
        "two rounds": {"augmenter": "self-training", "rounds": 2},
        "average": {"augmenter": "self-training", "teacher": "ema"},
    }
)


def test_work_adds_up() -> None:
    assert joint_ratios(VARIANTS) == [2]
    kinds = ("backbone", "decoder", "gan", "joint 2:1", "generator")
    cost = {name: step_cost.Cost(float(number), 0, 0) for number, name in enumerate(kinds, 1)}
    counts = {"extract": 15, "gan": 20, "decoder": 60}
    rows = work_rows(cost, None, 1e-12, samples=counts, family="gan", variants=VARIANTS)
    *rows, everything = rows
    assert [row["samples"] for row in rows] == [15, 20, *[60] * 11]
    once = [
        2,
        3 * 2,
        4,
        2 * 2 + 5,
        2 * 2 + 2 * 5,
        2 * 2 + 0.5 * 5,
        3 * 2 + 5,
        0.25 * 4 + 0.75 * 3 * 2,
        2 * 2 + 0.25 * 2 * 5,
        2 + 2 * (2 * 2 + 2 / 3),  # a round of labelled images, two with a teacher's third of a step
        2 * 2 + 2 / 3,
    ]
    assert [row["gflop_a_sample"] * 1e9 for row in rows] == pytest.approx([1, 3, *once])
    assert everything["hours"] == pytest.approx((15 + 60 + 60 * sum(once)) / 3600)
    flow = work_rows(cost, None, None, samples=counts, family="flow", variants=VARIANTS)
    swapped = next(row for row in flow if row["part"] == "train-decoder: featuregan-edited")
    assert swapped["gflop_a_sample"] * 1e9 == pytest.approx(2 * 2 + 5)
    assert "hours" not in flow[-1]


def test_memory_is_that_of_the_variant_that_adds_most() -> None:
    cost = {
        "gan": step_cost.Cost(0.0, 200, 30.0),
        "decoder": step_cost.Cost(0.0, 100, 10.0),
        "joint 2:1": step_cost.Cost(0.0, 300, 20.0),
    }
    for chosen, batches in ((["baseline"], 1), (["baseline", "duplicate-2x", "featuregan-2x"], 3)):
        variants = {name: VARIANTS[name] for name in chosen}
        gan, alone, joint, cached = memory_rows(cost, {"gan": 2, "decoder": 4}, variants, 7)
        assert gan["bytes"] == 200 + 2 * 30
        assert alone["bytes"] == 100 + 4 * 10 * batches
        assert joint["bytes"] == 300 + 4 * 20
        assert cached["bytes"] == 7


def test_a_trained_backbone_adds_its_backward_pass_and_its_weights() -> None:
    assert "trained backbone" not in step_cost.count(setup())[0]
    costs, _ = step_cost.count(dataclasses.replace(setup(), trains_backbone=True))
    cost, frozen = costs["trained backbone"], costs["backbone"].operations
    # Two gradients a convolution, of the first one a single gradient; many are depthwise.
    assert 2.9 * frozen < cost.operations < 3 * frozen
    backbone = build_backbone(name="efficientnet_lite0", weights=None)
    weights = sum(parameter.numel() for parameter in backbone.network.parameters())
    assert cost.weight_bytes == 16 * weights
    assert cost.activation_bytes > 0
    both = parse(registry.VARIANTS, {"tuned": {"augmenter": "duplicate", "backbone": "trained"}})
    counts = {"extract": 1, "gan": 1, "decoder": 1}
    rows = work_rows(costs, None, None, samples=counts, family="gan", variants=both)
    expected = 2 * costs["decoder"].operations + cost.operations  # only real images pass it
    assert rows[2]["gflop_a_sample"] * 1e9 == pytest.approx(expected)
    plain = parse(registry.VARIANTS, {"frozen": {"augmenter": "duplicate"}})
    more = model_bytes(costs, both, 1) - model_bytes(costs, plain, 1)
    assert more == 2 * 4 * weights  # of the last and of the best epoch


def test_a_cache_holds_decoded_training_and_validation_features() -> None:
    images, pixels = {"train": 10, "val": 3, "test": 4}, 256 * 256
    changed = {"extract.compression": "int8", "extract.input_size": 256}
    params = parse(PARAMS, YAML(typ="safe", pure=True).load(tiny_params(changed)))
    spec = _store_spec(params, [Layer("blocks.6", (320, 32, 32))], 21)
    sample = 2 * 320 * 32 * 32 + pixels
    plain = {"baseline": VARIANTS["baseline"]}
    mirrored = registry.VARIANTS.validate_python({"hflip-views": {"augmenter": "hflip-views"}})
    drawn = registry.VARIANTS.validate_python({"drawn": {"augmenter": "none", "view": "random"}})
    assert cache_bytes(spec, 6, images, False, plain) == 13 * sample
    assert cache_bytes(spec, 6, images, False, plain | mirrored) == 23 * sample
    assert cache_bytes(spec, 2, images, False, mirrored | drawn) == 23 * sample
    assert cache_bytes(spec, 6, images, False, mirrored | drawn) == 63 * sample
    assert cache_bytes(spec, 6, images, True, plain) == 13 * (sample + 3 * pixels)


def test_a_network_without_dense_features_is_refused_in_one_line() -> None:
    for name, key in (("vgg11", "dilate"), ("swin_tiny_patch4_window7_224", "dilate")):
        with pytest.raises(ConfigError, match=f"extract.{key}: timm/{name} cannot"):
            step_cost.untrained_backbone(dataclasses.replace(setup(), backbone=f"timm/{name}"))


def test_splits_are_those_of_prepare() -> None:
    assert split_sizes(2913, (0.7, 0.15, 0.15), 1.0) == {"train": 2039, "val": 437, "test": 437}
    assert split_sizes(100, (0.7, 0.15, 0.15), 0.25) == {"train": 18, "val": 15, "test": 15}


@pytest.mark.medium
def test_a_summary_of_another_data_set_is_left_alone(folder: Path) -> None:
    (folder / "dataset").mkdir()
    summary = {
        "dataset": "wastesim",
        "classes": ["ground", "bottle"],
        "splits": {name: {"images": 5} for name in ("train", "val", "test")},
    }
    (folder / "dataset/summary.json").write_text(json.dumps(summary))
    assert json.loads(call("--preset", "quickstart", "--json").stdout)["classes"] == 2
    assert (
        json.loads(call("--preset", "voc2012-lite", "--images", "100", "--json").stdout)["classes"]
        == 21
    )
    assert "name them with --images" in call("--preset", "voc2012-lite").stderr


@pytest.mark.medium
def test_each_view_adds_a_training_store(folder: Path) -> None:
    one = json.loads(call("--images", "100", "--json").stdout)
    views = {"extract.views": ["identity", "crop", "random-3"]}
    (folder / "params.yaml").write_text(tiny_params(views))
    five = json.loads(call("--images", "100", "--json").stdout)
    factors = (5, 1, 1)
    for key in ("bytes", "samples"):
        expected = [row[key] * factor for row, factor in zip(one["stores"], factors, strict=True)]
        assert [row[key] for row in five["stores"]] == expected
    assert five["work"][0]["part"] == "extract"
    assert five["work"][0]["samples"] == sum(row["samples"] for row in five["stores"])


@pytest.mark.medium
def test_measured_hours_are_seconds_times_samples(folder: Path) -> None:
    work = json.loads(call("--images", "20", "--measure", "--device", "cpu", "--json").stdout)[
        "work"
    ]
    assert all(row["hours"] > 0 for row in work)
    assert work[-1]["hours"] == pytest.approx(sum(row["hours"] for row in work[:-1]))
    assert "hours, measured" not in call("--images", "20").stdout


def test_mistakes_are_one_line(folder: Path) -> None:
    for arguments, words in (
        ((), "name them with --images"),
        (("--images", "10", "--preset", "nonsense"), "choose from camvid-lite"),
        (("--images", "10", "--tflops", "1", "--measure"), "leave one out"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2
        assert words in result.stderr
    (folder / "dataset").mkdir()
    (folder / "dataset" / "summary.json").write_text("{}")
    result = call()
    assert result.exit_code == 1
    assert "dataset/summary.json: cannot be read" in result.stderr


@pytest.mark.slow
def test_the_documents_tables_are_what_the_command_prints() -> None:
    text = (ROOT / "docs" / "hardware.md").read_text()
    commands = [
        line.strip().removeprefix("python pipeline.py estimate ")
        for line in text.splitlines()
        if line.startswith("    python pipeline.py estimate --preset")
    ]
    assert len(commands) == 3
    for command in commands:
        if "--measure" not in command:
            for block in call(*command.split()).stdout.strip().split("\n\n"):
                assert block.strip() in text, command
