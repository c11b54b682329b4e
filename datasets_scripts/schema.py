"""The columns that every corpus has, the vocabulary's metadata, and the check of a corpus before it is used.

Boxes are x0, y0, x1, y1 in pixels of the image, with x1 > x0 and y1 > y0. The vocabulary of attributes is the
list of names of the `attributes` column; its groups and prompt sentences are JSON in the `id` of that column's
ClassLabel, which survives Parquet and the Hub (a description does not).
"""

import json
import logging
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    LargeList,
    List,
    Value,
)
from PIL.Image import DecompressionBombError

logger = logging.getLogger(__name__)

DEFAULT_PROMPTS = ("a photo of {}.",)
OPTIONAL_COLUMNS = ("region_attributes",)
SKIPPED = ("no_region", "no_attribute", "corrupt_image")

# What Pillow raises on broken files of one format or another.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, TypeError, struct.error, DecompressionBombError)
_BOX_TOLERANCE = 1e-3  # pixels: what float32 rounding of x + width may add at the image's border
_VERDICT = "verdict"
_REASON = "reason"


def features(
    attributes: Sequence[str],
    groups: dict[str, list[str]] | None = None,
    templates: dict[str, list[str]] | None = None,
) -> Features:
    """The features of a corpus whose vocabulary is `attributes`.

    Args:
        attributes: distinct attribute names, at least one; their order is the label order.
        groups: group name -> its attributes; within a region the attributes of a group exclude each other.
        templates: group name -> prompt sentences, each with one `{}` for the attribute's name.

    Raises:
        ValueError: the vocabulary is empty or names an attribute twice, an attribute is in two groups, a template
            belongs to no group or has not exactly one `{}`.
    """
    names = list(attributes)
    if not names:
        raise ValueError("attributes must name at least one attribute, got none")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"attributes must be distinct, but these come more than once: {twice}")
    groups, templates = groups or {}, templates or {}
    _check_groups(groups, templates)
    metadata = json.dumps({"attribute_groups": groups, "templates": templates}) if groups else None
    return Features(
        {
            "image_id": Value("string"),
            "image": Image(),
            "text": Value("string"),
            "sentences": List(Value("string")),
            "regions": List(List(Value("float32"), length=4)),
            "attributes": List(ClassLabel(names=names, id=metadata)),
            "attribute_sentences": List(Value("int32")),
            "region_attributes": List(List(ClassLabel(names=names))),
        }
    )


def attribute_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The vocabulary: the names of the `attributes` column, in label order.

    Raises:
        ValueError: the dataset has no `attributes` column that is a list of ClassLabel.
    """
    found = (dataset.features or {}).get("attributes")
    if not _is_list(found) or not isinstance(found.feature, ClassLabel):
        raise ValueError(f"column 'attributes': expected a list of ClassLabel, found {found}")
    return list(found.feature.names)


def attribute_groups(dataset: Dataset | IterableDataset) -> dict[str, list[str]]:
    """Group name -> attribute names; {} where the dataset has no groups."""
    return _metadata(dataset).get("attribute_groups", {})


def attribute_prompts(dataset: Dataset | IterableDataset) -> dict[str, list[str]]:
    """Attribute name -> its prompt sentences: its group's templates filled in, else "a photo of {name}."."""
    templates = _metadata(dataset).get("templates", {})
    group_of = {name: group for group, names in attribute_groups(dataset).items() for name in names}
    return {
        name: [template.replace("{}", name) for template in templates.get(group_of.get(name)) or DEFAULT_PROMPTS]
        for name in attribute_names(dataset)
    }


def check_columns(dataset: Dataset | IterableDataset) -> None:
    """Checks that the columns of the schema are there with their types; other columns are free.

    Any image mode, string and list flavour, float width of boxes and integer width of indices will do. Only
    `region_attributes`, the truth for evaluation, may be missing.

    Raises:
        ValueError: names each missing or mis-typed column with what was expected and what was found.
    """
    found = dataset.features
    if found is None:
        raise ValueError("the dataset's features are unknown; call dataset = dataset.cast(features(attributes))")
    problems = []
    for column, expected in features(["..."]).items():
        if column not in found:
            if column not in OPTIONAL_COLUMNS:
                problems.append(f"column {column!r} is missing: expected {expected}")
        elif not _matches(found[column], expected):
            problems.append(f"column {column!r}: expected {expected}, found {found[column]}")
    if problems:
        raise ValueError(f"the dataset does not have the schema's columns: {'; '.join(problems)}")
    if "region_attributes" in found:
        truth = found["region_attributes"].feature.feature.names
        if truth != attribute_names(dataset):
            raise ValueError(
                "columns 'attributes' and 'region_attributes' have different vocabularies: "
                f"{attribute_names(dataset)} and {truth}"
            )


def usable(dataset: Dataset, strict: bool = False, num_proc: int | None = None) -> tuple[Dataset, dict[str, int]]:
    """Looks at every example once, decoding its image, and leaves out what cannot be trained on.

    An example is skipped for the first that applies: no region, no attribute, an image file that does not
    decode. Nothing skipped gives back the dataset itself.

    Args:
        dataset: a corpus in the schema.
        strict: a corrupt image file is an error instead.
        num_proc: processes for the pass; None for this one.

    Returns:
        The dataset without the skipped examples, and the counts `no_region`, `no_attribute`, `corrupt_image`.

    Raises:
        ValueError: a column is missing or mis-typed; an image_id is missing or comes twice; a text is missing;
            a box is empty, inverted, outside its image or not finite; a sentence index or the lengths of an
            example do not fit; an image is corrupt and `strict` is set; or no example is left.
    """
    check_columns(dataset)
    if len(dataset) == 0:
        raise ValueError("the dataset has no examples")
    plain = dataset.with_format(None)
    mode = plain.features["image"].mode
    raw = plain.cast_column("image", Image(mode=mode, decode=False))
    needed = [column for column in features(["..."]) if column in raw.column_names]
    _check_ids(plain["image_id"][:])
    verdicts = raw.select_columns(needed).map(
        _judge_batch,
        batched=True,
        batch_size=200,
        fn_kwargs={
            "decoder": Image(mode=mode),
            "vocabulary": len(attribute_names(dataset)),
        },
        remove_columns=needed,
        features=Features({_VERDICT: Value("string"), _REASON: Value("string")}),
        num_proc=num_proc,
        keep_in_memory=True,
        load_from_cache_file=False,
        desc="Checking examples",
    )
    verdict = np.asarray(verdicts[_VERDICT][:], dtype=object)
    for index in np.flatnonzero(verdict == "corrupt_image"):
        message = verdicts[int(index)][_REASON]
        if strict:
            raise ValueError(message)
        logger.warning("skipped: %s", message)
    counts = {name: int((verdict == name).sum()) for name in SKIPPED}
    keep = np.flatnonzero(verdict == "")
    if len(keep) == len(dataset):
        return dataset, counts
    if len(keep) == 0:
        raise ValueError(f"none of the {len(dataset)} examples can be used: {counts}")
    logger.warning("skipped %d of %d examples: %s", len(dataset) - len(keep), len(dataset), counts)
    return dataset.select(keep), counts


def _metadata(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    attribute_names(dataset)
    return json.loads((dataset.features or {})["attributes"].feature.id or "{}")


def _check_groups(groups: dict[str, list[str]], templates: dict[str, list[str]]) -> None:
    counts = Counter(name for names in groups.values() for name in names)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"groups must not share attributes, but these are in more than one place: {twice}")
    for group, sentences in templates.items():
        if group not in groups:
            raise ValueError(f"templates names the group {group!r}, which is not one of {sorted(groups)}")
        for sentence in sentences:
            if sentence.count("{}") != 1:
                raise ValueError(f"a template needs exactly one '{{}}', got {sentence!r} for group {group!r}")


def _is_list(feature: Any) -> TypeGuard[List | LargeList]:
    return isinstance(feature, List | LargeList)


def _matches(found: Any, expected: Any) -> bool:
    if _is_list(expected):
        if not _is_list(found) or not _matches(found.feature, expected.feature):
            return False
        return getattr(expected, "length", -1) == -1 or getattr(found, "length", -1) in (-1, expected.length)
    if not isinstance(expected, Value):
        return isinstance(found, type(expected))
    if not isinstance(found, Value):
        return False
    kinds = {
        "string": ("string", "large_string", "string_view"),
        "float32": ("float32", "float64"),
        "int32": ("int8", "int16", "int32", "int64"),
    }
    return found.dtype in kinds[expected.dtype]


def _check_ids(image_ids: list[str | None]) -> None:
    if None in image_ids:
        raise ValueError(f"example {image_ids.index(None)} has no image_id")
    twice = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
    if twice:
        raise ValueError(f"image_id must be unique within a split, but {len(twice)} come more than once: {twice[:5]}")


def _judge_batch(batch: dict[str, list[Any]], decoder: Image, vocabulary: int) -> dict[str, list[str]]:
    examples = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    judged = [_judge(example, decoder, vocabulary) for example in examples]
    return {_VERDICT: [verdict for verdict, _ in judged], _REASON: [reason for _, reason in judged]}


def _judge(example: dict[str, Any], decoder: Image, vocabulary: int) -> tuple[str, str]:
    """The reason to skip an example ("" for none) and, for a corrupt image, the message that names it."""
    _check_indices(example, vocabulary)
    if not example["regions"]:
        return "no_region", ""
    if not example["attributes"]:
        return "no_attribute", ""
    try:
        if example["image"] is None:
            raise ValueError("there is no image")
        image = decoder.decode_example(example["image"])
    except _DECODE_ERRORS as error:
        path = (example["image"] or {}).get("path")
        where = f" ({path})" if path else ""
        return "corrupt_image", f"image {example['image_id']!r}{where} does not decode: {error}"
    _check_boxes(example, *image.size)
    return "", ""


def _check_indices(example: dict[str, Any], vocabulary: int) -> None:
    who = f"image {example['image_id']!r}"
    attributes = example["attributes"] or []
    sentences = example["sentences"] or []
    stated_by = example["attribute_sentences"] or []
    regions = example["regions"] or []
    truth = example.get("region_attributes") or []
    if example["text"] is None or None in sentences:
        raise ValueError(f"{who}: {'text' if example['text'] is None else 'one of the sentences'} is missing (null)")
    if len(stated_by) != len(attributes):
        raise ValueError(
            f"{who}: attribute_sentences has {len(stated_by)} entries for {len(attributes)} attributes; "
            "expected one for each"
        )
    for index in stated_by:
        if index is None or not -1 <= index < len(sentences):
            raise ValueError(f"{who}: attribute_sentences names sentence {index}, expected -1 to {len(sentences) - 1}")
    for label in [*attributes, *(label for labels in truth for label in labels)]:
        if label is None or not 0 <= label < vocabulary:
            raise ValueError(f"{who}: attribute label {label}, expected 0 to {vocabulary - 1}")
    if truth and len(truth) != len(regions):
        raise ValueError(
            f"{who}: region_attributes has {len(truth)} entries for {len(regions)} regions; expected one for each"
        )


def _check_boxes(example: dict[str, Any], width: int, height: int) -> None:
    for index, box in enumerate(example["regions"]):
        where = f"image {example['image_id']!r}, region {index}: box {box}"
        if box is None or len(box) != 4:
            raise ValueError(f"{where} must be x0, y0, x1, y1 (image size {width} x {height} pixels)")
        x0, y0, x1, y1 = box
        if not all(value is not None and np.isfinite(value) for value in box):
            problem = "is not finite"
        elif x1 < x0 or y1 < y0:
            problem = "is inverted"
        elif x1 == x0 or y1 == y0:
            problem = "is empty"
        elif min(x0, y0) < -_BOX_TOLERANCE or x1 > width + _BOX_TOLERANCE or y1 > height + _BOX_TOLERANCE:
            problem = "is outside the image"
        else:
            continue
        raise ValueError(f"{where} {problem} (image size {width} x {height} pixels)")
