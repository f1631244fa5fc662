"""A checked and encoded sample, with its statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featurestore.layouts import IMAGES, MASKS, VALUES
from featurestore.schema import StoreSpec
from featurestore.statistics import Statistics


@dataclass(frozen=True)
class PreparedSample:
    """A sample that passed the spec's checks, encoded as a shard stores it.

    Attributes
    ----------
    id, view
        Id of the image, and name of its view, such as ``identity``.
    rows
        The sample's row in each dataset, by the dataset's name in the file.
    values
        Of layout ``zeros``: the values that are not zero, by group of the layer.
    statistics
        Statistics of the sample.
    """

    id: str
    view: str
    rows: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    statistics: Statistics

    @classmethod
    def of(
        cls,
        spec: StoreSpec,
        *,
        id: str,
        view: str,
        features: Sequence[np.ndarray],
        mask: np.ndarray,
        image: np.ndarray | None,
    ) -> PreparedSample:
        """Encode a sample, and compute its statistics.

        Parameters
        ----------
        spec
            Properties of every sample.
        id, view
            Id of the image, and name of its view, such as ``identity``.
        features
            (c, h, w) of each layer, of the spec's type.
        mask
            (H, W) uint8.
        image
            (H, W, 3) uint8 where the spec has images, else None.
        """
        rows = {MASKS: mask} if image is None else {MASKS: mask, IMAGES: image}
        packed: dict[str, np.ndarray] = {}
        layers = [np.ascontiguousarray(layer) for layer in features]  # transposed at most once
        for (group, layout), layer in zip(spec.layouts.items(), layers, strict=True):
            encoded = layout.encode(layer)
            if VALUES in encoded:
                packed[group] = encoded.pop(VALUES)
            rows |= {f"{group}/{name}".lstrip("/"): row for name, row in encoded.items()}
        return cls(id, view, rows, packed, Statistics.of_sample(spec, layers, mask))
