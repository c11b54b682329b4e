"""DocMNIST, the synthetic benchmark of ViLLA (section 4.1): images of nine cells whose every attribute is
known.

    import datasets_scripts
    from datasets import load_dataset
    train = load_dataset("docmnist", complexity=29.4, split="train")

Each cell of 28x28 pixels holds a handwritten digit in a colour and, two times in three, the outline of a
shape in a
size: two or four region-attribute pairs. Cells are added to an image until nine are filled or the next would
exceed the image's maximum of pairs; images are added to a split until the next would exceed its budget of
pairs.

`complexity` is the average number of pairs per image that comes out, not the maximum that goes in: the
expected average of every maximum is computed exactly, and two neighbouring maxima are mixed.
"""

import difflib
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets.builder import Key
from datasets.fingerprint import Hasher

from . import schema
from .digits import SPLITS, DigitSet, fingerprint, load_digits, resolve_source
from .docmnist_rendering import (
    ATTRIBUTES,
    CELLS,
    COLOURS,
    DIGIT_SIZE,
    DIGITS,
    GRID,
    GROUPS,
    SHAPES,
    SIZES,
    TEMPLATES,
    Drawing,
    RandomWords,
    draw,
    png,
)

__all__ = ["DocMnist", "DocMnistConfig", "draw", "images_of_split", "split_digits"]

COMPLEXITY_RANGE = (2, 30)
BUDGET_RANGE = (4 * CELLS, 100_000_000)
SEED_RANGE = (0, 2**32 - 1)
NUM_SHARDS = 16
BATCH_IMAGES = 256

_PLAN, _DRAW = 0, 1  # purposes of random streams
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: multiples of it, modulo 2**64, spread evenly
_BOXES = [
    [float(DIGIT_SIZE * x) for x in (cell % GRID, cell // GRID, cell % GRID + 1, cell // GRID + 1)]
    for cell in range(CELLS)
]
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
_PROSE = (
    "DocMNIST: synthetic documents of handwritten digits with colours, shapes and sizes, after ViLLA "
    "(Varma et al., 2023). {complexity} region-attribute pairs per image on average; "
    "digits: {digits}; seed: {seed}."
)


@dataclass
class DocMnistConfig(datasets.BuilderConfig):
    """What `load_dataset("docmnist", ...)` takes.

    complexity: average number of region-attribute pairs per image, 2 to 30, met to within 0.1. A subset of
        the attributes reaches less; the error of a value out of reach states the range.
    attribute_budget, validation_budget, test_budget: region-attribute pairs of the splits, 36 to 100,000,000.
    attributes: None for all twenty, or some of them, in any order. At least one digit. Without colours the
        digits are white; without shapes there are no outlines, and so no sizes; without sizes outlines are
        medium. A cell's outline is none or one of the shapes, evenly.
    digits: "mnist" (from the Hub), "optdigits" (inside scikit-learn), or a folder or Parquet file with MNIST.
    seed: 0 to 2**32 - 1. The same seed gives the same bytes on any machine and for any number of processes.

    Raises:
        ValueError: a value of the wrong type or out of range, named with what was expected.
    """

    complexity: float = 29.4
    attribute_budget: int = 300_000
    attributes: Sequence[str] | None = None
    digits: str = "mnist"
    seed: int = 0
    validation_budget: int = 10_000
    test_budget: int = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.resolve()

    def resolve(self) -> None:
        """Checks every field and brings it to its one spelling, so that equal requests have one cache."""
        if self.data_dir is not None or self.data_files is not None:
            raise ValueError('docmnist is drawn, not read: it takes no data_dir or data_files (see "digits")')
        self.complexity = _check_complexity(self.complexity)
        for field in ("attribute_budget", "validation_budget", "test_budget"):
            setattr(self, field, _check_integer(field, getattr(self, field), BUDGET_RANGE))
        self.seed = _check_integer("seed", self.seed, SEED_RANGE)
        self.attributes = _check_attributes(self.attributes)
        self.digits = resolve_source(self.digits)
        _mixture(self.complexity, _CellRule.of(self.attributes))
        self.name = f"complexity_{self.complexity}"

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: datasets.Features | None = None) -> str:
        """The cache's name: every resolved field counts, however it was spelled."""
        self.resolve()
        fields = [
            self.complexity,
            self.attribute_budget,
            self.vocabulary,
            fingerprint(self.digits),
            self.seed,
            self.validation_budget,
            self.test_budget,
            custom_features,
        ]
        return f"{self.name}-{Hasher.hash(fields)}"

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The attribute names in label order."""
        return tuple(ATTRIBUTES if self.attributes is None else self.attributes)

    def budget(self, split: str) -> int:
        """The region-attribute pairs that a split may hold."""
        budgets = (self.attribute_budget, self.validation_budget, self.test_budget)
        return dict(zip(SPLITS, budgets, strict=True))[split]


class SplitImages(NamedTuple):
    """What is decided about a split's n images before any is drawn.

    plain: (n,) int64, cells with a digit alone; shaped: (n,) int64, cells with an outline too; pairs: (n,)
    int64, the region-attribute pairs of the image.
    """

    plain: np.ndarray
    shaped: np.ndarray
    pairs: np.ndarray


class _CellRule(NamedTuple):
    """Region-attribute pairs of a plain and of an outlined cell, and how often a cell is outlined."""

    plain_pairs: int
    shaped_pairs: int
    shaped_share: Fraction

    @classmethod
    def of(cls, attributes: Sequence[str] | None) -> "_CellRule":
        names = set(ATTRIBUTES if attributes is None else attributes)
        plain = 1 + bool(names & set(COLOURS))
        shapes = len(names & set(SHAPES))
        return cls(plain, plain + bool(shapes) + bool(names & set(SIZES)), Fraction(shapes, shapes + 1))

    def pairs(self, plain: int, shaped: int) -> int:
        return plain * self.plain_pairs + shaped * self.shaped_pairs


def split_digits(config: DocMnistConfig, split: str) -> DigitSet:
    """The digit images that a split draws from: its own, of the vocabulary's digits.

    Raises:
        ConnectionError: MNIST can't be had; names the offline options.
        ValueError: the source has no image of one of the digits.
    """
    digits = load_digits(config.digits, split)
    labels = [label for label, name in enumerate(DIGITS) if name in config.vocabulary]
    missing = sorted(set(labels) - set(digits.labels.tolist()))
    if missing:
        raise ValueError(f"digits {config.digits!r} has no image of {missing} for the {split} split")
    if len(labels) == len(DIGITS):
        return digits
    chosen = np.isin(digits.labels, labels)
    return DigitSet(digits.images[chosen], digits.labels[chosen])


def images_of_split(config: DocMnistConfig, split: str) -> SplitImages:
    """How many images a split has, and how many plain and outlined cells each of them.

    An image follows exactly the distribution that adding cells one by one gives, but the images of a split
    are spread evenly over it (a low-discrepancy sequence in place of independent draws), so that the realised
    complexity of small splits is close to the expected one too.
    """
    rule = _CellRule.of(config.attributes)
    mixture = _mixture(config.complexity, rule)
    budget = config.budget(split)
    kinds = np.array([(plain, shaped, rule.pairs(plain, shaped)) for plain, shaped in mixture])
    edges = list(itertools.accumulate(mixture.values()))[:-1]
    thresholds = np.array([int(edge * 2**64) for edge in edges], dtype=np.uint64)
    phase = RandomWords(config.seed, SPLITS.index(split), _PLAN, 0).words(1)
    steps = np.arange(budget // int(kinds[:, 2].min()), dtype=np.uint64)
    drawn = kinds[np.searchsorted(thresholds, phase + steps * np.uint64(_GOLDEN), side="right")]
    count = int(np.searchsorted(np.cumsum(drawn[:, 2]), budget, side="right"))
    return SplitImages(*drawn[:count].T)


@functools.lru_cache(maxsize=64)
def _mixture(complexity: float, rule: _CellRule) -> dict[tuple[int, int], Fraction]:
    """(plain cells, outlined cells) -> share of images, ordered by pairs, with the average of pairs asked
    for.

    Raises:
        ValueError: no mixture has it; states the reachable range.
    """
    target = Fraction(str(complexity))
    averages: dict[Fraction, dict[tuple[int, int], Fraction]] = {}
    for maximum in range(rule.plain_pairs, CELLS * rule.shaped_pairs + 1):
        outcomes = _outcomes(maximum, rule)
        averages[sum((rule.pairs(*cells) * share for cells, share in outcomes.items()), Fraction(0))] = outcomes
    lowest, highest = min(averages), max(averages)
    if not lowest <= target <= highest:
        low, high = max(Fraction(COMPLEXITY_RANGE[0]), lowest), min(Fraction(COMPLEXITY_RANGE[1]), highest)
        reach = f"{float(low):g} to {float(high):g}" if low <= high else "nothing in the allowed range"
        raise ValueError(f"complexity {complexity} is out of reach with these attributes; they reach {reach}")
    below = max(average for average in averages if average <= target)
    above = min(average for average in averages if average >= target)
    share_above = (target - below) / (above - below) if above > below else Fraction(0)
    mixed: dict[tuple[int, int], Fraction] = defaultdict(Fraction)
    for average, weight in ((below, 1 - share_above), (above, share_above)):
        for cells, share in averages[average].items():
            mixed[cells] += weight * share
    return {
        cells: mixed[cells] for cells in sorted(mixed, key=lambda cells: (rule.pairs(*cells), cells)) if mixed[cells]
    }


def _outcomes(maximum: int, rule: _CellRule) -> dict[tuple[int, int], Fraction]:
    """(plain cells, outlined cells) -> probability, when cells are added one by one up to `maximum` pairs.

    No image stays empty: where the maximum holds no outlined cell, the first cell is a plain one.
    """
    first_share = rule.shaped_share if maximum >= rule.shaped_pairs else Fraction(0)
    growing = {(0, 0): Fraction(1)}
    finished: dict[tuple[int, int], Fraction] = defaultdict(Fraction)
    for step in range(CELLS):
        share_shaped = rule.shaped_share if step else first_share
        grown: dict[tuple[int, int], Fraction] = defaultdict(Fraction)
        for (plain, shaped), share in growing.items():
            for cells, chance in (
                ((plain + 1, shaped), 1 - share_shaped),
                ((plain, shaped + 1), share_shaped),
            ):
                if rule.pairs(*cells) > maximum:
                    finished[plain, shaped] += share * chance
                else:
                    grown[cells] += share * chance
        growing = grown
    for cells, share in growing.items():
        finished[cells] += share
    return finished


def _example(image_id: str, drawing: Drawing, row: int, vocabulary: tuple[str, ...]) -> dict[str, Any]:
    cells = drawing.cells[row]
    filled = np.flatnonzero(cells[:, 0] >= 0)
    stated = np.unique(cells[cells >= 0])
    order = drawing.order[row]
    spoken = stated[np.argsort(order[stated], kind="stable")].tolist()
    sentences = []
    for label in spoken:
        templates = TEMPLATES[_GROUP_OF[vocabulary[label]]]
        sentences.append(templates[drawing.choices[row, label] % len(templates)].format(vocabulary[label]))
    return {
        "image_id": image_id,
        "image": {"bytes": png(drawing.paint[row]), "path": None},
        "text": " . ".join(sentences),
        "sentences": sentences,
        "regions": [_BOXES[cell] for cell in filled],
        "attributes": stated.tolist(),
        "attribute_sentences": [spoken.index(label) for label in stated.tolist()],
        "region_attributes": [cells[cell][cells[cell] >= 0].tolist() for cell in filled],
    }


def _check_complexity(value: object) -> float:
    low, high = COMPLEXITY_RANGE
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError(f"complexity must be a number from {low} to {high}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"complexity must be from {low} to {high} region-attribute pairs, got {value!r}")
    return float(value)


def _check_integer(field: str, value: object, limits: tuple[int, int]) -> int:
    low, high = limits
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ValueError(f"{field} must be a whole number from {low} to {high}, got {value!r}")
    return int(value)


def _check_attributes(value: object) -> list[str] | None:
    """The attributes in label order; None for all twenty."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"attributes must be a list of names, a subset of {list(ATTRIBUTES)}; got {value!r}")
    for name in value:
        if name not in ATTRIBUTES:
            nearest = difflib.get_close_matches(name.lower(), ATTRIBUTES, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown attribute {name!r}, did you mean {nearest!r}? Known are {list(ATTRIBUTES)}")
    chosen = [name for name in ATTRIBUTES if name in value]
    if not set(chosen) & set(DIGITS):
        raise ValueError(f"attributes must include at least one digit of {list(DIGITS)}; got {list(value)}")
    if set(chosen) & set(SIZES) and not set(chosen) & set(SHAPES):
        raise ValueError(f"sizes are sizes of shapes: add a shape of {list(SHAPES)} to the attributes {list(value)}")
    return None if len(chosen) == len(ATTRIBUTES) else chosen


class DocMnist(datasets.GeneratorBasedBuilder):
    """The builder behind `load_dataset("docmnist")`; its columns are those of `schema.features`."""

    BUILDER_CONFIG_CLASS = DocMnistConfig
    BUILDER_CONFIGS = [
        DocMnistConfig(version=datasets.Version("1.0.0"), complexity=complexity)
        for complexity in (5.0, 9.1, 15.2, 21.2, 29.4)
    ]
    DEFAULT_CONFIG_NAME = "complexity_29.4"

    config: DocMnistConfig

    def _info(self) -> datasets.DatasetInfo:
        vocabulary = self.config.vocabulary
        groups = {group: [name for name in names if name in vocabulary] for group, names in GROUPS.items()}
        groups = {group: names for group, names in groups.items() if names}
        # As they stand in the texts, where no sentence ends in a full stop: a model that was trained on those may
        # read another word into it.
        prompts = {group: list(TEMPLATES[group]) for group in groups}
        prose = _PROSE.format(
            complexity=self.config.complexity, digits=fingerprint(self.config.digits), seed=self.config.seed
        )
        return datasets.DatasetInfo(description=prose, features=schema.features(vocabulary, groups, prompts))

    def _split_generators(
        self, dl_manager: datasets.DownloadManager | datasets.StreamingDownloadManager
    ) -> list[datasets.SplitGenerator]:
        generators = []
        for split in SPLITS:
            if not dl_manager.is_streaming:
                # Before the processes start: they share what is read here, and an error is shown as it is.
                split_digits(self.config, split)
            count = len(images_of_split(self.config, split).pairs)
            bounds = np.linspace(0, count, min(NUM_SHARDS, count) + 1).astype(int).tolist()
            shards = [(shard, *bounds[shard : shard + 2]) for shard in range(len(bounds) - 1)]
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs={"shards": shards, "split": split}))
        return generators

    def _generate_examples(
        self, shards: list[tuple[int, int, int]], split: str
    ) -> Iterator[tuple[Key, dict[str, Any]]]:
        digits = split_digits(self.config, split)
        images = images_of_split(self.config, split)
        vocabulary = self.config.vocabulary
        for place, (shard, start, stop) in enumerate(shards):
            random = RandomWords(self.config.seed, SPLITS.index(split), _DRAW, shard)
            for first in range(start, stop, BATCH_IMAGES):
                batch = slice(first, min(first + BATCH_IMAGES, stop))
                drawing = draw(vocabulary, digits, images.plain[batch], images.shaped[batch], random)
                for row in range(len(drawing.paint)):
                    index = first + row
                    yield (
                        Key(place, index - start),
                        _example(f"{split}-{index:08d}", drawing, row, vocabulary),
                    )
