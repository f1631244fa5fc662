"""Every family of backbones goes through extract, GAN, decoders and use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from featurestore.dataset import gather_maps
from stages.backbones.build import ALIASES
from stages.segmentation.folds import mirror
from stages.training.models import load_decoder
from stages.use import evaluate, export, generate
from stages.use.segmenter import Segmenter
from tests.factories import (
    extract,
    extract_config,
    prepare,
    prepare_config,
    run_decoder,
    run_gan,
    write_photos,
)

LITE0 = ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]
# Section ``extract``, and the head of the decoder.
FAMILIES = {
    "a CNN, native layers": (
        {"backbone": "efficientnet_lite0", "layers": LITE0, "dilate": False, "input_size": 96},
        "deeplabv3plus",
    ),
    "a CNN, dilated layers": (
        {"backbone": "timm/resnet18", "layers": ["layer1", "layer4"], "input_size": 72},
        "deeplabv3plus",
    ),
    "a convolutional network of patches": (
        {"backbone": "timm/convnext_atto", "layers": ["stages.1", "stages.3"], "dilate": False},
        "linear",
    ),
    "a ViT of patches of 14": (
        {"backbone": "timm/eva02_tiny_patch14_224", "layers": [2, 11], "input_size": [112, 126]},
        "linear",
    ),
    "a ViT of patches of 16": (
        {"backbone": "timm/vit_tiny_patch16_dinov3_qkvb", "input_size": [128, 160]},
        "deeplab",
    ),
    "a hierarchical transformer": (
        {
            "backbone": "swin_tiny",
            "layers": ["layers.1", "layers.3"],
            "dilate": False,
            "input_size": 96,
        },
        "linear",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_all_stages(family: str, tmp_path: Path) -> None:
    settings, head = FAMILIES[family]
    name, weights = settings["backbone"], "default"
    if name != "efficientnet_lite0":
        torch.manual_seed(0)
        weights = str(tmp_path / "weights.pth")
        model = timm.create_model(ALIASES.get(name, name.removeprefix("timm/")))
        torch.save(model.state_dict(), weights)
    write_photos(tmp_path / "photos", {"train": 8, "val": 4, "test": 4}, size=128)
    prepare(prepare_config(tmp_path / "photos"), tmp_path)
    config = extract_config(**{"input_size": 64, "weights": weights, **settings})
    stores = extract(config, tmp_path)
    spec = stores["train"].spec
    assert min(spec.feature_shape[1:]) >= 8

    features = tmp_path / "features"
    run_gan(features, tmp_path, frozen_epochs=1)
    decoder = {"decoder": head, "epochs": 1}
    joint, frozen = {"augmenter": "featuregan"}, {"augmenter": "featuregan", "generator": "frozen"}
    augment = ["flip", "translation", "cutout", "channel_dropout", "copy_paste"]
    run_decoder(features, tmp_path, joint, name="joint", **decoder)
    edited = {**frozen, "class_swap": True, "new_masks": ["swap"], "augment": augment}
    scores = run_decoder(features, tmp_path, edited, name="edited", **decoder)

    folder = tmp_path / "decoders" / "edited-0"
    options = {"weights": "decoder", "classes": [], "device": "cpu", "batch_size": 4, "workers": 0}
    assert evaluate.run(folder, features / "test", **options).scores.iou == scores.iou
    segmenter = Segmenter.load(folder, backbone_weights=weights, device="cpu")
    decoder = load_decoder(folder)
    for position, sample in enumerate(stores["test"]):
        logits = decoder(gather_maps(stores["test"], [position]), size=spec.mask_shape)[0]
        agrees = segmenter(sample.image) == logits.argmax(0).numpy()
        assert agrees.mean() > 0.99  # the store rounds to float16
    made = generate.run(
        tmp_path / "gan",
        features / "val",
        out=tmp_path / "generated",
        per_mask=1,
        seed=0,
        scratch=tmp_path / "scratch",
        device="cpu",
        workers=0,
    )
    assert made.spec.feature_shape == spec.feature_shape
    assert made.spec.folds == spec.folds
    for layer in made.spec.layers:
        assert np.isfinite(made.features(0, layer.name)).all()
    done = export.run(
        folder, format="torch-export", out=tmp_path / "model.pt2", backbone_weights=weights
    )
    assert done.difference <= 1e-3 * done.largest


@pytest.mark.medium
def test_a_flipped_map_is_the_map_of_the_mirrored_image(tmp_path: Path) -> None:
    """A network of mirrored kernels and patches has no asymmetry of its own: the maps are equal.

    Trained kernels are not mirrored, and strides with padding move what they see by up to a pixel
    of the layer. Features of a mirrored image then differ from mirrored features.
    """
    torch.manual_seed(0)
    state = timm.create_model("convnext_atto").state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 4:
            state[name] = (tensor + tensor.flip(-1)) / 2
    torch.save(state, tmp_path / "symmetric.pth")
    write_photos(tmp_path / "photos", {"train": 4, "val": 1, "test": 1}, size=128)
    prepare(prepare_config(tmp_path / "photos"), tmp_path)
    config = extract_config(
        backbone="timm/convnext_atto",
        weights=str(tmp_path / "symmetric.pth"),
        layers=["stages.0", "stages.1", "stages.3"],
        dilate=False,
        input_size=128,
        views=["identity", "hflip"],
        feature_dtype="float32",
    )
    store = extract(config, tmp_path)["train"]
    assert [factor for _, factor in store.spec.folds] == [2, 1, 1]
    plain, mirrored = (gather_maps(store, store.positions(view)) for view in ("identity", "hflip"))
    scale = mirrored.abs().max()
    assert (mirror(plain, store.spec.folds) - mirrored).abs().max() < 1e-4 * scale
    assert (plain.flip(-1) - mirrored).abs().max() > 1e-2 * scale  # sub-pixels not mirrored
