"""Evaluation scripts: metrics against a slow computation, what metrics.json holds, and the pictures."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from datasets import DatasetDict, load_dataset
from PIL import Image
from training_helpers import ENVIRONMENT, ROOT, finished_run

import datasets_scripts  # noqa: F401  (registers docmnist)
import figures
import mapping
import retrieval
from datasets_scripts.schema import attribute_names, attribute_prompts
from modeling_villa import VillaClipModel, VillaMappingModel, VillaProcessor
from report import LIBRARIES


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.fixture
def common(finished, tmp_path):
    options = yaml.safe_load(finished[0].read_text())["dataset_kwargs"]
    return {"dataset_kwargs": json.dumps(options), "output": str(tmp_path / "out" / "metrics.json"), "batch_size": 5}


def model_of(finished, stage):
    return str(finished[1] / stage / "model")


def read(common):
    with open(common["output"]) as file:
        return json.load(file)


def corpus_of(common, split="test"):
    return load_dataset("docmnist", split=split, **json.loads(common["dataset_kwargs"]))


def slow_regions(model, processor, example):
    """(R, d) region embeddings of one image, on its own."""
    inputs = processor(images=[example["image"]], boxes=[example["regions"]], return_tensors="pt")
    with torch.no_grad():
        return model.get_region_features(inputs["pixel_values"], inputs["boxes"], inputs["region_mask"])[0]


def slow_r_precision(scores, relevance):
    """Per row: of the as many best as there are relevant ones, the share of relevant ones; averaged."""
    values = []
    for row, relevant in zip(scores.tolist(), relevance.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda i: -row[i])[: sum(relevant)]
        if sum(relevant):
            values.append(100 * sum(relevant[i] for i in best) / sum(relevant))
    return sum(values) / len(values)


def test_retrieval_against_a_slow_computation(finished, common, capsys):
    folder = model_of(finished, "stage2")
    metrics = retrieval.main(retrieval.RetrievalArguments(models=[f"villa={folder}"], **common))
    model, processor = VillaClipModel.from_pretrained(folder).eval(), VillaProcessor.from_pretrained(folder)
    data = corpus_of(common)
    names, prompts = attribute_names(data), attribute_prompts(data)
    queries = []
    for name in names:
        with torch.no_grad():
            tokens = [processor.tokenizer([prompt], return_tensors="pt") for prompt in prompts[name]]
            embeds = [model.get_text_features(t["input_ids"], t["attention_mask"])[0] for t in tokens]
        mean = torch.stack(embeds).mean(0)
        queries.append(mean / mean.norm())
    scores = torch.cat([slow_regions(model, processor, example) for example in data]) @ torch.stack(queries).t()
    relevance = torch.zeros_like(scores, dtype=torch.bool)
    for row, labels in zip(relevance, [x for example in data for x in example["region_attributes"]], strict=True):
        row[labels] = True
    assert metrics["villa/region_to_text/r_precision"] == pytest.approx(slow_r_precision(scores, relevance), abs=0.01)
    assert metrics["villa/text_to_region/r_precision"] == pytest.approx(
        slow_r_precision(scores.t(), relevance.t()), abs=0.01
    )
    assert "villa/text_to_region/r_precision" in capsys.readouterr().out


def test_metrics_are_flat_and_say_how_they_were_made(finished, common):
    models = [f"a={model_of(finished, 'stage0')}", f"b={model_of(finished, 'stage2')}"]
    returned = retrieval.main(retrieval.RetrievalArguments(models=models, seed=5, **common))
    metrics = read(common)
    run = metrics.pop("run")
    keys = ("text_to_region/precision@25", "text_to_region/precision@100", "text_to_region/r_precision")
    assert set(metrics) == {f"{name}/{key}" for name in "ab" for key in (*keys, "region_to_text/r_precision")}
    assert metrics == pytest.approx({key: round(value, 2) for key, value in returned.items()})
    assert all(0 <= value <= 100 for value in metrics.values())
    assert run["seed"] == 5 and run["models"] == models and run["split"] == "test"
    assert run["dataset"] == "docmnist" and json.loads(run["dataset_kwargs"])["complexity"] == 5.0
    assert set(run["versions"]) == {"python", *LIBRARIES}
    assert torch.__version__.startswith(run["versions"]["torch"]) and run["seconds"] >= 0


def test_one_model_needs_no_name(finished, common):
    retrieval.main(retrieval.RetrievalArguments(models=[model_of(finished, "stage0")], **common))
    assert "text_to_region/r_precision" in read(common)


def test_batch_size_changes_nothing(finished, common):
    words = {"mapping_model": model_of(finished, "stage1"), "vlm": model_of(finished, "stage0"), "epsilon": 0.5}
    one = mapping.main(mapping.MappingArguments(**words, **common))
    other = mapping.main(mapping.MappingArguments(**words, **{**common, "batch_size": 64}))
    ours = {key: value for key, value in one.items() if not key.startswith("random/")}
    assert ours == pytest.approx({key: value for key, value in other.items() if not key.startswith("random/")})


@pytest.mark.parametrize("mode", ["attributes_to_regions", "regions_to_attributes"])
def test_mapping_against_a_slow_computation(finished, common, mode):
    folder = model_of(finished, "stage1")
    args = mapping.MappingArguments(mapping_model=folder, epsilon=0.3, mode=mode, exclusive_groups=False, **common)
    metrics = mapping.main(args)
    model, processor = VillaMappingModel.from_pretrained(folder).eval(), VillaProcessor.from_pretrained(folder)
    hits = given = true = 0
    for example in corpus_of(common):
        inputs = processor(images=[example["image"]], boxes=[example["regions"]], return_tensors="pt")
        with torch.no_grad():
            scores = model(inputs["pixel_values"], inputs["boxes"], inputs["region_mask"]).scores[0]
        pairs = set()
        for r in range(len(scores)):
            for k in example["attributes"]:
                rivals = scores[:, k] if mode == "attributes_to_regions" else scores[r, example["attributes"]]
                if scores[r, k] > rivals.max() - 0.3:
                    pairs.add((r, k))
        truth = {(r, k) for r, labels in enumerate(example["region_attributes"]) for k in labels}
        hits, given, true = hits + len(pairs & truth), given + len(pairs), true + len(truth)
    assert metrics["mapping/precision"] == pytest.approx(100 * hits / given, abs=0.01)
    assert metrics["mapping/recall"] == pytest.approx(100 * hits / true, abs=0.01)
    assert metrics["mapping/f1"] == pytest.approx(200 * hits / (given + true), abs=0.01)


def test_random_mapping_is_seeded_and_near_half_recall(finished, common):
    words = {"mapping_model": model_of(finished, "stage1"), **common}
    values = [mapping.main(mapping.MappingArguments(seed=seed, **words)) for seed in (0, 0, 1)]
    assert values[0] == values[1]
    assert values[0]["random/mapping/f1"] != values[2]["random/mapping/f1"]
    assert 20 < values[0]["random/mapping/recall"] < 80
    assert not any(key.startswith("vlm_zs/") for key in values[0])


def test_a_perfect_mapping_scores_100(finished, common, monkeypatch):
    def perfect(scores, mask, labels, epsilon, mode, groups=None):
        return truth.pop(0)

    truth = []
    batches = mapping.batches

    def watched(*args):
        for batch in batches(*args):
            truth.append(batch["true_labels"])
            yield batch

    monkeypatch.setattr(mapping, "batches", watched)
    monkeypatch.setattr(mapping, "assign_attributes", perfect)
    metrics = mapping.main(mapping.MappingArguments(mapping_model=model_of(finished, "stage1"), **common))
    assert [metrics[f"mapping/{key}"] for key in ("precision", "recall", "f1")] == [100, 100, 100]


def test_what_is_missing_is_named(finished, common, tmp_path):
    with pytest.raises(ValueError, match="--models names no model"):
        retrieval.main(retrieval.RetrievalArguments(**common))
    with pytest.raises(ValueError, match="--mapping_model names no model"):
        mapping.main(mapping.MappingArguments(**common))
    DatasetDict({"test": corpus_of(common).remove_columns("region_attributes")}).save_to_disk(tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"corpus has no column 'region_attributes', the true pairs"):
        retrieval.main(retrieval.RetrievalArguments(models=["x"], **{**common, "dataset": str(tmp_path / "corpus")}))


def test_a_mapping_model_of_another_vocabulary_is_refused(finished, common):
    options = {**json.loads(common["dataset_kwargs"]), "attributes": ["one", "two", "red", "blue"]}
    options["complexity"] = 8.0
    words = {**common, "dataset_kwargs": json.dumps(options)}
    with pytest.raises(ValueError, match=r"stage1/model maps \['zero', .*the dataset has \['one', 'two'"):
        mapping.main(mapping.MappingArguments(mapping_model=model_of(finished, "stage1"), **words))


def check_picture(path):
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert 300 <= min(picture.size) <= max(picture.size) <= 5000
        return picture.convert("RGB")


def test_figures_are_pictures(finished, common, tmp_path):
    for stage in ("stage0", "stage1"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "log.jsonl").write_text((finished[1] / stage / "log.jsonl").read_text())
    words = {"mapping_model": model_of(finished, "stage1"), "run_dir": str(tmp_path / "run"), "num_images": 2}
    figures.main(figures.FigureArguments(**words, **common))
    curves = check_picture(tmp_path / "run" / "curves.png")
    regions = check_picture(tmp_path / "run" / "regions.png")
    assert len(curves.getcolors(1 << 24)) > 20
    shades = {color for _, color in regions.getcolors(1 << 24)}
    wanted = [tuple(int(shade[i : i + 2], 16) for i in (1, 3, 5)) for shade in (figures.RIGHT, figures.WRONG)]
    assert any(max(abs(a - b) for a, b in zip(shade, near, strict=True)) < 40 for shade in wanted for near in shades)


def test_curves_without_a_log(tmp_path):
    with pytest.raises(ValueError, match=r"holds no stage's log.jsonl; run training/pipeline.py first"):
        figures.draw_curves(tmp_path)


def test_the_script_notes_the_command_that_started_it(finished, common):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = ["--models", model_of(finished, "stage0"), "--dataset_kwargs", common["dataset_kwargs"]]
    command = [sys.executable, "eval/retrieval.py", *words, "--output", common["output"]]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "text_to_region/r_precision" in done.stdout
    assert shlex.split(read(common)["run"]["command"])[1:] == command[1:]
