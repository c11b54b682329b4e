"""The region-attribute-mapping pipeline: the assignment's definition, texts, batches against singles, drawing."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_helpers import BOXES, MAPPING, SIZES, assert_same, corners, picture
from tiny_models import ATTRIBUTES, GROUPS, make_processor
from transformers import pipeline

from modeling_villa.pipeline_villa import RegionAttributeMappingPipeline, draw_regions, find_attributes
from modeling_villa.proposals_villa import grid_boxes


@pytest.fixture(scope="module")
def mapper(mapping_folder):
    found = pipeline(MAPPING, model=mapping_folder, device="cpu")
    assert type(found) is RegionAttributeMappingPipeline
    return found


@torch.no_grad()
def slow_scores(model, image, boxes):
    """One region at a time: a list of cosines per region."""
    rows = []
    for box in boxes:
        inputs = make_processor()(image, boxes=[box])
        rows.append(model(**inputs).scores[0, 0].tolist())
    return rows


def slow_mapping(model, image, boxes, stated, epsilon=0.2, inverted=False, groups=GROUPS):
    """The definition of the assignment, pair by pair."""
    scores = slow_scores(model, image, boxes)
    regions = []
    for r, box in enumerate(boxes):
        kept = []
        for k, name in enumerate(ATTRIBUTES):
            if name not in stated:
                continue
            rivals = [scores[r][ATTRIBUTES.index(n)] for n in stated] if inverted else [row[k] for row in scores]
            if scores[r][k] > max(rivals) - epsilon:
                kept.append({"label": name, "score": scores[r][k]})
        for group in groups.values():
            members = sorted((a for a in kept if a["label"] in group), key=lambda a: -a["score"])
            kept = [a for a in kept if a not in members[1:]]
        kept.sort(key=lambda attribute: -attribute["score"])
        regions.append({"box": corners(box), "attributes": kept})
    return regions


def test_mapping_follows_the_definition(mapper):
    image, stated = picture(), ["blue", "red", "round"]
    slow = partial(slow_mapping, mapper.model, image, BOXES)
    scores = np.array(slow_scores(mapper.model, image, BOXES))
    assert np.ptp(scores, axis=0).max() > 1e-3  # regions differ
    seen = set()
    for epsilon in (1e-6, 0.02, 0.2, 3.0):
        for inverted, mode in ((False, "attributes_to_regions"), (True, "regions_to_attributes")):
            expected = slow(stated, epsilon, inverted)
            assert_same(mapper(image, boxes=BOXES, attributes=stated, epsilon=epsilon, mode=mode), expected)
            seen.add(str([[a["label"] for a in region["attributes"]] for region in expected]))
        expected = slow(stated, epsilon, groups={})
        assert_same(mapper(image, boxes=BOXES, attributes=stated, epsilon=epsilon, exclusive_groups=False), expected)
    assert len(seen) > 2
    assert_same(mapper(image, boxes=BOXES, attributes=stated), slow(stated))
    assert_same(mapper(image, boxes=BOXES), slow(ATTRIBUTES, inverted=True))


def test_text_stands_for_the_attributes_that_it_names(mapper):
    stated = partial(mapper, picture(), boxes=BOXES, epsilon=3.0, exclusive_groups=False)
    assert stated(text="A Large, round car.") == stated(attributes=["round", "large"])
    assert stated(text="A Large, round car.") != stated(attributes=["round"])
    assert stated(attributes="round") == stated(attributes=["round"])
    assert [len(region["attributes"]) for region in stated()] == [5, 5, 5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RED", ["red"]),
        ("reddish, bored, red_ and redder; blue", ["blue"]),
        ("a dark\n  red car", ["red", "dark red"]),
        ("(round)", ["round"]),
        ("round-large/blue.", ["blue", "round", "large"]),
    ],
)
def test_whole_words(text, expected):
    assert [ATTRIBUTES[k] for k in find_attributes(text, ATTRIBUTES)] == expected


def test_names_with_signs():
    assert find_attributes("It is C++ (new).", ["c", "c++", "(new)", "new"]) == [0, 1, 2, 3]
    assert find_attributes("a+b", ["a+b", "a.b"]) == [0]


def test_threshold_of_the_mapping(mapper):
    everything = mapper(picture(), boxes=BOXES, epsilon=3.0, exclusive_groups=False)
    scores = sorted(a["score"] for region in everything for a in region["attributes"])
    limit = scores[len(scores) // 2]
    found = mapper(picture(), boxes=BOXES, epsilon=3.0, exclusive_groups=False, threshold=limit)
    for region, other in zip(found, everything, strict=True):
        assert region["attributes"] == [a for a in other["attributes"] if a["score"] > limit]
    assert [region["box"] for region in found] == [region["box"] for region in everything]


def test_mapping_in_batches_is_mapping_one_by_one(mapper):
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    boxes = [grid_boxes(*size, cells=[i + 1]) for i, size in enumerate(SIZES)]
    more = [{}, {"attributes": ["red"]}, {"text": "round and blue"}, {"attributes": ATTRIBUTES}, {}]
    items = [{"image": image, "boxes": b, **m} for image, b, m in zip(images, boxes, more, strict=True)]
    expected = [mapper(item) for item in items]
    for item, regions in zip(items, expected, strict=True):
        stated = item.get("attributes") or (["round", "blue"] if "text" in item else ATTRIBUTES)
        inverted = "attributes" not in item and "text" not in item
        slow = slow_mapping(mapper.model, item["image"], item["boxes"].tolist(), stated, inverted=inverted)
        assert_same(regions, slow)
    assert [len(regions) for regions in expected] == [1, 4, 9, 16, 25]
    for batch_size in (1, 2, 5, 8):
        for inputs in (items, (item for item in items)):
            assert_same(list(mapper(inputs, batch_size=batch_size)), expected)
    texts = ["red", "blue red", "ROUND", "large", "dark red"]
    expected = [mapper(image, boxes=b, text=text) for image, b, text in zip(images, boxes, texts, strict=True)]
    assert_same(mapper(images, boxes=boxes, text=texts, batch_size=2), expected)
    names = [["red"], ["blue", "red"], ["round"], ["large"], ["red", "dark red"]]
    assert_same(mapper(images, boxes=boxes, attributes=names, batch_size=5), expected)
    expected = [mapper(image, attributes=["red", "round"]) for image in images]
    assert_same(mapper(images, attributes=["red", "round"], batch_size=2), expected)
    assert mapper([]) == []


def test_drawing(mapper):
    image = picture(120, 90)
    before = np.array(image)
    boxes = [[10, 20, 70, 85], [80, 5, 118, 40]]
    plain = mapper(image, boxes=boxes, attributes=["red"], epsilon=1e-6)
    found = mapper(image, boxes=boxes, attributes=["red"], epsilon=1e-6, draw=True)
    assert set(found) == {"regions", "image"} and found["regions"] == plain
    assert found["image"].size == (120, 90) and (np.array(image) == before).all()
    changed = (np.array(found["image"]) != before).any(-1)
    near = np.zeros((90, 120), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        rim = np.zeros((90, 120), dtype=bool)
        rim[y0:y1, x0:x1] = True
        rim[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = False
        assert changed[rim].mean() > 0.98
        near[y0:y1, x0:] = True  # a text may be wider than its box
    assert not changed[~near].any()
    inside = [changed[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].any() for x0, y0, x1, y1 in boxes]
    assert inside == [bool(region["attributes"]) for region in plain] and set(inside) == {True, False}
    batch = mapper([image, image], boxes=[boxes, boxes[:1]], attributes=["red"], draw=True, batch_size=2)
    assert [len(one["regions"]) for one in batch] == [2, 1] and batch[1]["image"].size == (120, 90)


def test_drawing_a_region_of_no_pixel():
    black = Image.new("RGB", (9, 9))
    region = {"box": corners([3, 4, 3, 4]), "attributes": []}
    changed = np.array(draw_regions(black, [region])).any(-1)
    assert changed[4, 3] and changed.sum() <= 2
    assert not np.array(black).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attributes": ["redd"]}, r"Unknown attribute 'redd': not in the vocabulary of 5; nearest: \['red'"),
        ({"attributes": []}, r"attributes: found \[\], expected at least one name"),
        ({"attributes": 7}, "attributes: found 7, expected at least one name"),
        ({"attributes": ["red"], "text": "red"}, r"attributes, text: found both \(\['red'\], 'red'\)"),
        ({"text": "a car"}, r"text: found none of the vocabulary's 5 attributes \(red, blue, .*large\) in 'a car'"),
        ({"text": 7}, "text: found 7, expected a string"),
        ({"epsilon": 0}, "epsilon: found 0, expected a finite number above 0"),
        ({"mode": "both"}, "mode: found 'both', expected one of"),
        ({"candidate_labels": ["red"]}, "Unknown keyword 'candidate_labels'"),
    ],
)
def test_bad_input_of_the_mapping(mapper, change, message):
    with pytest.raises(ValueError, match=message):
        mapper(picture(), **change)


def test_mapping_needs_a_mapping_model(clip_folder):
    with pytest.raises(ValueError, match="needs a VillaMappingModel, got a model of type 'villa_clip'"):
        pipeline(MAPPING, model=clip_folder)
