"""What goes wrong in real life: artifacts that don't belong together, missing ones, bad corpora."""

import json

import datasets
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from training_helpers import (
    ChildError,
    copy_of_run,
    finished_run,
    in_child,
    read_log,
    run_stage,
    write_config,
)

import datasets_scripts  # noqa: F401  (registers docmnist)
from artifacts import META_FILE
from datasets_scripts.schema import attribute_names

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


def docmnist(config, **changes):
    """The three splits of the finished run's corpus, or of one beside it."""
    options = {**yaml.safe_load(config.read_text())["dataset_kwargs"], **changes}
    return load_dataset("docmnist", **options)


def rewritten(splits, folder, change=None, drop=(), train_only=True):
    """Save a corpus whose examples went through `change(index, example)`; returns its folder."""
    saved = DatasetDict()
    for split, data in splits.items():
        raw = data.cast_column("image", Image(decode=False))
        rows = [dict(row) for row in raw]
        if change and (split == "train" or not train_only):
            rows = [change(i, row) for i, row in enumerate(rows)]
        saved[split] = Dataset.from_list(rows, features=data.features, info=data.info).remove_columns(list(drop))
    saved.save_to_disk(folder)
    return folder


def without_truth(config, folder):
    return rewritten(docmnist(config), folder, drop=["region_attributes"])


# Artifacts that don't belong together


def test_a_store_of_another_model_is_refused(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "embed_regions")
    in_child(run_stage, "stage0", config, "--run_dir", copy, "--seed", 1, "--no_resume")
    with pytest.raises(ValueError, match=r"embed_regions was made for another model: it holds '\w+', this run has"):
        run_stage("stage1", config, "--run_dir", copy, "--encoder", "frozen")


def test_a_store_of_another_split_or_vocabulary_is_refused(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "embed_regions")
    other = rewritten(docmnist(config), tmp_path / "other", lambda i, row: {**row, "image_id": f"other-{i}"})
    with pytest.raises(ValueError, match="embed_regions was made for another train split"):
        run_stage("stage1", config, "--run_dir", copy, "--encoder", "frozen", "--dataset", other)
    renamed = tmp_path / "renamed"
    with_other_names(docmnist(config)).save_to_disk(renamed)
    with pytest.raises(ValueError, match="embed_regions was made for another vocabulary"):
        run_stage("stage1", config, "--run_dir", copy, "--encoder", "frozen", "--dataset", renamed)


def test_a_store_of_other_regions_or_labels_under_the_same_ids_is_refused(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "embed_regions", "stage1", "map_regions")
    # Another seed draws other pages under the same ids.
    other = json.dumps({**yaml.safe_load(config.read_text())["dataset_kwargs"], "seed": 1})
    for stage, words in (("stage1", ("--encoder", "frozen", "--output_dir", tmp_path / "s1")), ("stage2", ())):
        with pytest.raises(ValueError, match="was made for another train split"):
            run_stage(stage, config, "--run_dir", copy, "--dataset_kwargs", other, *words)


def test_stage2_is_redone_for_other_pairs(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1", "map_regions", "stage2")
    run_stage("map_regions", config, "--run_dir", copy, "--epsilon", 1.5, "--no_resume")
    with pytest.raises(ValueError, match="pairs was"):
        run_stage("stage2", config, "--run_dir", copy)


def with_other_names(splits):
    """The same corpus, the first attribute renamed, without groups."""
    for data in splits.values():
        data.info.description = ""
    names = ["renamed", *attribute_names(splits["train"])[1:]]
    changed = splits["train"].features.copy()
    changed["attributes"] = datasets.List(datasets.ClassLabel(names=names))
    changed["region_attributes"] = datasets.List(datasets.List(datasets.ClassLabel(names=names)))
    return splits.cast(changed)


def test_pairs_of_another_split_are_refused(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1", "map_regions")
    other = rewritten(docmnist(config), tmp_path / "other", lambda i, row: {**row, "image_id": f"other-{i}"})
    with pytest.raises(ValueError, match="map_regions was made for another train split: it holds"):
        run_stage("stage2", config, "--run_dir", copy, "--dataset", other)


def test_pairs_of_another_mapping_model_are_refused(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1", "map_regions")
    in_child(run_stage, "stage1", config, "--run_dir", copy, "--seed", 1, "--no_resume")
    with pytest.raises(ValueError, match="map_regions was made for another model: it holds"):
        run_stage("stage2", config, "--run_dir", copy)


def test_a_mapping_model_of_another_vocabulary_is_refused(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1")
    with_other_names(docmnist(config)).save_to_disk(tmp_path / "renamed")
    with pytest.raises(ValueError, match=r"stage1/model maps the attributes \['zero', .* has \['renamed', "):
        run_stage("map_regions", config, "--run_dir", copy, "--dataset", tmp_path / "renamed")


@pytest.mark.parametrize("stage", ["stage0", "stage1", "map_regions", "stage2"])
def test_other_arguments_than_the_finished_artifact_are_refused(finished, stage):
    config, _ = finished
    words = ("--epsilon", 0.125) if stage == "map_regions" else ("--learning_rate", 0.125)
    with pytest.raises(ValueError, match=rf"{words[0][2:]} was .*, is now 0\.125.*--no_resume"):
        run_stage(stage, config, *words)


# Missing artifacts


@pytest.mark.parametrize(
    ("stage", "there", "words", "message"),
    [
        ("embed_regions", [], (), r"stage0/model holds no model.*run training/stage0.py first"),
        ("stage1", [], (), r"stage0/model holds no model.*run training/stage0.py first"),
        ("stage1", ["stage0"], ("--encoder", "frozen"), r"no finished artifact.*run training/embed_regions.py first"),
        ("map_regions", ["stage0"], (), r"stage1/model holds no model.*run training/stage1.py first"),
        ("stage2", ["stage0", "stage1"], (), r"no finished artifact.*run training/map_regions.py first"),
        ("stage2", ["stage0", "map_regions"], (), r"stage1/model holds no model.*run training/stage1.py first"),
        ("stage2", [], ("--supervision", "labels"), r"stage0/model holds no model.*run training/stage0.py first"),
    ],
)
def test_a_missing_artifact_names_the_stage_that_makes_it(finished, tmp_path, stage, there, words, message):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, *there)
    with pytest.raises(ValueError, match=message):
        run_stage(stage, config, "--run_dir", copy, *words)


def test_a_store_cut_off_while_written_is_no_store(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "embed_regions")
    (copy / "embed_regions").rename(copy / ".embed_regions.partial")
    with pytest.raises(ValueError, match=r"run training/embed_regions.py first"):
        run_stage("stage1", config, "--run_dir", copy, "--encoder", "frozen")


def test_labels_without_true_pairs(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1")
    corpus = without_truth(config, tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"--supervision labels needs the true pairs, but .*corpus has no column"):
        run_stage("stage2", config, "--run_dir", copy, "--dataset", corpus, "--supervision", "labels")


def test_everything_else_works_without_true_pairs(finished, tmp_path):
    config, run_dir = finished
    corpus = without_truth(config, tmp_path / "corpus")
    copy = copy_of_run(run_dir, tmp_path, "stage0")
    for stage in ("stage1", "map_regions", "stage2"):
        in_child(run_stage, stage, config, "--run_dir", copy, "--dataset", corpus)
    weights = [folder / "stage2" / "model" / "model.safetensors" for folder in (copy, run_dir)]
    assert weights[0].read_bytes() == weights[1].read_bytes()  # no trainer reads the truth


def test_an_empty_pairs_dataset(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1")
    pairs = load_from_disk(str(run_dir / "map_regions"))
    empty = pairs.map(lambda row: {"assigned_attributes": [[] for _ in row["assigned_attributes"]]})
    empty.save_to_disk(copy / "map_regions")
    (copy / "map_regions" / META_FILE).write_text((run_dir / "map_regions" / META_FILE).read_text())
    with pytest.raises(ValueError, match="map_regions assigns no attribute to any region of the train split"):
        run_stage("stage2", config, "--run_dir", copy)


def test_images_whose_regions_got_nothing_are_trained_on_as_images(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1")
    pairs = load_from_disk(str(run_dir / "map_regions"))
    some = pairs.map(
        lambda row, i: {"assigned_attributes": [given if i == 0 else [] for given in row["assigned_attributes"]]},
        with_indices=True,
    )
    some.save_to_disk(copy / "map_regions")
    (copy / "map_regions" / META_FILE).write_text((run_dir / "map_regions" / META_FILE).read_text())
    in_child(run_stage, "stage2", config, "--run_dir", copy)
    losses = [line["loss"] for line in read_log(copy / "stage2") if "loss" in line]
    assert len(losses) == 7 and all(0 < loss < 10 for loss in losses)


# Bad corpora


def corrupt(index, row):
    return {**row, "image": {"bytes": b"no image", "path": f"bad-{index}.png"}} if index in (3, 7) else row


def regionless(index, row):
    return {**row, "regions": [], "region_attributes": []} if index < 5 else row


def test_corrupt_images_are_skipped_and_counted(finished, tmp_path, caplog):
    config, _ = finished
    corpus = rewritten(docmnist(config), tmp_path / "corpus", corrupt)
    words = ("--dataset", corpus, "--run_dir", tmp_path / "run", "--max_steps", 2)
    with caplog.at_level("WARNING"):
        run_stage("stage0", config, *words)
    assert "'train-00000003' (bad-3.png) does not decode" in caplog.text
    assert "skipped 2 of 60 examples" in caplog.text
    with pytest.raises(ValueError, match=r"'train-00000003' \(bad-3.png\) does not decode"):
        run_stage("stage0", config, *words, "--strict", "--no_resume")


def test_images_without_a_region_are_skipped_by_every_stage(finished, tmp_path):
    config, _ = finished
    corpus = rewritten(docmnist(config), tmp_path / "corpus", regionless)
    words = ("--dataset", corpus, "--run_dir", tmp_path / "run", "--max_steps", 2)
    for stage in ("stage0", "embed_regions", "stage1", "map_regions", "stage2"):
        stage_words = words if stage not in ("embed_regions", "map_regions") else words[:4]
        in_child(run_stage, stage, config, *stage_words, *(("--encoder", "frozen") if stage == "stage1" else ()))
    for store in ("embed_regions", "map_regions"):
        ids = load_from_disk(str(tmp_path / "run" / store))["train"]["image_id"][:]
        assert ids == [f"train-{i:08d}" for i in range(5, 60)]


def test_a_corpus_without_any_region(finished, tmp_path):
    config, _ = finished
    corpus = rewritten(
        docmnist(config), tmp_path / "corpus", lambda i, row: {**row, "regions": [], "region_attributes": []}
    )
    with pytest.raises(ValueError, match=r"none of the 60 examples can be used.*'no_region': 60"):
        run_stage("stage0", config, "--dataset", corpus, "--run_dir", tmp_path / "run")


def test_a_bad_box_names_the_image(finished, tmp_path):
    config, _ = finished

    def inverted(index, row):
        return {**row, "regions": [[20.0, 0.0, 10.0, 28.0], *row["regions"][1:]]} if index == 4 else row

    corpus = rewritten(docmnist(config), tmp_path / "corpus", inverted)
    with pytest.raises(
        ValueError, match=r"image 'train-00000004', region 0: box \[20.0, 0.0, 10.0, 28.0\] is inverted"
    ):
        run_stage("stage0", config, "--dataset", corpus, "--run_dir", tmp_path / "run")


def test_a_corpus_without_a_validation_split(finished, tmp_path):
    config, _ = finished
    DatasetDict({"train": docmnist(config)["train"]}).save_to_disk(tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"has no split 'validation'; it has \['train'\]"):
        run_stage("stage0", config, "--dataset", tmp_path / "corpus", "--run_dir", tmp_path / "run")


def test_an_unknown_dataset_name_without_network(tmp_path):
    config = write_config(tmp_path, dataset_kwargs={})
    words = ("--dataset", "nobody/such-corpus", "--dataset_kwargs", "{}", "--run_dir", tmp_path / "run")
    with pytest.raises(ChildError, match="nobody/such-corpus") as caught:
        in_child(run_stage, "stage0", config, *words)
    assert "offline" in caught.value.message.lower() or "save_to_disk" in caught.value.message


def test_a_bad_option_of_the_dataset_is_named(tmp_path):
    config = write_config(tmp_path)
    with pytest.raises(ValueError, match=r"complexity must be from 2 to 30.*31"):
        run_stage("stage0", config, "--dataset_kwargs", json.dumps({"complexity": 31, "digits": "optdigits"}))


def test_a_nan_loss_in_a_stage_names_the_images(finished, tmp_path, monkeypatch):
    import stage1

    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0")
    calls = []

    def loss(maxima, has_region, labels, temperature):
        calls.append(1)
        return maxima.sum() * (torch.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(stage1, "mapping_contrastive_loss", loss)
    with pytest.raises(
        FloatingPointError, match=r"The loss is nan at update 4, in the batch of images train-\d+, .*step-"
    ):
        run_stage("stage1", config, "--run_dir", copy)
    assert not (copy / "stage1" / "model").exists()
