"""Handwritten digits for DocMNIST: MNIST from the Hub, MNIST from local Parquet files, or scikit-learn's
digits.

Whatever the source, the three splits share no digit image, and which image is in which split does not depend
on any
seed of the caller: a model trained on one seed's DocMNIST can be tested on another's.
"""

import functools
import hashlib
import io
import os
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.utils import httpx
from PIL import Image

DIGIT_SIZE = 28
SPLITS = ("train", "validation", "test")
HUB_DATASET = "ylecun/mnist"
BUNDLED = "optdigits"
OFFLINE_OPTIONS = (
    'digits="optdigits" (the digits inside scikit-learn, nothing is downloaded) or digits="PATH" '
    "(a folder with MNIST's train and test Parquet files, or one Parquet file)"
)

_VALIDATION_SHARE = 0.2  # of MNIST's training images
_THREE_PARTS = (0.6, 0.2, 0.2)  # where the source has no test split of its own
_PARTITION_KEY = 20231  # fixes which image belongs to which split; a new number makes new splits
_STROKE_BOX = 20  # pixels: MNIST's digits lie in a box of this size in the middle of the image


class DigitSet(NamedTuple):
    """One split: `images` (N, 28, 28) uint8, light strokes on black; `labels` (N,) int64, 0 to 9."""

    images: np.ndarray
    labels: np.ndarray


def resolve_source(source: object) -> str:
    """Checks a digit source and brings it to its one spelling: "mnist", "optdigits" or an absolute path.

    Raises:
        ValueError: `source` is none of these, or nothing is at the path.
    """
    expected = f'digits must be "mnist", "{BUNDLED}", or the path of a folder or Parquet file with MNIST'
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"{expected}; got {source!r}")
    name = os.fspath(source)
    if name in ("mnist", BUNDLED):
        return name
    path = Path(name).expanduser().absolute()
    if not path.exists():
        raise ValueError(f"{expected}; got {name!r}, and nothing is at that path")
    _parquet_files(str(path))
    return str(path)


def fingerprint(source: str) -> str:
    """What identifies a resolved source: its name, or the sha256 of its files, wherever they lie."""
    if source in ("mnist", BUNDLED):
        return source
    digest = hashlib.sha256()
    for part, files in sorted(_parquet_files(source).items()):
        for file in files:
            digest.update(f"{part}:{file.stat().st_size}:".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=6)
def load_digits(source: str, split: str) -> DigitSet:
    """The digit images of one split.

    MNIST's training images are divided 80/20 into train and validation, its test images are test; a source
    without a test split is divided 60/20/20.

    Args:
        source: as `resolve_source` gives it.
        split: "train", "validation" or "test".

    Raises:
        ConnectionError: MNIST can be had neither from the Hub nor from the local cache; names the offline
        options.
        ValueError: the files do not hold 28x28 digits with labels 0 to 9, or the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    has_test = source == "mnist" or "test" in ({} if source == BUNDLED else _parquet_files(source))
    if has_test and split == "test":
        return _read(source, "test")
    whole = _read(source, "train")
    shares = (1 - _VALIDATION_SHARE, _VALIDATION_SHARE) if has_test else _THREE_PARTS
    bounds = np.round(np.cumsum((0.0, *shares)) * len(whole.labels)).astype(int)
    place = SPLITS.index(split)
    chosen = np.sort(_permutation(len(whole.labels))[bounds[place] : bounds[place + 1]])
    return DigitSet(whole.images[chosen], whole.labels[chosen])


def _permutation(count: int) -> np.ndarray:
    keys = np.random.Philox(np.random.SeedSequence(_PARTITION_KEY)).random_raw(count)
    return np.argsort(keys, kind="stable")


@functools.lru_cache(maxsize=4)
def _read(source: str, part: str) -> DigitSet:
    """All digits of a source's own part, "train" or "test"."""
    if source == BUNDLED:
        return _bundled_digits()
    if source == "mnist":
        table = _hub_table(part)
    else:
        table = pa.concat_tables([_read_columns(file) for file in _parquet_files(source)[part]])
    images = np.stack([_decode(value, source) for value in table["image"].to_pylist()])
    labels = np.asarray(table["label"].to_pylist(), dtype=np.int64)
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"digits {source!r}: labels must be 0 to 9, found {labels.min()} to {labels.max()}")
    return DigitSet(images, labels)


def _hub_table(part: str) -> pa.Table:
    try:
        mnist = datasets.load_dataset(HUB_DATASET, split=part)
    except (OSError, httpx.HTTPError) as error:
        raise ConnectionError(
            f"MNIST ({HUB_DATASET}) is not in the local cache and could not be had from the Hub ({error}). "
            f"Without network, use {OFFLINE_OPTIONS}."
        ) from error
    return mnist.with_format("arrow")[:]


def _read_columns(file: Path) -> pa.Table:
    try:
        # Only the two columns, as they lie in the file: what else is there, or in the metadata, may differ by
        # file.
        return pq.read_table(file, columns=["image", "label"]).select(["image", "label"]).replace_schema_metadata()
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(f"{file} is not a Parquet file with the columns image and label: {error}") from error


def _parquet_files(source: str) -> dict[str, list[Path]]:
    """Part ("train", "test") -> Parquet files of a folder; a single file is "train" alone."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"digits {source!r} must be a folder or a .parquet file")
        return {"train": [path]}
    files = sorted(path.rglob("*.parquet"))
    parts = {part: [file for file in files if file.name.startswith(part)] for part in ("train", "test")}
    empty = [part for part, found in parts.items() if not found]
    if empty:
        raise ValueError(
            f"digits folder {source!r} has no Parquet file with a name starting with {' or '.join(empty)}; "
            "expected files such as train-00000-of-00001.parquet and test-00000-of-00001.parquet"
        )
    return parts


def _decode(value: object, source: str) -> np.ndarray:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError(f"digits {source!r}: column image must hold the bytes of image files, found {value!r}")
    image = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    if image.shape != (DIGIT_SIZE, DIGIT_SIZE):
        raise ValueError(f"digits {source!r}: images must be 28x28 pixels, found one of shape {image.shape}")
    return image


def _bundled_digits() -> DigitSet:
    """scikit-learn's 1,797 digits of 8x8 pixels, values 0 to 16, enlarged to MNIST's layout in integers."""
    try:
        from sklearn.datasets import load_digits as load_bundled
    except ImportError as error:
        raise ImportError('digits="optdigits" needs scikit-learn: pip install scikit-learn') from error
    bunch = load_bundled()
    small = _sharpen(bunch.images.astype(np.int64))
    side = small.shape[1]
    # Pixel i of the enlarged image has its centre at (2i + 1) * side / (2 * box) - 1/2 of the small one; in
    # units of 1 / (2 * box) that is a whole number, so the bilinear weights are exact and equal on every
    # machine.
    unit = 2 * _STROKE_BOX
    centre = np.clip((2 * np.arange(_STROKE_BOX) + 1) * side - _STROKE_BOX, 0, unit * (side - 1))
    low = np.minimum(centre // unit, side - 2)
    weight = centre - low * unit
    rows = small[:, low] * (unit - weight)[:, None] + small[:, low + 1] * weight[:, None]
    both = rows[:, :, low] * (unit - weight) + rows[:, :, low + 1] * weight
    margin = (DIGIT_SIZE - _STROKE_BOX) // 2
    images = np.zeros((len(small), DIGIT_SIZE, DIGIT_SIZE), dtype=np.uint8)
    images[:, margin:-margin, margin:-margin] = np.minimum(both * 255 // (16 * unit * unit), 255)
    return DigitSet(images, bunch.target.astype(np.int64))


def _sharpen(small: np.ndarray) -> np.ndarray:
    """Sets strokes off against their neighbours; else thin ones fall below DocMNIST's threshold."""
    strong = small * 5 // 4
    padded = np.pad(strong, ((0, 0), (1, 1), (1, 1)))
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    return np.clip(strong + (4 * strong - around) // 4, 0, 24)
