"""Decoder heads: equality with references, gradients, dropout, files, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torchvision.models.segmentation.deeplabv3 import ASPP as TorchvisionASPP

from stages.models.decoder import DROPOUT, Decoder
from stages.models.deeplabv3plus import LOW_LEVEL, DeepLabV3Plus, has_pyramid
from stages.training.models import load_decoder, save_weights

# Grid 6 x 5; the second layer is on the grid, the others have 2 and 4 times its pixels a side.
FOLDS = ((3, 2), (7, 1), (2, 4), (5, 1))
CHANNELS, CLASSES, WIDTH, RATES = 3 * 4 + 7 + 2 * 16 + 5, 3, 8, (1, 2)
HEADS = list(DROPOUT)


def decoder_of(head: str, **changes) -> Decoder:
    torch.manual_seed(0)
    settings = {
        "in_channels": CHANNELS,
        "num_classes": CLASSES,
        "width": WIDTH,
        "atrous_rates": RATES,
        "folds": FOLDS,
    }
    decoder = Decoder(head=head, **{**settings, **changes})
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return decoder


def features_of(batch: int = 4) -> Tensor:
    return torch.randn(batch, CHANNELS, 6, 5).contiguous(memory_format=torch.channels_last)


# -- what every head does --------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_logits_have_the_heads_size_or_the_masks_and_reach_every_parameter(head: str) -> None:
    decoder, features = decoder_of(head), features_of().requires_grad_()
    size = (24, 20) if head == "deeplabv3plus" else (6, 5)
    logits = decoder(features)
    assert logits.shape == (4, CLASSES, *size)
    F.interpolate(logits, (45, 40)).square().mean().backward()
    for name, tensor in [*decoder.named_parameters(), ("features", features)]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name
    decoder.eval()
    upsampled = F.interpolate(decoder(features), (45, 40), mode="bilinear", align_corners=False)
    assert torch.equal(decoder(features, (45, 40)), upsampled)


@pytest.mark.parametrize("head", HEADS)
def test_adjust_gets_the_last_layer_with_its_input_and_output(head: str) -> None:
    decoder, features = decoder_of(head).eval(), features_of()

    def adjust(embeddings: Tensor, logits: Tensor, last: nn.Conv2d) -> Tensor:
        assert last is decoder.last
        assert torch.equal(last(embeddings), logits)
        return logits + 1

    torch.testing.assert_close(
        decoder(features, adjust=adjust), decoder(features) + 1, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("head", HEADS)
def test_added_batches_may_leave_the_running_statistics_alone(head: str) -> None:
    decoder, features = decoder_of(head), features_of()
    before = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    with decoder.running_statistics(updated=False):
        decoder(features)
    means = [name for name in before if name.endswith("running_mean")]
    assert all(torch.equal(decoder.get_buffer(name), before[name]) for name in means)
    decoder(features)
    assert not any(torch.equal(decoder.get_buffer(name), before[name]) for name in means)


@pytest.mark.parametrize("head", HEADS)
def test_dropout_is_the_heads_own_unless_one_is_given(head: str) -> None:
    def found(decoder: Decoder) -> list[float]:
        layers = (nn.Dropout, nn.Dropout2d)
        return [layer.p for layer in decoder.modules() if isinstance(layer, layers)]

    own = {"linear": 0.1, "deeplab": 0.5, "fcn": 0.1, "deeplabv3plus": 0.1}
    assert found(decoder_of(head)) == [own[head]]
    assert found(decoder_of(head, dropout=0.25)) == [0.25]
    assert found(decoder_of(head, dropout=0.0)) == [0.0]


@pytest.mark.parametrize("head", HEADS)
def test_a_saved_decoder_computes_what_it_computed(head: str, tmp_path: Path) -> None:
    decoder, features = decoder_of(head, dropout=0.3).eval(), features_of()
    save_weights(decoder.state_dict(), tmp_path / "decoder.safetensors")
    architecture = {
        "head": head,
        "in_channels": CHANNELS,
        "num_classes": CLASSES,
        "width": WIDTH,
        "atrous_rates": RATES,
        "dropout": 0.3,
        "folds": FOLDS,
    }
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
    assert torch.equal(load_decoder(tmp_path)(features), decoder(features))


# -- exported ------------------------------------------------------------------------------------


class Sized(nn.Module):
    """A decoder whose logits are upsampled to 9 times the grid, as an exported one's."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: Tensor) -> Tensor:
        size = (9 * features.shape[2], 9 * features.shape[3])
        return self.decoder(features, size)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.medium
def test_exported_heads_take_maps_of_any_size(head: str, tmp_path: Path) -> None:
    network = Sized(decoder_of(head)).eval()
    axes = {0: Dim("batch", min=1), 2: Dim("height", min=3), 3: Dim("width", min=3)}
    program = torch.export.export(network, (features_of(2),), dynamic_shapes=(axes,))
    torch.export.save(program, tmp_path / "head.pt2")
    torch.onnx.export(
        program, input_names=["features"], output_names=["scores"], verbose=False
    ).save(tmp_path / "head.onnx")
    loaded = torch.export.load(tmp_path / "head.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "head.onnx")
    for features in (features_of(1), torch.randn(3, CHANNELS, 4, 9)):
        expected = network(features)
        torch.testing.assert_close(loaded(features), expected, rtol=1e-4, atol=1e-5)
        (scores,) = session.run(["scores"], {"features": features.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-5)


# -- linear --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_linear_is_batch_norm_dropout_of_channels_and_a_convolution(training: bool) -> None:
    decoder, features = decoder_of("linear").train(training), features_of()
    reference = nn.Sequential(
        nn.BatchNorm2d(CHANNELS), nn.Dropout2d(0.1), nn.Conv2d(CHANNELS, CLASSES, 1)
    ).train(training)
    reference.load_state_dict(decoder.head.state_dict())
    torch.manual_seed(1)
    logits = decoder(features)
    torch.manual_seed(1)
    assert torch.equal(logits, reference(features))


# -- DeepLabv3+ ----------------------------------------------------------------------------------


def copy_tensors(source: nn.Module, target: nn.Module) -> nn.Module:
    """Load tensors by their order: names differ."""
    tensors = source.state_dict().values()
    target.load_state_dict(dict(zip(target.state_dict(), tensors, strict=True)))
    return target.eval()


def test_deeplabv3plus_equals_its_parts_from_torchvision() -> None:
    decoder = decoder_of("deeplabv3plus", num_classes=CLASSES).eval()
    head = decoder.head[0]
    layers = {
        "a": torch.randn(2, 3, 12, 10),
        "b": torch.randn(2, 7, 6, 5),
        "c": torch.randn(2, 2, 24, 20),
        "d": torch.randn(2, 5, 6, 5),
    }
    folded = {"a": F.pixel_unshuffle(layers["a"], 2), "c": F.pixel_unshuffle(layers["c"], 4)}
    features = torch.cat(list({**layers, **folded}.values()), dim=1)

    def reduction(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )

    def separable(channels: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, WIDTH, 1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
        ]

    aspp = copy_tensors(head.aspp, TorchvisionASPP(7 + 5, list(RATES), WIDTH))
    of_a = copy_tensors(head.reduce[0], reduction(3))
    of_c = copy_tensors(head.reduce[1], reduction(2))
    refine = nn.Sequential(*separable(WIDTH + 3 + 2), *separable(WIDTH))
    refine = copy_tensors(head.refine, refine)
    coarse = aspp(torch.cat([layers["b"], layers["d"]], 1))
    finest = {"size": (24, 20), "mode": "bilinear", "align_corners": False}
    joined = [
        F.interpolate(coarse, **finest),
        F.interpolate(of_a(layers["a"]), **finest),
        of_c(layers["c"]),
    ]
    embeddings = refine(torch.cat(joined, 1))
    torch.testing.assert_close(head(features), embeddings, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder(features), decoder.last(embeddings), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_deeplabv3plus_refines_in_channels_last(training: bool) -> None:
    head, joined = decoder_of("deeplabv3plus").train(training).head[0], []
    head.refine.register_forward_pre_hook(lambda _, inputs: joined.extend(inputs))
    head(features_of())
    assert [layer.shape for layer in joined] == [(4, WIDTH + 3 + 2, 24, 20)]
    assert joined[0].is_contiguous(memory_format=torch.channels_last)


def test_deeplabv3plus_reduces_a_wide_finer_layer_to_48_channels() -> None:
    head = DeepLabV3Plus(((256, 2), (4, 1)), 16, (1,), 0.1)
    assert LOW_LEVEL == 48
    assert head.reduce[0][0].weight.shape == (48, 256, 1, 1)
    assert head.refine[0][1].weight.shape == (16, 16 + 48, 1, 1)


@pytest.mark.parametrize(
    ("folds", "found"),
    [
        (((12, 1),), "12 channels folded 1"),
        (((5, 1), (7, 1)), "5 channels folded 1, 7 channels folded 1"),
        (((3, 2),), "3 channels folded 2"),
    ],
)
def test_deeplabv3plus_needs_layers_on_the_grid_and_finer_ones(
    folds: tuple[tuple[int, int], ...], found: str
) -> None:
    assert not has_pyramid(folds)
    with pytest.raises(ValueError, match=f"needs a layer on the grid .* found {found}; store a"):
        decoder_of("deeplabv3plus", in_channels=12, folds=folds)


def test_layers_must_have_the_channels_of_the_map() -> None:
    with pytest.raises(ValueError, match="the layers have 56 channels, the map has 50"):
        decoder_of("deeplabv3plus", in_channels=50)
