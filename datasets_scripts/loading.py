"""From a corpus's name to checked examples, and from examples to a batch: what trainers and evaluators share."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset, load_from_disk

from .schema import check_columns, usable


def load_split(
    name: str, options: dict[str, Any], split: str, strict: bool = False, num_proc: int | None = None
) -> Dataset:
    """Load one split of a corpus and check every example.

    Args:
        name: a name for `load_dataset` ("docmnist", "org/corpus", ...), or a folder written by
            `DatasetDict.save_to_disk`.
        options: further arguments of `load_dataset`, such as `{"complexity": 29.4}`.
        split: "train", "validation" or "test".
        strict: whether a corrupt image is an error instead of being skipped.
        num_proc: processes that generate and check.

    Raises:
        ValueError: the split is missing, the columns are not those of the schema, or an example is bad
            (see `schema.usable`).
    """
    if Path(name, "dataset_dict.json").is_file():
        splits = load_from_disk(name)
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}; it has {sorted(splits)}.")
        dataset = splits[split]
    else:
        try:
            dataset = load_dataset(name, split=split, num_proc=num_proc, **options)
        except ConnectionError as error:
            raise ConnectionError(
                f"{error} Without the Hub, give a folder written by DatasetDict.save_to_disk, or docmnist with "
                'digits="optdigits" or a folder with MNIST.'
            ) from error
    check_columns(dataset)
    return usable(dataset, strict=strict, num_proc=num_proc)[0]


class Collator:
    """Examples of the schema -> a batch.

    The batch holds `image_id`, `text`, `sentences`, `attributes` and `attribute_sentences` as lists, and
    tensors: `pixel_values` (B, 3, H, W), `boxes` (B, R, 4) in pixels of `pixel_values`, `region_mask` (B, R)
    bool, and `labels` (B, A) bool, the attributes that each text states. Columns beside the schema's, such as a
    pairs dataset's, are passed through as lists.

    Args:
        processor: called with `images=`, `boxes=` and `return_tensors="pt"`; a `VillaProcessor`.
        num_attributes: size A of the vocabulary.
    """

    def __init__(self, processor: Any, num_attributes: int) -> None:
        self.processor = processor
        self.num_attributes = num_attributes

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {key: [example[key] for example in examples] for key in examples[0]}
        inputs = self.processor(images=batch.pop("image"), boxes=batch.pop("regions"), return_tensors="pt")
        batch.update(inputs)
        batch["labels"] = multi_hot(batch["attributes"], self.num_attributes)
        return batch


def multi_hot(indices: list[list[int]], size: int) -> torch.Tensor:
    """Lists of indices -> (B, size) bool."""
    rows = torch.zeros(len(indices), size, dtype=torch.bool)
    for row, columns in zip(rows, indices, strict=True):
        row[columns] = True
    return rows


def region_labels(region_attributes: list[list[list[int]]], max_regions: int, size: int) -> torch.Tensor:
    """Per image and region a list of attribute indices -> (B, max_regions, size) bool, padded with False."""
    labels = torch.zeros(len(region_attributes), max_regions, size, dtype=torch.bool)
    for image, regions in enumerate(region_attributes):
        labels[image, : len(regions)] = multi_hot(regions, size)
    return labels
