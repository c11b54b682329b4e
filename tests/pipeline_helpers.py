"""What the tests of the pipelines and of the handler share: pictures, boxes, labels, and a comparison of results."""

import numpy as np
import pytest
from PIL import Image

DETECTION, CLASSIFICATION, MAPPING = (
    "zero-shot-object-detection",
    "zero-shot-image-classification",
    "region-attribute-mapping",
)
LABELS = ["red car", "blue", "a green car"]
BOXES = [[0, 0, 60, 40], [10.7, 5.2, 30.9, 25], [30, 0, 59, 12]]
SIDES = ("xmin", "ymin", "xmax", "ymax")
SIZES = [(60, 40), (20, 33), (41, 41), (90, 15), (12, 70)]


def picture(width=60, height=40, seed=0):
    """Noise over a gradient, so that regions differ from each other."""
    noise = np.random.default_rng(seed).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, width)[None, :, None] * np.array([1, 0, -1]) % 128
    return Image.fromarray((noise + slope).astype(np.uint8))


def corners(box):
    """x0, y0, x1, y1 as a pipeline gives a box."""
    return dict(zip(SIDES, (int(side) for side in box), strict=True))


def assert_same(found, expected, tolerance=1e-5):
    """Equal in structure, texts and whole numbers, and near in scores."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=tolerance)
    else:
        assert found == expected
