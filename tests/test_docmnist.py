"""DocMNIST: complexities, counts, rules of drawing, determinism, subsets, and every refusal."""

import hashlib
import io
import json
import statistics
import time
import zlib

import numpy as np
import pytest
from datasets import Image, load_dataset, load_dataset_builder
from PIL import Image as PilImage

from datasets_scripts import schema
from datasets_scripts.digits import SPLITS, DigitSet
from datasets_scripts.docmnist import DocMnistConfig, draw, images_of_split, split_digits
from datasets_scripts.docmnist_rendering import (
    ATTRIBUTES,
    CIRCLE_RADII,
    COLOURS,
    DIGITS,
    GROUPS,
    PALETTE,
    RECTANGLE_SIDES,
    TEMPLATES,
    RandomWords,
    _outlines,
    png,
)

SMALL = {"digits": "optdigits", "attribute_budget": 3000, "validation_budget": 500, "test_budget": 500}
REQUESTS = (2, 5.0, 9.1, 15.2, 21.2, 29.4, 30)
WHITE = len(PALETTE) - 1


def config(**changes):
    return DocMnistConfig(**(SMALL | changes))


def sample(count=400, split="train", **changes):
    settings = config(**changes)
    images = images_of_split(settings, split)
    stream = RandomWords(settings.seed, 0, 1, 0)
    digits = split_digits(settings, split)
    return draw(settings.vocabulary, digits, images.plain[:count], images.shaped[:count], stream), settings


def content(data):
    """A hash over everything, image bytes included."""
    digest = hashlib.sha256()
    for row in data.cast_column("image", Image(decode=False)):
        digest.update(row.pop("image")["bytes"])
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load_dataset("docmnist", cache_dir=str(tmp_path_factory.mktemp("cache")), **SMALL)


# How many images, and how complex


@pytest.mark.parametrize("complexity", REQUESTS)
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_complexity_is_met_in_every_split(complexity, seed):
    settings = DocMnistConfig(complexity=complexity, digits="optdigits", seed=seed)
    for split in SPLITS:
        pairs = images_of_split(settings, split).pairs
        assert abs(pairs.mean() - complexity) <= 0.1
        assert pairs.sum() <= settings.budget(split) < pairs.sum() + 37


def test_the_paper_s_numbers_of_images():
    def count(complexity):
        return len(images_of_split(DocMnistConfig(complexity=complexity, digits="optdigits"), "train").pairs)

    assert abs(count(29.4) - 10_200) <= 102
    assert abs(count(5.0) - 60_500) <= 605


@pytest.mark.parametrize("maximum", [2, 3, 6, 16, 31, 32, 36])
def test_expected_complexity_against_adding_cells_one_by_one(maximum):
    from datasets_scripts.docmnist import _CellRule, _outcomes

    rule = _CellRule.of(None)
    outcomes = _outcomes(maximum, rule)
    assert sum(outcomes.values()) == 1
    random = np.random.default_rng(0)
    totals = []
    for _ in range(20_000):
        total = cells = 0
        while cells < 9:
            pairs = 4 if random.random() < 2 / 3 else 2
            if not cells and maximum < 4:
                pairs = 2
            if total + pairs > maximum:
                break
            total, cells = total + pairs, cells + 1
        totals.append(total)
    expected = float(sum(rule.pairs(*cells) * share for cells, share in outcomes.items()))
    assert abs(np.mean(totals) - expected) < 0.07
    for total in set(totals):
        share = float(sum(chance for cells, chance in outcomes.items() if rule.pairs(*cells) == total))
        assert abs(np.mean(np.equal(totals, total)) - share) < 0.02


def test_field_notes_maxima_give_their_complexities():
    from datasets_scripts.docmnist import _CellRule, _outcomes

    rule = _CellRule.of(None)
    for maximum, complexity in {6: 5.0, 10: 9.1, 16: 15.2, 22: 21.2, 28: 27.0, 32: 29.4, 36: 30.0}.items():
        average = sum(rule.pairs(*cells) * share for cells, share in _outcomes(maximum, rule).items())
        assert abs(float(average) - complexity) < 0.06


# What is drawn


def test_cells_hold_what_their_labels_say():
    drawing, settings = sample()
    digits = split_digits(settings, "train")
    strokes = {label: set() for label in range(10)}
    for image, label in zip(digits.images, digits.labels, strict=True):
        strokes[int(label)].add((image >= 120).tobytes())
    outlines = _outlines()
    seen = set()
    for paint, cells in zip(drawing.paint[:120], drawing.cells, strict=False):
        for place, (digit, colour, shape, size) in enumerate(cells.tolist()):
            row, column = divmod(place, 3)
            cell = paint[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
            if digit < 0:
                assert not cell.any() and (colour, shape, size) == (-1, -1, -1)
                continue
            ink = list(COLOURS).index(ATTRIBUTES[colour]) + 1
            assert set(np.unique(cell)) <= {0, ink, WHITE}
            white = cell == WHITE
            assert (shape < 0) == (size < 0) == (not white.any())
            if shape < 0:
                assert (cell == ink).tobytes() in strokes[digit]
            else:
                kind = GROUPS["shape"].index(ATTRIBUTES[shape]), GROUPS["size"].index(ATTRIBUTES[size])
                assert any(np.array_equal(white, outline == WHITE) for outline in outlines[kind])
                seen.add(kind)
    assert len(seen) == 6


def test_paint_threshold_is_120():
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 14, 10:14] = 118, 119, 120, 121
    drawn = draw(
        ("zero", "red"),
        DigitSet(image, np.array([0])),
        np.array([9]),
        np.array([0]),
        RandomWords(0, 0, 0, 0),
    )
    assert drawn.images.shape == (1, 84, 84, 3)
    assert np.argwhere(drawn.images[0, :28, :28].any(axis=-1)).tolist() == [[14, 12], [14, 13]]
    assert drawn.images[0, 14, 12].tolist() == [255, 0, 0]


def test_outlines_have_the_sizes_of_the_rules():
    outlines = _outlines() == WHITE
    for size in range(3):
        ring, circle = outlines[0, size], outlines[1, size]
        for pictures, extent in ((ring, RECTANGLE_SIDES[size] + 2), (circle, 2 * CIRCLE_RADII[size] + 1)):
            for picture in pictures[::37]:
                rows, columns = np.nonzero(picture)
                assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == extent
        assert ring[0].sum() == 4 * (RECTANGLE_SIDES[size] + 1)
        rows, columns = np.nonzero(circle[0])
        distance = np.hypot(rows - 5, columns - 5)
        assert np.abs(distance - CIRCLE_RADII[size]).max() < 0.71
        # Places run over [5, 20) in both directions.
        last = np.argwhere(circle[-1]).mean(axis=0)
        assert np.allclose(last, [19, 19])


def test_everything_is_drawn_evenly():
    drawing, _ = sample(count=2000, attribute_budget=60_000)
    filled = drawing.cells[..., 0] >= 0
    total = filled.sum()
    shares = {name: (drawing.cells == label).sum() / total for label, name in enumerate(ATTRIBUTES)}
    assert all(abs(shares[name] - 0.1) < 0.02 for name in DIGITS)
    assert all(abs(shares[name] - 0.2) < 0.02 for name in COLOURS)
    assert all(abs(shares[name] - 0.33) < 0.03 for name in GROUPS["shape"])
    assert all(abs(shares[name] - 0.22) < 0.03 for name in GROUPS["size"])
    places, _ = sample(count=600, complexity=5.0)
    assert np.abs((places.cells[..., 0] >= 0).mean(axis=0) - (places.cells[..., 0] >= 0).mean()).max() < 0.06


def test_png_files_hold_the_painted_pixels():
    drawing, _ = sample(count=20)
    every_colour = np.resize(np.arange(len(PALETTE), dtype=np.uint8), (84, 84))
    for paint in (*drawing.paint, every_colour, np.zeros((84, 84), np.uint8)):
        file = png(paint)
        with PilImage.open(io.BytesIO(file)) as image:
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), PALETTE[paint])
        start = file.index(b"IDAT") + 4
        assert len(zlib.decompress(file[start:-16])) == 84 * (1 + 3 * 84)


# The dataset


def test_examples_follow_the_schema(small):
    for split in SPLITS:
        data = small[split]
        schema.check_columns(data)
        kept, _ = schema.usable(data)
        assert kept is data
        assert len(set(data["image_id"][:])) == len(data)
        assert data.features == schema.features(ATTRIBUTES, GROUPS, TEMPLATES)
        pairs = [sum(map(len, truth)) for truth in data["region_attributes"][:]]
        assert pairs == images_of_split(config(), split).pairs.tolist()
    assert schema.attribute_groups(small["train"]) == GROUPS
    assert schema.attribute_prompts(small["train"])["seven"] == [t.format("seven") for t in TEMPLATES["digit"]]


def test_captions_and_regions_tell_the_truth(small):
    orders = set()
    for row in small["train"].select(range(60)):
        assert row["text"] == " . ".join(row["sentences"])
        assert row["attributes"] == sorted({label for labels in row["region_attributes"] for label in labels})
        assert len(row["sentences"]) == len(row["attributes"])
        assert sorted(row["attribute_sentences"]) == list(range(len(row["sentences"])))
        orders.add(tuple(np.argsort(row["attribute_sentences"])[:3]))
        for label, place in zip(row["attributes"], row["attribute_sentences"], strict=True):
            group = next(group for group, names in GROUPS.items() if ATTRIBUTES[label] in names)
            assert row["sentences"][place] in [t.format(ATTRIBUTES[label]) for t in TEMPLATES[group]]
        boxes = [(y0, x0) for x0, y0, x1, y1 in row["regions"] if x1 - x0 == 28 and y1 - y0 == 28]
        assert boxes == sorted(set(boxes)) and len(boxes) == len(row["regions"]) == len(row["region_attributes"])
        pixels = np.asarray(row["image"])
        for cell in range(9):
            y, x = 28 * (cell // 3), 28 * (cell % 3)
            assert pixels[y : y + 28, x : x + 28].any() == ((y, x) in boxes)
    assert len(orders) > 20
    assert [len(TEMPLATES[group]) for group in GROUPS] == [4, 4, 4, 3]


def test_same_bytes_however_it_is_made(small, tmp_path):
    again = load_dataset("docmnist", cache_dir=str(tmp_path), num_proc=2, **SMALL)
    for split in SPLITS:
        streamed = load_dataset("docmnist", streaming=True, split=split, cache_dir=str(tmp_path), **SMALL)
        assert content(small[split]) == content(again[split]) == content(streamed)
    assert streamed.num_shards == 16
    other = load_dataset("docmnist", streaming=True, split="test", seed=1, cache_dir=str(tmp_path), **SMALL)
    assert content(other) != content(streamed)


def test_same_bytes_on_every_machine(small):
    """Fails where a library's version or the machine leaks into the bytes, and on every change of what is drawn."""
    assert content(small["test"]) == "74b8ec1998951a445714f009556f63df5559fb73ec1406097371197d89e311d5"


def test_stream_resumes_where_it_stopped(tmp_path):
    def stream():
        return load_dataset("docmnist", streaming=True, split="train", cache_dir=str(tmp_path), **SMALL)

    whole = [row["image_id"] for row in stream()]
    first = stream()
    rows = iter(first)
    begun = [next(rows)["image_id"] for _ in range(17)]
    rest = stream()
    rest.load_state_dict(first.state_dict())
    assert begun + [row["image_id"] for row in rest] == whole


def test_equal_requests_have_one_cache(tmp_path):
    def cache(**changes):
        return load_dataset_builder(
            "docmnist", cache_dir=str(tmp_path), **({"digits": "optdigits"} | changes)
        ).cache_dir

    assert cache(complexity=7) == cache(complexity=7.0) == cache(complexity=np.float64(7))
    assert cache() == cache(complexity=29.4, seed=0, attributes=list(ATTRIBUTES), test_budget=20_000.0)
    assert cache(name="complexity_5.0") == cache(complexity=5)
    assert cache(attributes=["zero", "red"], complexity=9) == cache(attributes=("red", "zero"), complexity=9)
    distinct = [cache(), cache(seed=1), cache(complexity=7), cache(test_budget=100), cache(validation_budget=100)]
    assert len(set(distinct)) == len(distinct)


# Subsets of the attributes


@pytest.mark.parametrize(
    ("attributes", "complexity"),
    [
        (["three", "seven"], 6.5),
        (["one", "two", "red"], 11),
        (["zero", "blue", "green", "circle"], 20),
        (["zero", "one", "circle", "rectangle", "small", "large"], 20.5),
        (["five", "rectangle"], 12),
    ],
)
def test_subsets_keep_to_their_attributes(attributes, complexity):
    drawing, settings = sample(attributes=attributes, complexity=complexity, attribute_budget=8000)
    pairs = images_of_split(settings, "train").pairs
    assert abs(pairs.mean() - complexity) <= 0.1
    assert settings.vocabulary == tuple(name for name in ATTRIBUTES if name in attributes)
    labels = drawing.cells[drawing.cells >= 0]
    assert set(labels) == set(range(len(attributes)))
    assert ((drawing.cells >= 0).sum(axis=(1, 2)) == pairs[: len(drawing.cells)]).all()
    allowed = {0, WHITE} | {list(COLOURS).index(name) + 1 for name in attributes if name in COLOURS}
    assert set(np.unique(drawing.paint)) <= allowed


def test_a_subset_is_loaded_with_its_vocabulary(tmp_path):
    chosen = ["red", "seven", "circle"]
    data = load_dataset("docmnist", attributes=chosen, complexity=8, split="test", cache_dir=str(tmp_path), **SMALL)
    assert schema.attribute_names(data) == ["seven", "red", "circle"]
    assert schema.attribute_groups(data) == {"digit": ["seven"], "colour": ["red"], "shape": ["circle"]}
    schema.usable(data)


# Refusals


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"complexity": 1.9}, ["complexity", "2 to 30", "1.9"]),
        ({"complexity": 30.1}, ["complexity", "2 to 30", "30.1"]),
        ({"complexity": float("nan")}, ["complexity", "nan"]),
        ({"complexity": "high"}, ["complexity", "'high'"]),
        ({"complexity": True}, ["complexity", "True"]),
        ({"attribute_budget": 35}, ["attribute_budget", "36", "35"]),
        ({"validation_budget": -1}, ["validation_budget", "36", "-1"]),
        ({"test_budget": 1e12}, ["test_budget", "100000000"]),
        ({"test_budget": 100.5}, ["test_budget", "100.5"]),
        ({"test_budget": True}, ["test_budget", "True"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": "one"}, ["seed", "'one'"]),
        ({"attributes": ["sevn"]}, ["'sevn'", "'seven'"]),
        ({"attributes": ["seven", "Redd"]}, ["'Redd'", "'red'"]),
        ({"attributes": "seven"}, ["list", "'seven'"]),
        ({"attributes": ["red"]}, ["at least one digit"]),
        ({"attributes": ["one", "small"]}, ["add a shape"]),
        ({"attributes": ["one", "two"], "complexity": 9.5}, ["9.5", "2 to 9"]),
        ({"attributes": ["one", "circle"], "complexity": 14}, ["14.0", "2 to 13.5"]),
        ({"data_dir": "somewhere"}, ["data_dir"]),
    ],
)
def test_bad_values_are_named(changes, parts, tmp_path):
    with pytest.raises(ValueError) as error:
        load_dataset("docmnist", cache_dir=str(tmp_path), **({"digits": "optdigits"} | changes))
    for part in parts:
        assert part in str(error.value)


def test_speed():
    settings = DocMnistConfig(digits="optdigits")
    digits, images = split_digits(settings, "train"), images_of_split(settings, "train")

    def rate():
        stream = RandomWords(0, 0, 1, 0)
        start = time.perf_counter()
        for first in range(0, 1024, 256):
            batch = slice(first, first + 256)
            drawing = draw(settings.vocabulary, digits, images.plain[batch], images.shaped[batch], stream)
            assert drawing.images.shape == (256, 84, 84, 3)
        return 1024 / (time.perf_counter() - start)

    rate()
    assert statistics.median(rate() for _ in range(5)) >= 2000
