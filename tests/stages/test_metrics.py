"""Pixel accuracy and mIoU equal values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from stages.segmentation.metrics import confusion_matrix, mean_iou, score

NAMES = ("a", "b", "c", "d")


def test_by_hand_with_void_and_an_absent_class() -> None:
    truth = torch.tensor([[[0, 0, 1], [1, 2, 255]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 1, 1], [1, 0, 3]]])  # the 3 is on void: it does not count
    scores = score(confusion_matrix(predicted, truth, 4), NAMES)
    # a: 1 pixel correct, 1 missed, 1 wrongly predicted; b: 2 correct, 1 wrongly predicted;
    # c: 0 of 1 correct; d: absent.
    assert scores.pixel_accuracy == pytest.approx(3 / 5)
    assert scores.iou == {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 3), "c": 0.0, "d": None}
    assert scores.miou == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert scores.absent == ["d"]
    assert scores.confusion == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_a_class_that_is_only_predicted_counts_with_zero() -> None:
    scores = score(torch.tensor([[3, 1], [0, 0]]), ("a", "b"))
    assert scores.iou == {"a": pytest.approx(3 / 4), "b": 0.0}
    assert scores.miou == pytest.approx(3 / 8)
    assert scores.absent == []


def test_batches_add_up_to_the_whole_split() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (6, 9, 7), generator=generator, dtype=torch.uint8)
    predicted = torch.randint(0, 4, (6, 9, 7), generator=generator)
    parts = sum(
        confusion_matrix(predicted[start : start + 2], truth[start : start + 2], 4)
        for start in (0, 2, 4)
    )
    assert torch.equal(parts, confusion_matrix(predicted, truth, 4))


def test_a_split_without_a_label_has_no_score() -> None:
    with pytest.raises(ValueError, match="not one labelled pixel"):
        score(torch.zeros(2, 2, dtype=torch.long), ("a", "b"))


def test_headline_mean_leaves_absent_classes_out() -> None:
    assert mean_iou({"a": 0.5, "b": None, "c": 0.7}, ("a", "b", "c")) == pytest.approx(0.6)
