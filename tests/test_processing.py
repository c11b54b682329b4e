"""VillaProcessor: boxes scale with their image, padding, bad boxes, saving and loading."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import SPECIAL, make_tokenizer
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from modeling_villa import VillaClipConfig, VillaImageProcessor, VillaProcessor


@pytest.fixture
def processor():
    words = [*SPECIAL, "a", "red", "car", "and", "two", "blue", "ones", "on", "the", "road"]
    tokenizer = make_tokenizer(words, 6, bos_token="<start>", eos_token="<end>", unk_token="<unk>")
    return VillaProcessor(VillaImageProcessor(size={"height": 32, "width": 32}), tokenizer)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_boxes_scale_with_the_image(processor):
    output = processor(images=picture(64, 16), boxes=[[0, 0, 64, 16], [16, 4, 48, 12]])
    assert output["pixel_values"].shape == (1, 3, 32, 32)
    assert output["boxes"].tolist() == [[[0, 0, 32, 32], [8, 8, 24, 24]]]
    assert output["region_mask"].tolist() == [[True, True]]
    assert (output["boxes"].dtype, output["region_mask"].dtype) == (torch.float32, torch.bool)
    assert set(output) == {"pixel_values", "boxes", "region_mask"}


def test_boxes_stay_on_what_they_show(processor):
    """A white patch in a black picture is white inside its scaled box, and black outside."""
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[10:30, 20:60] = 255
    output = processor(images=Image.fromarray(pixels), boxes=[[20, 10, 60, 30]])
    x0, y0, x1, y1 = output["boxes"][0, 0].int().tolist()
    white = output["pixel_values"][0, 0] > 0
    assert white[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].all()
    white[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1] = False
    assert not white.any()


def test_not_square_target(processor):
    processor = VillaProcessor(VillaImageProcessor(size={"height": 8, "width": 40}), processor.tokenizer)
    output = processor(images=picture(20, 16), boxes=[[5, 4, 10, 16]])
    assert output["pixel_values"].shape == (1, 3, 8, 40)
    assert output["boxes"].tolist() == [[[10, 2, 20, 8]]]


def test_padding_and_mask(processor):
    images = [picture(32, 32), picture(64, 64), picture(16, 32)]
    boxes = [[[0, 0, 8, 8]], [[0, 0, 64, 32], [2, 4, 6, 8], [10, 10, 20, 30]], []]
    output = processor(images=images, text=["a car", "two blue ones", "road"], boxes=boxes)
    assert output["pixel_values"].shape == (3, 3, 32, 32)
    assert output["region_mask"].tolist() == [[True, False, False], [True, True, True], [False, False, False]]
    assert output["boxes"][1].tolist() == [[0, 0, 32, 16], [1, 2, 3, 4], [5, 5, 10, 15]]
    assert (output["boxes"][~output["region_mask"]] == 0).all()
    assert output["input_ids"].tolist() == [[0, 4, 6, 3, 1], [0, 8, 9, 10, 3], [0, 13, 3, 1, 1]]
    assert output["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1, 1, 1, 0, 0]]


def test_no_boxes_at_all_still_gives_one_padding_region(processor):
    output = processor(images=[picture(8, 8)] * 2, boxes=[[], []])
    assert output["boxes"].shape == (2, 1, 4) and not output["region_mask"].any()


def test_one_image_or_a_list(processor):
    boxes = [[1, 2, 3, 4]]
    one, many = processor(picture(20, 10), boxes=boxes), processor([picture(20, 10)], boxes=[boxes])
    for key in many:
        assert torch.equal(one[key], many[key])
    assert set(processor(picture(20, 10))) == {"pixel_values"}


def test_text_only_is_padded_and_cut(processor):
    output = processor(text=["a red car and two blue ones", "a"])
    assert set(output) == {"input_ids", "attention_mask"}
    assert output["input_ids"].tolist() == [[0, 4, 5, 6, 7, 3], [0, 4, 3, 1, 1, 1]]
    assert processor(text="a")["input_ids"].tolist() == [[0, 4, 3]]


@pytest.mark.parametrize(("width", "height"), [(20, 12), (12, 20)])
def test_arrays_and_tensors_in_either_channel_order(processor, width, height):
    image, boxes = picture(width, height), [[2, 4, 8, 12]]
    rows = np.array(image)
    expected = processor(image, boxes=boxes)
    channels_first = np.ascontiguousarray(rows.transpose(2, 0, 1))
    for other in (rows, channels_first, torch.from_numpy(channels_first.copy())):
        found = processor(other, boxes=boxes)
        torch.testing.assert_close(found["pixel_values"], expected["pixel_values"])
        assert torch.equal(found["boxes"], expected["boxes"])
        assert torch.equal(processor([other], boxes=[boxes])["boxes"], expected["boxes"])


def test_grey_and_transparent_pictures(processor):
    grey = picture(20, 12).convert("L")
    assert processor(grey, boxes=[[0, 0, 20, 12]])["pixel_values"].shape == (1, 3, 32, 32)
    assert processor(grey.convert("RGBA"))["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("boxes", [np.array([[1, 2, 3, 4]]), torch.tensor([[1.0, 2, 3, 4]]), ((1, 2, 3, 4),)])
def test_boxes_as_arrays_tensors_or_tuples(processor, boxes):
    assert processor(picture(32, 32), boxes=boxes)["boxes"].tolist() == [[[1, 2, 3, 4]]]


@pytest.mark.parametrize(
    "box",
    [
        [5, 5, 5, 9],
        [5, 5, 9, 5],
        [9, 5, 5, 9],
        [5, 9, 9, 5],
        [-1, 0, 5, 5],
        [0, -0.5, 5, 5],
        [0, 0, 21, 5],
        [0, 0, 5, 10.5],
        [30, 30, 40, 40],
        [float("nan"), 0, 5, 5],
        [0, 0, 5, float("nan")],
        [0, 0, float("inf"), 5],
        [float("-inf"), 0, 5, 5],
    ],
)
def test_bad_boxes_are_named(processor, box):
    with pytest.raises(ValueError) as error:
        processor([picture(8, 8), picture(20, 10)], boxes=[[[0, 0, 1, 1]], [[0, 0, 5, 5], box]])
    message = str(error.value)
    assert f"Box 1 of image 1 is {[float(value) for value in box]}" in message
    assert "0 <= x0 < x1 <= 20 (width) and 0 <= y0 < y1 <= 10 (height)" in message


def test_rounding_at_the_border_is_no_error(processor):
    x = np.float32(0.1) + np.float32(19.9)
    output = processor(picture(20, 10), boxes=[[0, 0, float(x) + 1e-6, 10]])
    assert output["region_mask"].all()


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[[0, 0, 1, 1]]], "boxes are given for 1 images, but there are 2 images"),
        ([[[0, 0, 1]], []], r"boxes of image 0 must be a list of x0, y0, x1, y1; got shape \(1, 3\)"),
        ([[], [0, 0, 1, 1]], r"boxes of image 1 must be a list of x0, y0, x1, y1; got shape \(4,\)"),
        ([[[[0, 0, 1, 1]]], []], r"boxes of image 0 must be a list .* got shape \(1, 1, 4\)"),
        ([[[0, 0, 1, 1], [0, 0, 1]], []], r"boxes of image 0 must be a list .* got \[\[0, 0, 1, 1\], \[0, 0, 1\]\]"),
        ([[], [["a", 0, 1, 1]]], r"boxes of image 1 must be a list .* got \[\['a', 0, 1, 1\]\]"),
    ],
)
def test_wrong_number_or_shape_of_boxes(processor, boxes, message):
    with pytest.raises(ValueError, match=message):
        processor([picture(8, 8)] * 2, boxes=boxes)


def test_wrong_arguments(processor):
    with pytest.raises(ValueError, match="needs images, text or both"):
        processor()
    with pytest.raises(ValueError, match="boxes are in pixels of their images: give images too"):
        processor(text="a", boxes=[[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="return_tensors must be \"pt\", got 'np'"):
        processor(text="a", return_tensors="np")


def test_round_trip(tmp_path, processor):
    VillaClipConfig(vision_config={"projection_dim": 8}, text_config={"projection_dim": 8}).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is VillaProcessor and type(again.image_processor) is VillaImageProcessor
    inputs = {"images": picture(20, 12), "text": ["a red car and two ones", "green"], "boxes": [[2, 2, 9, 9]]}
    expected, found = processor(**inputs), again(**inputs)
    assert set(found) == set(expected)
    for key in expected:
        assert torch.equal(found[key], expected[key]), key
    assert again.tokenizer.model_max_length == 6
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VillaImageProcessor
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == [0, 4, 3]
