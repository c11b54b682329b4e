"""Pipelines: scores against direct calls of the models, batches against singles, every kind of input, bad input."""

import base64
import math
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import VLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    PreTrainedTokenizerFast,
    ZeroShotObjectDetectionPipeline,
    pipeline,
)

from modeling_villa import (
    VillaClipConfig,
    VillaClipModel,
    VillaImageProcessor,
    VillaMappingConfig,
    VillaMappingModel,
    VillaProcessor,
    proposals_villa,
)
from modeling_villa.pipeline_villa import (
    RegionAttributeMappingPipeline,
    VillaZeroShotObjectDetectionPipeline,
    draw_regions,
    find_attributes,
)
from modeling_villa.proposals_villa import RpnProposer, grid_boxes

DETECTION, CLASSIFICATION, MAPPING = (
    "zero-shot-object-detection",
    "zero-shot-image-classification",
    "region-attribute-mapping",
)
WORDS = ["<start>", "<pad>", "<unk>", "<end>", "This", "is", "a", "photo", "of", ".", "red", "blue", "green", "car"]
LABELS = ["red car", "blue", "a green car"]
ATTRIBUTES = ["red", "blue", "dark red", "round", "large"]
GROUPS = {"colour": ["red", "blue", "dark red"]}
BOXES = [[0, 0, 60, 40], [10.7, 5.2, 30.9, 25], [30, 0, 59, 12]]
SIDES = ("xmin", "ymin", "xmax", "ymax")


def picture(width=60, height=40, seed=0):
    """Noise over a gradient, so that regions differ from each other."""
    noise = np.random.default_rng(seed).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, width)[None, :, None] * np.array([1, 0, -1]) % 128
    return Image.fromarray((noise + slope).astype(np.uint8))


def make_tokenizer(words=WORDS):
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(word, words.index(word)) for word in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_processor():
    return VillaProcessor(VillaImageProcessor(size={"height": 32, "width": 32}), make_tokenizer())


def save_clip(folder):
    torch.manual_seed(0)
    VillaClipModel(VillaClipConfig(**VLM)).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


def save_mapping(folder):
    torch.manual_seed(0)
    config = VillaMappingConfig(vlm_config=VLM, attributes=ATTRIBUTES, attribute_groups=GROUPS)
    model = VillaMappingModel(config)
    model.set_attribute_embeds(ATTRIBUTES, torch.randn(len(ATTRIBUTES), 32))
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def mapping_folder(tmp_path_factory):
    return save_mapping(tmp_path_factory.mktemp("mapping"))


@pytest.fixture(scope="module")
def detector(clip_folder):
    found = pipeline(DETECTION, model=clip_folder, device="cpu")
    assert type(found) is VillaZeroShotObjectDetectionPipeline
    return found


@pytest.fixture(scope="module")
def mapper(mapping_folder):
    found = pipeline(MAPPING, model=mapping_folder, device="cpu")
    assert type(found) is RegionAttributeMappingPipeline
    return found


@contextmanager
def serve(folder):
    """Gives the URL at which a server of this process shows the folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder and its URL."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(tmp_path) as url:
        yield tmp_path, url


def every_kind(image, served):
    """The image as PIL image, path, path object, URL, base64 string and in a dictionary."""
    folder, url = served
    image.save(folder / "image.png")
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    path = folder / "image.png"
    return [image, str(path), Path(path), f"{url}/image.png", base64.b64encode(buffer.getvalue()).decode()]


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


@torch.no_grad()
def slow_cosines(model, image, boxes, texts):
    """One region and one text at a time, by the model's own features: a list per region."""
    processor, rows = make_processor(), []
    for box in boxes:
        inputs = processor(image, boxes=[box])
        region = model.get_region_features(inputs["pixel_values"], inputs["boxes"])[0, 0]
        tokens = [processor(text=text) for text in texts]
        rows.append([float(region @ model.get_text_features(**t)[0]) for t in tokens])
    return rows


def softmax(logits):
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def slow_detections(model, image, boxes, labels, template="This is a photo of {}."):
    cosines = slow_cosines(model, image, boxes, [template.format(label) for label in labels])
    scale = model.logit_scale.exp().item()
    found = []
    for box, row in zip(boxes, cosines, strict=True):
        for label, score in zip(labels, softmax([scale * cosine for cosine in row]), strict=True):
            corners = dict(zip(SIDES, (int(side) for side in box), strict=True))
            found.append({"score": score, "label": label, "box": corners})
    return sorted(found, key=lambda result: -result["score"])


def test_detections_are_the_softmax_of_single_comparisons(detector):
    expected = slow_detections(detector.model, picture(), BOXES, LABELS)
    found = detector(picture(), candidate_labels=LABELS, boxes=BOXES, threshold=0)
    assert_same(found, expected)
    assert len(found) == 9 and max(x["score"] for x in found) - min(x["score"] for x in found) > 0.01
    template = "a red {}"
    expected = slow_detections(detector.model, picture(), BOXES, LABELS, template)
    own = partial(detector, picture(), boxes=BOXES, threshold=0, hypothesis_template=template)
    assert_same(own(LABELS), expected)
    assert_same(own("red car, blue,a green car"), expected)


def test_a_single_label_gets_the_cosine(detector):
    cosines = slow_cosines(detector.model, picture(), BOXES, ["This is a photo of blue."])
    found = detector(picture(), candidate_labels=["blue"], boxes=BOXES, threshold=0)
    expected = sorted(((1 + cosine) / 2 for [cosine] in cosines), reverse=True)
    assert [result["score"] for result in found] == pytest.approx(expected, abs=1e-5)


def test_threshold_and_top_k(detector):
    everything = detector(picture(), candidate_labels=LABELS, boxes=BOXES, threshold=0)
    assert detector(picture(), candidate_labels=LABELS, boxes=BOXES, threshold=0, top_k=4) == everything[:4]
    middle = everything[4]["score"]
    above = [result for result in everything if result["score"] > middle]
    assert 0 < len(above) < 9
    assert detector(picture(), candidate_labels=LABELS, boxes=BOXES, threshold=middle) == above
    assert detector(picture(), candidate_labels=LABELS, boxes=BOXES) == [x for x in everything if x["score"] > 0.1]


def test_one_pass_serves_all_regions_and_labels(detector, monkeypatch):
    calls = []
    for name in ("vision_model", "text_model"):
        part = getattr(detector.model, name)
        monkeypatch.setattr(part, "forward", lambda *a, f=part.forward, n=name, **k: calls.append(n) or f(*a, **k))
    detector(picture(), candidate_labels=LABELS, boxes=BOXES)
    assert sorted(calls) == ["text_model", "vision_model"]
    calls.clear()
    detector([picture(seed=i) for i in range(3)], candidate_labels=LABELS, batch_size=3)
    assert sorted(calls) == ["text_model", "vision_model"]


SIZES = [(60, 40), (20, 33), (41, 41), (90, 15), (12, 70)]


def ragged():
    """Five images with different sizes, numbers of boxes and labels."""
    labels = [LABELS, LABELS[:1], LABELS[1:], ["green", "car", "photo", "red"], LABELS[::-1]]
    return [
        {"image": picture(*size, seed=i), "candidate_labels": labels[i], "boxes": grid_boxes(*size, cells=[i + 1])}
        for i, size in enumerate(SIZES)
    ]


def by_label_and_box(results):
    """Results in an order that rounding does not change."""
    return sorted(results, key=lambda result: (result["label"], *result["box"].values()))


def test_detection_in_batches_is_detection_one_by_one(detector):
    items = ragged()
    expected = [detector(item, threshold=0) for item in items]
    assert [len(results) for results in expected] == [3, 4, 18, 64, 75]
    for item, results in zip(items, expected, strict=True):
        if len(item["candidate_labels"]) > 1:
            boxes, labels = item["boxes"].tolist(), item["candidate_labels"]
            assert_same(results[:1], slow_detections(detector.model, item["image"], boxes, labels)[:1])
    expected = [by_label_and_box(results) for results in expected]
    for batch_size in (1, 2, 5, 8):
        for inputs in (items, (item for item in items)):
            found = detector(inputs, threshold=0, batch_size=batch_size)
            assert_same([by_label_and_box(results) for results in found], expected)
    images = [item["image"] for item in items]
    found = detector(
        images,
        candidate_labels=[item["candidate_labels"] for item in items],
        boxes=[item["boxes"] for item in items],
        threshold=0,
        batch_size=3,
    )
    assert_same([by_label_and_box(results) for results in found], expected)


def test_labels_for_all_images_and_no_images(detector):
    images = [picture(seed=i) for i in range(2)]
    expected = [detector(image, candidate_labels=LABELS) for image in images]
    assert expected[0] != expected[1]
    assert detector(images, candidate_labels=LABELS) == expected
    assert list(detector((image for image in images), candidate_labels=LABELS)) == expected
    dictionaries = [{"image": image, "candidate_labels": LABELS} for image in images]
    assert detector(dictionaries) == expected and detector(tuple(images), candidate_labels="red car,blue,a green car")
    assert detector([], candidate_labels=LABELS) == []


def test_every_kind_of_image(detector, mapper, served):
    kinds = every_kind(picture(), served)
    expected = detector(kinds[0], candidate_labels=LABELS, boxes=BOXES, threshold=0)
    regions = mapper(kinds[0], boxes=BOXES)
    for kind in kinds[1:]:
        assert detector(kind, candidate_labels=LABELS, boxes=BOXES, threshold=0) == expected
        assert detector([{"image": kind, "candidate_labels": LABELS, "boxes": BOXES}], threshold=0) == [expected]
        assert mapper(kind, boxes=BOXES) == regions
        assert mapper([{"image": kind, "boxes": BOXES}]) == [regions]
    # The same image, five times, in one batch.
    found = detector(kinds, candidate_labels=LABELS, boxes=[BOXES] * 5, threshold=0, batch_size=5)
    assert_same(found, [expected] * 5)


def test_boxes_are_in_pixels_of_the_upright_image(detector, mapper, tmp_path):
    image = picture(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    lying = str(tmp_path / "turned.png")
    assert Image.open(lying).size == (40, 60)
    expected = detector(image, candidate_labels=LABELS, boxes=BOXES, threshold=0)
    assert detector(lying, candidate_labels=LABELS, boxes=BOXES, threshold=0) == expected
    assert mapper(lying, boxes=BOXES, draw=True)["image"].size == (60, 40)


def test_proposers(detector, mapper, monkeypatch):
    image, rpn = picture(80, 50), RpnProposer(None, max_regions=5)
    monkeypatch.setattr(proposals_villa, "_shared_rpn", lambda: rpn)
    for run in (partial(detector, candidate_labels=LABELS, threshold=0), mapper):
        assert run(image) == run(image, proposer="grid") == run(image, boxes=grid_boxes(80, 50))
        assert run(image, proposer="rpn") == run(image, boxes=rpn(image)) != run(image)
        quarter = run(image, proposer=lambda given: [[0, 0, given.width / 2, given.height / 2]])
        assert quarter == run(image, boxes=[[0, 0, 40, 25]])
        assert run({"image": image, "boxes": BOXES}, proposer="rpn") == run(image, boxes=BOXES)


def test_other_models_get_the_pipeline_of_transformers():
    text = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 4}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    parts = {
        "model": OwlViTForObjectDetection(OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)),
        "tokenizer": make_tokenizer(["<none>", *WORDS]),  # OWL-ViT takes a text that starts with 0 for padding
        "image_processor": OwlViTImageProcessor(size={"height": 32, "width": 32}),
        "device": "cpu",
    }
    found, own = pipeline(DETECTION, **parts), ZeroShotObjectDetectionPipeline(**parts, task=DETECTION)
    assert type(found) is ZeroShotObjectDetectionPipeline
    for inputs in (picture(), {"image": picture(), "candidate_labels": LABELS}, [picture(), picture(seed=1)]):
        more = {} if isinstance(inputs, dict) else {"candidate_labels": LABELS}
        expected = own(inputs, **more, threshold=0.0, top_k=5)
        assert expected and found(inputs, **more, threshold=0.0, top_k=5) == expected


@torch.no_grad()
def test_classification_is_the_standard_one(clip_folder):
    classifier = pipeline(CLASSIFICATION, model=clip_folder, device="cpu")
    model, processor = classifier.model, make_processor()
    image = model.get_image_features(processor(picture())["pixel_values"])[0]
    texts = [model.get_text_features(**processor(text=f"This is a photo of {label}."))[0] for label in LABELS]
    scores = softmax([float(image @ text * model.logit_scale.exp()) for text in texts])
    expected = sorted(
        ({"score": score, "label": label} for score, label in zip(scores, LABELS, strict=True)),
        key=lambda result: -result["score"],
    )
    assert_same(classifier(picture(), candidate_labels=LABELS), expected)
    assert_same(classifier([picture()] * 3, candidate_labels=LABELS, batch_size=2), [expected] * 3)


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
        regions.append({"box": dict(zip(SIDES, (int(side) for side in box), strict=True)), "attributes": kept})
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
    region = {"box": dict(zip(SIDES, (3, 4, 3, 4), strict=True)), "attributes": []}
    changed = np.array(draw_regions(black, [region])).any(-1)
    assert changed[4, 3] and changed.sum() <= 2
    assert not np.array(black).any()


BAD_FOR_BOTH = [
    ({"boxes": []}, r"boxes: found \[\], expected at least one x0, y0, x1, y1"),
    ({"boxes": [[0, 0, 61, 40]]}, r"Box 0 of image 0 is \[0.0, 0.0, 61.0, 40.0\].*<= 60 \(width\).*<= 40 \(height\)"),
    ({"boxes": [[0, 0, 5, 5], [9, 5, 5, 9]]}, "Box 1 of image 0 is"),
    ({"boxes": [[0, 0, 5]]}, "must be a list of x0, y0, x1, y1; got shape"),
    ({"boxes": "abc"}, "must be a list of x0, y0, x1, y1; got abc"),
    ({"boxes": {"a": 1}}, "boxes of image 0 must be a list of x0, y0, x1, y1; got {'a': 1}"),
    ({"boxes": 7}, "boxes: found 7, expected at least one"),
    ({"proposer": "rnp"}, "proposer: found 'rnp', expected one of"),
    ({"proposer": lambda image: []}, r"proposer: found \[\], expected at least one"),
    ({"treshold": 0.5}, "Unknown keyword 'treshold': did you mean 'threshold'"),
    ({"zzz": 0.5}, "Unknown keyword 'zzz': expected some of .*boxes, proposer"),
    ({"image": {"image": picture(), "bxoes": BOXES}}, "Unknown key 'bxoes': did you mean 'boxes'"),
    ({"image": {"boxes": BOXES}}, r"image: found a dictionary with \['boxes'\], expected one with an image"),
    ({"image": "no/such/file.png"}, "image: found 'no/such/file.png', expected a PIL image, or an image's path, URL"),
    ({"image": 7}, "image: found 7, expected a PIL image"),
    ({"image": __file__}, "image: found .*test_pipelines.py', expected a PIL image"),
    ({"image": [picture()] * 2, "boxes": [BOXES] * 3}, "boxes: found 3 entries for 2 images, expected one per image"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FOR_BOTH)
def test_bad_input_of_both(detector, mapper, change, message):
    change = {"image": picture(), **change}
    image = change.pop("image")
    with pytest.raises(ValueError, match=message):
        detector(image, candidate_labels=LABELS, **change)
    with pytest.raises(ValueError, match=message):
        mapper(image, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_labels": None}, "candidate_labels: found None, expected at least one label"),
        ({"candidate_labels": []}, r"candidate_labels: found \[\], expected at least one"),
        ({"candidate_labels": ["a", " "]}, r"candidate_labels: found \['a', ' '\], expected .* none of them empty"),
        ({"candidate_labels": "a,,b"}, "candidate_labels: found 'a,,b', expected .* none of them empty"),
        ({"candidate_labels": 7}, "candidate_labels: found 7"),
        ({"hypothesis_template": "a photo"}, "hypothesis_template: found 'a photo', expected a sentence with one {}"),
        ({"attributes": ["red"]}, "Unknown keyword 'attributes'"),
    ],
)
def test_bad_input_of_the_detection(detector, change, message):
    with pytest.raises(ValueError, match=message):
        detector(picture(), **{"candidate_labels": LABELS, **change})


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


def test_a_broken_url_is_named(detector, served):
    with pytest.raises(ValueError, match=r"image: found 'http://127.0.0.1:\d+/none.png', expected"):
        detector(f"{served[1]}/none.png", candidate_labels=LABELS)


def test_mapping_needs_a_mapping_model(clip_folder):
    with pytest.raises(ValueError, match="needs a VillaMappingModel, got a model of type 'villa_clip'"):
        pipeline(MAPPING, model=clip_folder)


def test_half_precision(clip_folder, mapping_folder, detector, mapper):
    half = pipeline(DETECTION, model=clip_folder, device="cpu", dtype=torch.bfloat16)
    found = half(picture(), candidate_labels=LABELS[:1], boxes=BOXES[:1], threshold=0)
    expected = detector(picture(), candidate_labels=LABELS[:1], boxes=BOXES[:1], threshold=0)
    assert half.dtype == torch.bfloat16
    assert_same(found, expected, tolerance=0.03)
    half = pipeline(MAPPING, model=mapping_folder, device="cpu", dtype=torch.bfloat16)
    more = {"boxes": BOXES, "attributes": ["red"], "epsilon": 3.0}
    assert_same(half(picture(), **more), mapper(picture(), **more), tolerance=0.05)


@pytest.mark.parametrize("task", [DETECTION, MAPPING])
def test_a_saved_pipeline_is_the_same(task, detector, mapper, tmp_path):
    own, more = (detector, {"candidate_labels": LABELS}) if task == DETECTION else (mapper, {})
    own.save_pretrained(tmp_path)
    again = pipeline(task, model=str(tmp_path), device="cpu")
    assert type(again) is type(own) and again(picture(), **more) == own(picture(), **more)
