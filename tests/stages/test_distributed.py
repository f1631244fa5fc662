"""Two processes compute what one does: losses, weights and scores, to rounding."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from stages.common.distributed import (
    SynchronisedBatchNorm2d,
    load_optimizer_state,
    synchronise_batch_norm,
)
from stages.reporting.curves import read_curves
from stages.training.models import load_decoder, load_generator
from tests.factories import run
from tests.imports import ROOT

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def roots(features: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of one process, of two, and of two with sharded weights, from the same GAN."""
    launchers = {"one": (sys.executable,), "two": TORCHRUN, "sharded": TORCHRUN}
    found = {how: tmp_path_factory.mktemp(how) for how in launchers}
    for how, launcher in launchers.items():
        paths = map(str, (features, found[how], found["one"] / "gan"))
        run(
            *launcher,
            "-m",
            "tests.stages.train_in_processes",
            "gan,oasis,flow,concat,pseudo,joint,self-training,mean-teacher",
            *paths,
            cwd=ROOT,
            OMP_NUM_THREADS="1",
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["two", "sharded"])
@pytest.mark.parametrize("stage", ["gan", "oasis", "flow", "concat", "pseudo", "joint"])
def test_losses_and_scores_agree(roots: dict[str, Path], stage: str, how: str) -> None:
    one, two = (read_curves(roots[run] / "metrics" / stage) for run in ("one", how))
    assert one.keys() == two.keys()
    assert len(one) > (15 if stage == "flow" else 20)  # a flow has no discriminator to log
    for curve in one:
        if curve.startswith("monitor"):
            continue  # counts and ratios of the generators, whose weights are compared below
        first, last = slice(0, 2), slice(2, 3)
        pd.testing.assert_series_equal(
            two[curve][first], one[curve][first], check_exact=False, rtol=2e-3, atol=2e-4
        )
        # Adam takes a whole step even where a gradient is rounding noise, so the runs diverge.
        pd.testing.assert_series_equal(
            two[curve][last], one[curve][last], check_exact=False, rtol=5e-2, atol=2e-2
        )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["self-training", "mean-teacher"])
def test_self_training_agrees(roots: dict[str, Path], stage: str) -> None:
    one, two = (read_curves(roots[run] / "metrics" / stage) for run in ("one", "two"))
    assert one.keys() == two.keys()
    # Labels are drawn: where rounding moves a probability across a drawn number, a pixel's label
    # changes. Epochs of the first round have none.
    for curve in ("decoder/ce_real", "decoder/ce_added"):
        pd.testing.assert_series_equal(
            two[curve], one[curve], check_exact=False, rtol=2e-2, atol=2e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["two", "sharded"])
def test_weights_agree_within_what_adam_moves(roots: dict[str, Path], how: str) -> None:
    for load, name in (
        (load_generator, "gan"),
        (load_generator, "oasis"),
        (load_generator, "flow"),
        (load_generator, "concat"),
        (load_generator, "pseudo"),
        (load_decoder, "joint"),
        (load_generator, "joint/gan"),
    ):
        one, two = (dict(load(roots[run] / name).named_parameters()) for run in ("one", how))
        for key, tensor in one.items():
            difference = (two[key] - tensor).abs()
            assert difference.max() <= 2 * 6 * 5e-4, key  # six whole steps in opposite directions
            if tensor.ndim > 1:  # a bias in front of a normalisation has no gradient but rounding
                assert difference.median() <= 1e-4, key


@pytest.mark.slow
def test_killed_processes_resume_to_the_same_bits(
    features: Path, roots: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "sharded"
    command = (
        *TORCHRUN,
        "-m",
        "tests.stages.train_in_processes",
        "gan",
        str(features),
        str(root),
        str(root / "gan"),
    )
    assert run(*command, "3", cwd=ROOT, check=False, OMP_NUM_THREADS="1").returncode != 0
    assert list((root / "scratch" / "train-gan").glob("*/checkpoint.pt"))
    refused = run(*command, cwd=ROOT, check=False, OMP_NUM_THREADS="1", APART="")
    assert refused.returncode != 0
    assert (
        "checkpoint.pt: processes find different states here; set --scratch to a disk that all see"
        in refused.stderr
    )
    run(*command, cwd=ROOT, OMP_NUM_THREADS="1")
    for name in ("generator", "discriminator", "image_encoder"):
        ours, undisturbed = (
            folder / "gan" / f"{name}.safetensors" for folder in (root, roots["sharded"])
        )
        assert ours.read_bytes() == undisturbed.read_bytes()


def test_batch_norm_keeps_its_weights_and_in_one_process_its_results() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    plain[1][0].running_mean.uniform_()
    x = torch.randn(2, 3, 5, 5)
    before = plain.eval()(x)
    names = list(plain.state_dict())
    synchronise_batch_norm(plain)
    assert type(plain[1][0]) is SynchronisedBatchNorm2d
    assert list(plain.state_dict()) == names
    assert torch.equal(plain(x), before)


def test_the_batch_norm_of_a_frozen_backbone_is_left_alone() -> None:
    frozen = nn.Sequential(nn.BatchNorm2d(3)).requires_grad_(False).eval()
    network = synchronise_batch_norm(nn.Sequential(nn.BatchNorm2d(3), frozen))
    assert type(network[0]) is SynchronisedBatchNorm2d
    assert type(frozen[0]) is nn.BatchNorm2d
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_resumed_fused_adam_continues_with_the_same_bits() -> None:
    """Saved moments may be contiguous, as sharded training collects them; weights are not."""

    def trained(steps: int, weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        for step in range(steps):
            weight.grad = (weight.detach() + step).sin()
            optimizer.step()

    def fresh() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
        return weight, torch.optim.Adam([weight], 0.1, fused=True)

    weight, optimizer = fresh()
    trained(3, weight, optimizer)
    state = optimizer.state_dict()
    state["state"] = {
        number: {
            name: value.clone(memory_format=torch.contiguous_format) for name, value in each.items()
        }
        for number, each in state["state"].items()
    }
    resumed, its_optimizer = fresh()
    resumed.data.copy_(weight)
    load_optimizer_state(its_optimizer, state)
    trained(2, weight, optimizer)
    trained(2, resumed, its_optimizer)
    assert its_optimizer.state[resumed]["exp_avg"].stride() == resumed.stride()
    assert torch.equal(weight, resumed)
