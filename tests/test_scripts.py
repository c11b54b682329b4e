"""The scripts as a user starts them, and what the stages do inside: texts, passes, variants."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml
from datasets import load_from_disk
from PIL import Image
from training_helpers import (
    ENVIRONMENT,
    ROOT,
    STAGES,
    copy_of_run,
    files_of,
    finished_run,
    in_child,
    read_log,
    run_stage,
    stage_arguments,
    write_config,
)

import stage2
from datasets_scripts.loading import Collator, load_split
from datasets_scripts.schema import attribute_names, attribute_prompts
from modeling_villa import VillaClipModel, VillaMappingModel, VillaProcessor
from texts import FrozenTexts, RegionTexts, tokenize, train_tokenizer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


def python(*words, **environment):
    """Run Python at the project's root as a user would; returns what it printed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, **environment}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def artifact(run_dir, stage):
    model = run_dir / stage / "model"
    return model if model.exists() else run_dir / stage


# Scripts


# The pipeline's tests run the same stages in one launch.
@pytest.mark.parametrize(
    "stage", [stage if stage == "stage1" else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]
)
def test_accelerate_launches_each_stage(finished, tmp_path, stage):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, *[other for other in STAGES if other != stage])
    steps = ("--max_steps", 2) if stage.startswith("stage") else ()
    python(*LAUNCH, f"training/{stage}.py", "--config", config, "--run_dir", copy, *steps)
    assert (artifact(copy, stage) / "villa_artifact.json").exists()
    if steps:
        assert len([line for line in read_log(copy / stage) if "loss" in line]) == 2
    else:
        # The same bytes as in the process that made the finished run.
        mine, theirs = (files_of(folder / stage) for folder in (copy, run_dir))
        for files in (mine, theirs):
            for name in [name for name in files if name.endswith("state.json")]:
                del files[name]
        assert mine == theirs


def test_torchrun_starts_two_processes(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0")
    words = ("--config", config, "--run_dir", copy, "--max_steps", 2, "--batch_size", 4)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    python(*launcher, "training/stage1.py", *words, GLOO_SOCKET_IFNAME="lo")
    assert VillaMappingModel.from_pretrained(copy / "stage1" / "model").config.num_heads == 20
    alone = copy_of_run(run_dir, tmp_path / "alone", "stage0")
    in_child(run_stage, "stage1", config, "--run_dir", alone, "--max_steps", 2, "--batch_size", 4)
    assert read_log(copy / "stage1")[0]["loss"] != read_log(alone / "stage1")[0]["loss"]  # of 8 images, not 4


@pytest.fixture(scope="module")
def pipeline_run(tmp_path_factory):
    """(config, run folder, printed) of the pipeline, in one command."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = write_config(folder, max_steps=3, tracker=None)
    return config, folder / "run", python(*LAUNCH, "training/pipeline.py", "--config", config)


def numbers(printed):
    """The table's lines."""
    lines = printed.splitlines()
    rows = ("CLIP-FT-Img", "ViLLA", "Ceiling", "Random", "VLM-ZS")
    return [line for line in lines if line.startswith(rows)]


def test_pipeline_prints_a_table_and_leaves_metrics_and_pictures(pipeline_run):
    _, run_dir, printed = pipeline_run
    assert len(numbers(printed)) == 6
    assert "P@25" in printed and "F1" in printed
    metrics = json.loads((run_dir / "metrics.json").read_text())
    run = metrics.pop("run")
    assert set(run) == {"retrieval", "mapping"}
    assert {"clip_ft_img/text_to_region/r_precision", "ceiling/region_to_text/r_precision", "mapping/f1"} <= set(
        metrics
    )
    assert all(isinstance(value, float) and 0 <= value <= 100 for value in metrics.values())
    assert f"{metrics['villa/region_to_text/r_precision']:.1f}" in numbers(printed)[1]
    for name in ("curves.png", "regions.png"):
        with Image.open(run_dir / name) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) >= 300 and max(picture.size) <= 5000
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_pipeline_trains_the_ceiling_on_the_truth(pipeline_run):
    _, run_dir, _ = pipeline_run
    metas = [
        json.loads((run_dir / name / "model" / "villa_artifact.json").read_text())
        for name in ("stage2", "ceiling/stage2")
    ]
    assert [meta["supervision"] for meta in metas] == ["pairs", "labels"]


def test_pipeline_given_again_skips_the_stages_and_prints_the_same(pipeline_run):
    config, run_dir, printed = pipeline_run
    models = {path: path.stat().st_mtime_ns for path in run_dir.glob("*/model/*")}
    pairs = {path: path.stat().st_mtime_ns for path in (run_dir / "map_regions").rglob("*")}
    began = time.monotonic()
    again = python(*LAUNCH, "training/pipeline.py", "--config", config)
    assert time.monotonic() - began < 200
    assert numbers(again) == numbers(printed)
    assert {path: path.stat().st_mtime_ns for path in run_dir.glob("*/model/*")} == models
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "map_regions").rglob("*")} == pairs


# Variants of the stages


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("stage1", ("--encoder", "frozen")),
        ("stage1", ("--num_heads", 1, "--residual", 0.5)),
        ("stage2", ("--supervision", "labels")),
        ("stage2", ("--region_text", "prompts", "--image_tower", "vlm")),
        ("stage2", ("--projector_width", 8, "--vision", "frozen")),
        ("stage2", ("--text", "frozen", "--learn_temperature", "true")),
        ("stage0", ("--text", "frozen", "--gradient_accumulation_steps", 2)),
        ("stage0", ("--mixed_precision", "bf16")),
        ("stage1", ("--tracker", "tensorboard")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
def test_variants(finished, tmp_path, stage, words):
    config, run_dir = finished
    before = [other for other in STAGES if other != stage]
    copy = copy_of_run(run_dir, tmp_path, *before)
    run_stage(stage, config, "--run_dir", copy, "--max_steps", 2, *words)
    lines = [line for line in read_log(copy / stage) if "loss" in line]
    assert len(lines) == 2 and all(0 < line["loss"] < 20 for line in lines)
    model = (VillaMappingModel if stage == "stage1" else VillaClipModel).from_pretrained(copy / stage / "model")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    if stage == "stage1":
        origin = VillaClipModel.from_pretrained(run_dir / "stage0" / "model").state_dict()
        same = [torch.equal(tensor, model.vlm.state_dict()[name]) for name, tensor in origin.items()]
        assert all(same) == ("frozen" in words)


def test_stage2_keeps_a_frozen_text_tower_and_trains_the_rest(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1", "map_regions")
    run_stage("stage2", config, "--run_dir", copy, "--max_steps", 2, "--text", "frozen")
    origin = VillaClipModel.from_pretrained(run_dir / "stage0" / "model").state_dict()
    tower = VillaMappingModel.from_pretrained(run_dir / "stage1" / "model").vlm.vision_model.state_dict()
    found = VillaClipModel.from_pretrained(copy / "stage2" / "model").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in origin.items() if name.startswith("text_model."))
    assert torch.equal(found["logit_scale"], origin["logit_scale"])
    # It began with the mapping model's tower: two small updates away from it, far from Stage 0's.
    name = "vision_model.backbone.conv1.weight"
    start = tower[name.removeprefix("vision_model.")]
    assert not torch.equal(found[name], start)
    assert (found[name] - start).norm() < (found[name] - origin[name]).norm()


def test_frozen_encoder_scores_as_the_whole_model_does(finished, tmp_path):
    """The region store's embeddings are those that the model computes from pixels."""
    config, run_dir = finished
    data = load_split("docmnist", yaml.safe_load(config.read_text())["dataset_kwargs"], "validation")
    folder = run_dir / "stage0" / "model"
    model, processor = VillaClipModel.from_pretrained(folder).eval(), VillaProcessor.from_pretrained(folder)
    batch = Collator(processor, len(attribute_names(data)))([data[i] for i in range(5)])
    with torch.no_grad():
        embeds = model.vision_model(batch["pixel_values"], batch["boxes"], batch["region_mask"]).region_embeds
    store = load_from_disk(str(run_dir / "embed_regions"))["validation"].with_format("torch")
    for i in range(5):
        assert store[i]["image_id"] == batch["image_id"][i]
        torch.testing.assert_close(store[i]["region_embeds"], embeds[i][batch["region_mask"][i]], rtol=1e-4, atol=1e-5)


# What runs how often


def test_one_trunk_pass_per_batch_and_frozen_texts_once(finished, tmp_path, monkeypatch):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1", "map_regions")
    images, texts, batches = [], [], []

    def counted(method, seen, length):
        def call(self, *inputs, **named):
            seen.append(length(inputs, named))
            return method(self, *inputs, **named)

        return call

    vision = type(VillaClipModel.from_pretrained(run_dir / "stage0" / "model").vision_model)
    size = lambda inputs, named: len(next(iter([*inputs, *named.values()])))  # noqa: E731
    monkeypatch.setattr(vision, "get_feature_map", counted(vision.get_feature_map, images, size))
    monkeypatch.setattr(VillaClipModel, "get_text_features", counted(VillaClipModel.get_text_features, texts, size))
    objective = stage2.RegionTextObjective
    monkeypatch.setattr(
        objective, "forward", counted(objective.forward, batches, lambda inputs, _: len(inputs[0]["image_id"]))
    )
    run_stage("stage2", config, "--run_dir", copy, "--max_steps", 3, "--text", "frozen")
    assert images == batches == [8, 8, 8, 8]  # three updates, one batch of validation
    options = yaml.safe_load(config.read_text())["dataset_kwargs"]
    corpus = [load_split("docmnist", options, split) for split in ("train", "validation")]
    distinct = {text for data in corpus for text in data["text"]}
    distinct |= {sentence for data in corpus for sentences in data["sentences"] for sentence in sentences}
    distinct |= {prompt for prompts in attribute_prompts(corpus[0]).values() for prompt in prompts}
    assert sum(texts) == len(distinct)


# Texts


def test_the_whole_image_is_one_more_region():
    pixels, mask = torch.zeros(2, 3, 40, 60), torch.tensor([[True, False], [True, True]])
    boxes, longer = stage2.append_whole_image(pixels, torch.rand(2, 2, 4), mask)
    assert boxes[:, 2].tolist() == [[0, 0, 60, 40]] * 2
    assert longer.tolist() == [[True, False, True], [True, True, True]]


def test_a_frozen_backbone_stays_as_it_was(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1", "map_regions")
    words = ("--run_dir", copy, "--max_steps", 2, "--vision", "frozen")
    run_stage("stage2", config, *words, "--projector_width", 8)
    origin = VillaMappingModel.from_pretrained(run_dir / "stage1" / "model").vlm.vision_model.state_dict()
    found = VillaClipModel.from_pretrained(copy / "stage2" / "model").vision_model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in origin.items())
    with pytest.raises(ValueError, match="nothing to train"):
        run_stage("stage2", config, *words, "--text", "frozen", "--output_dir", tmp_path / "nothing")


def test_a_new_projector_leaves_the_rest_as_it_was(finished):
    config, run_dir = finished
    folders = run_dir / "stage0" / "model", run_dir / "stage1" / "model"
    plain, wide = (
        stage2.build_vlm(stage_arguments("stage2", config, *words), *folders)[0].state_dict()
        for words in ((), ("--projector_width", 8))
    )
    assert all(torch.equal(wide[name], tensor) for name, tensor in plain.items())
    assert {name.split(".")[1] for name in set(wide) - set(plain)} == {"projector"}


def test_stage2_may_have_a_temperature_of_its_own(finished):
    config, run_dir = finished
    folders = run_dir / "stage0" / "model", run_dir / "stage1" / "model"
    for words, tau in (((), 0.07), (("--temperature", 0.1), 0.1)):
        model, _ = stage2.build_vlm(stage_arguments("stage2", config, "--projector_width", 8, *words), *folders)
        assert model.config.temperature == tau and model.logit_scale.exp().item() == pytest.approx(1 / tau)
    with pytest.raises(ValueError, match=r"temperature must be positive, got -1\.0"):
        stage_arguments("stage2", config, "--temperature", -1)


def test_frozen_texts_equal_the_towers_output(finished):
    folder = finished[1] / "stage0" / "model"
    model, processor = VillaClipModel.from_pretrained(folder).eval(), VillaProcessor.from_pretrained(folder)
    texts = ["the digit is red", "a", "the shape is a circle", "a"]
    frozen = FrozenTexts(model, processor.tokenizer, texts, batch_size=2)
    assert len(frozen.embeds) == 3 and not frozen.embeds.requires_grad
    with torch.no_grad():
        expected = model.get_text_features(**tokenize(processor.tokenizer, texts))
    torch.testing.assert_close(frozen(texts), expected, rtol=1e-5, atol=1e-6)


def slow_region_texts(prompts, source, examples, pairs, embed):
    """A region's text embedding: the mean over its attributes of the mean over their sentences."""
    rows = []
    for example, regions in zip(examples, pairs, strict=True):
        for attributes in regions:
            means = []
            for attribute in attributes:
                sentences = prompts[attribute]
                if source == "sentences":
                    for stated, number in zip(example["attributes"], example["attribute_sentences"], strict=True):
                        if stated == attribute and number >= 0:
                            sentences = [example["sentences"][number]]
                means.append(torch.stack([embed(sentence) for sentence in sentences]).mean(0))
            if means:
                rows.append(torch.stack(means).mean(0))
    return torch.stack(rows)


EXAMPLES = [
    {"attributes": [0, 2], "attribute_sentences": [1, -1], "sentences": ["s0", "s1"]},
    {"attributes": [1, 0, 3], "attribute_sentences": [0, 0, 1], "sentences": ["t0", "t1"]},
    {"attributes": [3], "attribute_sentences": [0], "sentences": ["u0"]},
]
# The second image's second region has attribute 2, which its own text does not state.
PAIRS = [[[0], [2, 0], []], [[0, 1], [2, 3]], [[]]]
PROMPTS = [["p0"], ["p1", "q1"], ["p2", "q2", "s1"], ["p3"]]


@pytest.mark.parametrize("source", ["sentences", "prompts"])
def test_region_texts_against_a_slow_loop(source):
    sentences, weights, where = RegionTexts(PROMPTS, source)(EXAMPLES, PAIRS)
    assert len(set(sentences)) == len(sentences)
    assert where.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    table = torch.randn(len(sentences), 6, generator=torch.Generator().manual_seed(0))
    expected = slow_region_texts(PROMPTS, source, EXAMPLES, PAIRS, lambda sentence: table[sentences.index(sentence)])
    torch.testing.assert_close(weights @ table, expected)
    if source == "prompts":
        assert not {"s0", "t0", "t1", "u0"} & set(sentences)
    else:
        assert "p0" not in sentences and "q2" in sentences  # -1: the prompts of attribute 2


def test_regions_without_attributes_have_no_text():
    sentences, weights, where = RegionTexts(PROMPTS, "sentences")(EXAMPLES[:1], [[[], [], []]])
    assert sentences == [] and weights.shape == (0, 0) and where.shape == (0, 2)
    with pytest.raises(ValueError, match='"sentences" or "prompts", got \'words\''):
        RegionTexts(PROMPTS, "words")


def test_tokenizer_is_deterministic_bounded_and_reversible():
    corpus = ["The digit is Red . a large circle", "the digit is seven", "Größe — 小"] * 3
    one, two = (train_tokenizer(corpus, 300, 12) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert len(one) <= 300
    ids = one("the digit is red")["input_ids"]
    assert ids[0] == one.bos_token_id and ids[-1] == one.eos_token_id
    assert one.unk_token_id not in ids
    assert one.decode(ids, skip_special_tokens=True).strip() == "the digit is red"
    tokens = tokenize(one, ["the digit is red " * 9, "a"])
    assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (2, 12)
    assert tokens["input_ids"][0, -1] == one.eos_token_id  # cut, and yet it ends
    assert tokens["attention_mask"][1].sum() < 12


def test_the_configuration_reaches_the_model(finished):
    config, run_dir = finished
    args = stage_arguments("stage0", config)
    model = VillaClipModel.from_pretrained(run_dir / "stage0" / "model")
    assert model.config.vision_config.image_size == args.image_size == 84
    assert model.config.vision_config.backbone_kwargs == json.loads(args.backbone_kwargs)
    assert model.config.projection_dim == 16
    assert VillaProcessor.from_pretrained(run_dir / "stage0" / "model").tokenizer.model_max_length == 192


def test_no_path_of_this_machine_is_saved_with_a_model(finished):
    _, run_dir = finished
    for path in run_dir.glob("*/model/*config.json"):
        assert str(run_dir) not in path.read_text(), path
