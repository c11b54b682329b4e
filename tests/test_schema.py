"""The schema's columns, its metadata, and the check of a corpus."""

import io
import logging
import math
import time

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets, load_from_disk
from PIL import Image as PilImage

from datasets_scripts import schema

NAMES = ["red", "blue", "circle"]
GROUPS = {"colour": ["red", "blue"], "shape": ["circle"]}
TEMPLATES = {"colour": ["something {}.", "{} ink."]}


def png(width=12, height=8, shade=0):
    file = io.BytesIO()
    PilImage.fromarray(np.full((height, width, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


def example(**changes):
    return {
        "image_id": "a",
        "image": {"bytes": png(), "path": None},
        "text": "Red . A circle",
        "sentences": ["Red", "A circle"],
        "regions": [[0.0, 0.0, 12.0, 8.0], [1.0, 2.0, 3.0, 4.0]],
        "attributes": [0, 2],
        "attribute_sentences": [0, -1],
        "region_attributes": [[0], [2]],
    } | changes


def corpus(*examples, **vocabulary):
    rows = [example(image_id=f"id{index}") | row for index, row in enumerate(examples)]
    return Dataset.from_list(rows, features=schema.features(NAMES, **vocabulary))


def test_features_are_those_of_the_design():
    label = ClassLabel(names=NAMES)
    assert schema.features(NAMES) == Features(
        {
            "image_id": Value("string"),
            "image": Image(),
            "text": Value("string"),
            "sentences": List(Value("string")),
            "regions": List(List(Value("float32"), length=4)),
            "attributes": List(label),
            "attribute_sentences": List(Value("int32")),
            "region_attributes": List(List(label)),
        }
    )


@pytest.mark.parametrize(("names", "message"), [([], "at least one"), (["a", "b", "a"], r"\['a'\]")])
def test_features_of_a_bad_vocabulary(names, message):
    with pytest.raises(ValueError, match=message):
        schema.features(names)


def test_names_groups_and_prompts_survive_what_is_done_to_a_dataset(tmp_path):
    data = corpus({}, {}, groups=GROUPS, templates=TEMPLATES)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "saved.parquet")
    variants = [
        data,
        data.select([1]),
        load_from_disk(tmp_path / "saved"),
        concatenate_datasets([data, data]),
        Dataset.from_parquet(str(tmp_path / "saved.parquet"), cache_dir=str(tmp_path / "cache")),
        data.map(lambda row: row),
    ]
    for variant in variants:
        assert schema.attribute_names(variant) == NAMES
        assert schema.attribute_groups(variant) == GROUPS
        assert schema.attribute_prompts(variant) == {
            "red": ["something red.", "red ink."],
            "blue": ["something blue.", "blue ink."],
            "circle": ["a photo of circle."],
        }


def test_a_dataset_without_metadata():
    data = corpus({})
    assert schema.attribute_groups(data) == {}
    assert schema.attribute_prompts(data)["blue"] == ["a photo of blue."]
    with pytest.raises(ValueError, match="'attributes'"):
        schema.attribute_names(data.remove_columns("attributes"))


@pytest.mark.parametrize(
    ("groups", "templates", "message"),
    [
        ({"a": ["x"], "b": ["x"]}, {}, r"\['x'\]"),
        ({"a": ["x"]}, {"b": ["{}"]}, "'b'"),
        ({"a": ["x"]}, {"a": ["no place"]}, "'no place'"),
        ({"a": ["x"]}, {"a": ["{} and {}"]}, "'{} and {}'"),
    ],
)
def test_groups_and_templates_that_do_not_fit(groups, templates, message):
    with pytest.raises(ValueError, match=message):
        schema.features(["x", "y"], groups, templates)


def test_check_columns_accepts_other_spellings_of_the_types():
    data = corpus({}).add_column("extra", [1])
    schema.check_columns(data)
    schema.check_columns(data.remove_columns("region_attributes"))
    schema.check_columns(data.to_iterable_dataset())
    wide = data.cast_column("regions", List(List(Value("float64")))).cast_column("image", Image(mode="L"))
    schema.check_columns(wide.cast_column("attribute_sentences", List(Value("int64"))))


def test_check_columns_names_each_problem():
    data = corpus({}).remove_columns("text").cast_column("attribute_sentences", List(Value("float32")))
    with pytest.raises(ValueError) as error:
        schema.check_columns(data)
    for part in ("'text' is missing", "'attribute_sentences'", "List(Value('int32'))", "List(Value('float32'))"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="length=3"):
        short = (
            corpus({})
            .remove_columns("regions")
            .add_column("regions", [[[0.0, 0.0, 1.0]]], feature=List(List(Value("float32"), length=3)))
        )
        schema.check_columns(short)


def test_check_columns_wants_one_vocabulary():
    other = List(List(ClassLabel(names=["x", "y", "z"])))
    data = corpus({}).remove_columns("region_attributes").add_column("region_attributes", [[[0]]], feature=other)
    with pytest.raises(ValueError, match="different vocabularies"):
        schema.check_columns(data)


def test_usable_gives_back_the_dataset_where_nothing_is_wrong():
    data = corpus({}, {"region_attributes": []}, {"regions": [[0.0, 0.0, 12.0005, 8.0]], "region_attributes": []})
    same, counts = schema.usable(data)
    assert same is data
    assert counts == {"no_region": 0, "no_attribute": 0, "corrupt_image": 0}


def broken_corpus(tmp_path):
    path = tmp_path / "torn.png"
    path.write_bytes(png(200, 200, shade=9)[:-40])
    return corpus(
        {},
        {"regions": [], "region_attributes": []},
        {"attributes": [], "attribute_sentences": []},
        {"image": {"bytes": b"not an image", "path": None}},
        {"image": {"bytes": None, "path": str(path)}},
        {"image": {"bytes": None, "path": str(tmp_path / "gone.png")}},
        {"image": None},
        {},
    )


@pytest.mark.parametrize("num_proc", [None, 2])
def test_usable_skips_counts_and_names(tmp_path, caplog, num_proc):
    data = broken_corpus(tmp_path)
    with caplog.at_level(logging.WARNING, logger="datasets_scripts.schema"):
        kept, counts = schema.usable(data, num_proc=num_proc)
    assert kept["image_id"][:] == ["id0", "id7"]
    assert counts == {"no_region": 1, "no_attribute": 1, "corrupt_image": 4}
    log = caplog.text
    for part in ("'id3'", "'id4'", "torn.png", "'id5'", "gone.png", "'id6'", "skipped 6 of 8"):
        assert part in log


def test_usable_strict(tmp_path):
    with pytest.raises(ValueError, match="'id3'"):
        schema.usable(broken_corpus(tmp_path), strict=True)
    kept, _ = schema.usable(corpus({}, {"regions": [], "region_attributes": []}), strict=True)
    assert len(kept) == 1


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([3.0, 1.0, 3.0, 4.0], "empty"),
        ([3.0, 4.0, 5.0, 4.0], "empty"),
        ([5.0, 1.0, 3.0, 4.0], "inverted"),
        ([1.0, 4.0, 3.0, 2.0], "inverted"),
        ([-0.5, 1.0, 3.0, 4.0], "outside"),
        ([0.0, -1.0, 3.0, 4.0], "outside"),
        ([0.0, 0.0, 12.5, 4.0], "outside"),
        ([0.0, 0.0, 12.0, 8.5], "outside"),
        ([math.nan, 0.0, 12.0, 8.0], "finite"),
        ([0.0, 0.0, math.inf, 8.0], "finite"),
    ],
)
def test_a_bad_box_is_an_error_that_names_it(box, problem):
    data = corpus({}, {"regions": [[0.0, 0.0, 1.0, 1.0], box]})
    with pytest.raises(ValueError) as error:
        schema.usable(data)
    for part in ("'id1'", "region 1", str(box[3]), problem, "12 x 8"):
        assert part in str(error.value)


def test_an_error_comes_through_from_another_process():
    with pytest.raises(ValueError, match=r"'id1', region 0.*empty"):
        schema.usable(corpus({}, {"regions": [[3.0, 1.0, 3.0, 4.0]], "region_attributes": []}), num_proc=2)


def test_a_box_is_measured_on_the_image_as_it_is_shown():
    file = io.BytesIO()
    turned = PilImage.Exif()
    turned[0x0112] = 6
    PilImage.new("RGB", (12, 8)).save(file, "JPEG", exif=turned)
    tall = {"image": {"bytes": file.getvalue(), "path": None}, "region_attributes": []}
    schema.usable(corpus(tall | {"regions": [[0.0, 0.0, 8.0, 12.0]]}))
    with pytest.raises(ValueError, match="8 x 12"):
        schema.usable(corpus(tall | {"regions": [[0.0, 0.0, 12.0, 8.0]]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attribute_sentences": [0, 2]}, "sentence 2, expected -1 to 1"),
        ({"attribute_sentences": [0, -2]}, "sentence -2"),
        ({"attribute_sentences": [0]}, "1 entries for 2 attributes"),
        ({"region_attributes": [[0]]}, "1 entries for 2 regions"),
        ({"attributes": [0, -1]}, "label -1, expected 0 to 2"),
        ({"text": None}, r"text is missing \(null\)"),
        ({"sentences": ["one", None]}, "one of the sentences is missing"),
    ],
)
def test_indices_and_lengths_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=f"'id0'.*{message}"):
        schema.usable(corpus(change))


def test_image_ids_are_there_and_unique():
    with pytest.raises(ValueError, match=r"1 come more than once: \['id0'\]"):
        schema.usable(corpus({}, {"image_id": "id0"}, {}))
    with pytest.raises(ValueError, match="example 1 has no image_id"):
        schema.usable(corpus({}, {"image_id": None}))


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="'no_region': 2"):
        schema.usable(corpus(*[{"regions": [], "region_attributes": []}] * 2))
    with pytest.raises(ValueError, match="no examples"):
        schema.usable(corpus({}).select([]))


def test_usable_does_not_mind_a_format_and_keeps_it():
    data = corpus({}, {"regions": [], "region_attributes": []}).with_format("numpy")
    kept, _ = schema.usable(data)
    assert kept.format["type"] == "numpy"


def test_usable_is_fast():
    data = corpus(*[{"image": {"bytes": png(84, 84), "path": None}}] * 500)
    start = time.perf_counter()
    schema.usable(data)
    assert time.perf_counter() - start < 2.5  # 10,000 in 50 s even on a busy machine; 2 s on an idle one
