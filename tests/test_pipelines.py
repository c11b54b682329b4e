"""Zero-shot pipelines against direct calls of the models, and what the mapping pipeline has in common with them."""

import base64
import math
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipeline_helpers import BOXES, CLASSIFICATION, DETECTION, LABELS, MAPPING, SIZES, assert_same, corners, picture
from tiny_models import WORDS, make_processor
from transformers import (
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    ZeroShotObjectDetectionPipeline,
    pipeline,
)

from modeling_villa import proposals_villa
from modeling_villa.pipeline_villa import VillaZeroShotObjectDetectionPipeline
from modeling_villa.proposals_villa import RpnProposer, grid_boxes


@pytest.fixture(scope="module")
def detector(clip_folder):
    found = pipeline(DETECTION, model=clip_folder, device="cpu")
    assert type(found) is VillaZeroShotObjectDetectionPipeline
    return found


@pytest.fixture(scope="module")
def mapper(mapping_folder):
    return pipeline(MAPPING, model=mapping_folder, device="cpu")


def every_kind(image, served):
    """The image as PIL image, path, path object, URL, base64 string and in a dictionary."""
    folder, url = served
    image.save(folder / "image.png")
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    path = folder / "image.png"
    return [image, str(path), Path(path), f"{url}/image.png", base64.b64encode(buffer.getvalue()).decode()]


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
            found.append({"score": score, "label": label, "box": corners(box)})
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
        "tokenizer": make_processor(
            ["<none>", *WORDS]
        ).tokenizer,  # OWL-ViT takes a text that starts with 0 for padding
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


def test_a_broken_url_is_named(detector, served):
    with pytest.raises(ValueError, match=r"image: found 'http://127.0.0.1:\d+/none.png', expected"):
        detector(f"{served[1]}/none.png", candidate_labels=LABELS)


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
