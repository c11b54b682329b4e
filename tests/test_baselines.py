"""What the baselines of tables 3 and 5 change in the stages: their data, their loss, where their pairs come from."""

import json

import pytest
import torch
from datasets import load_from_disk
from tower_folders import encoder_folder, timm_folder
from training_helpers import (
    ChildError,
    copy_of_run,
    files_of,
    finished_run,
    in_child,
    in_two_processes,
    run_stage,
    stage_arguments,
    write_config,
)

import contrast
import map_regions
import stage0
from datasets_scripts.loading import load_split
from datasets_scripts.schema import attribute_names
from modeling_villa import VillaClipModel, VillaMappingModel, VillaProcessor
from modeling_villa.assignment_villa import assign_attributes
from modeling_villa.losses_villa import clip_contrastive_loss, contrastive_targets
from texts import tokenize

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


def objective_of(finished, *words):
    """Stage 0's objective over the finished run's model, a batch of its corpus, and the arguments."""
    config, run_dir = finished
    args = stage_arguments("stage0", config, *words)
    folder = run_dir / "stage0" / "model"
    model, processor = VillaClipModel.from_pretrained(folder), VillaProcessor.from_pretrained(folder)
    dataset = load_split("docmnist", json.loads(args.dataset_kwargs), "train")
    collate = stage0.ImageTextCollator(processor, len(attribute_names(dataset)))
    batch = collate([dataset[i] for i in (0, 1, 2, 1)])  # twice the same text
    return stage0.ImageTextObjective(model, args).eval(), batch, processor


@torch.no_grad()
@pytest.mark.parametrize("identical", ["negatives", "ignored", "positives"])
def test_every_region_is_held_against_its_image_s_whole_text(finished, identical):
    words = ("--align", "regions", "--identical_texts", identical, "--label_smoothing", 0.2)
    objective, batch, processor = objective_of(finished, *words)
    model, mask = objective.model, batch["region_mask"]
    regions, texts, ids = [], [], []
    for i, text in enumerate(batch["text"]):
        tokens = tokenize(processor.tokenizer, [text])
        for r in range(int(mask[i].sum())):
            one = model.get_region_features(batch["pixel_values"][i : i + 1], batch["boxes"][i : i + 1, r : r + 1])
            regions.append(one[0, 0])
            texts.append(model.get_text_features(**tokens)[0])
            ids.append(batch["text"].index(text))
    pairs = contrastive_targets(torch.tensor(ids), identical)
    expected = clip_contrastive_loss(torch.stack(regions), torch.stack(texts), model.logit_scale.exp(), *pairs, 0.2)
    torch.testing.assert_close(objective(batch), expected)
    whole, _, _ = objective_of(finished)
    assert not torch.isclose(whole(batch), expected)


def test_ids_of_texts_tell_equal_texts_and_weights():
    sentences = ["a", "b", "c"]
    weights = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0.5, 0.5, 0], [0.25, 0.75, 0]])
    ids = contrast.ids_of_texts(sentences, weights)
    assert ids.dtype == torch.long and len(set(ids.tolist())) == 4 and ids[1] == ids[3]
    other = contrast.ids_of_texts(["b", "a"], torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    assert other.tolist() == [ids[1], ids[0]]
    assert contrast.ids_of_texts([], torch.zeros(0, 0)).shape == (0,)


def loss_of_rank(values, ids, count):
    """The loss and its gradient of one of two processes, which hold `count` rows and the rest."""
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    values, ids = torch.tensor(values), torch.tensor(ids)
    mine = slice(0, count) if rank == 0 else slice(count, None)
    args = stage0.Stage0Arguments(label_smoothing=0.2, identical_texts="positives")
    visual = values[0, mine].clone().requires_grad_()
    loss = contrast.contrastive_loss(visual, values[1, mine], ids[mine], torch.tensor(10.0), args)
    loss.backward()
    return loss.item(), visual.grad.tolist()


def test_identical_texts_are_found_across_processes():
    values = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([3, 5, 3, -1, 5, 3, 8])
    args = stage0.Stage0Arguments(label_smoothing=0.2, identical_texts="positives")
    visual = values[0].clone().requires_grad_()
    expected = contrast.contrastive_loss(visual, values[1], ids, torch.tensor(10.0), args)
    expected.backward()
    (first, one), (second, other) = in_two_processes(loss_of_rank, values.tolist(), ids.tolist(), 3)
    assert first == second == pytest.approx(expected.item())
    # DistributedDataParallel takes the mean over processes.
    torch.testing.assert_close(torch.tensor([*one, *other]) / 2, visual.grad)


def test_the_options_are_stage_2_s_too(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1", "map_regions")
    words = ("--run_dir", copy, "--max_steps", 1)
    logs = []
    for name, more in {"plain": (), "soft": ("--label_smoothing", 0.2, "--identical_texts", "ignored")}.items():
        in_child(run_stage, "stage2", config, *words, "--output_dir", tmp_path / name, *more)
        logs.append(json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["loss"])
    assert logs[0] != logs[1]
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1.0"):
        stage_arguments("stage2", config, "--label_smoothing", 1)


def test_no_epochs_keep_the_model_as_it_starts(tmp_path):
    config = write_config(tmp_path)
    folders = [
        in_child(run_stage, "stage0", config, "--num_epochs", 0, "--output_dir", tmp_path / name, *more)
        for name, more in {"scratch": (), "other_seed": ("--seed", 1)}.items()
    ]
    again = in_child(
        run_stage, "stage0", config, "--num_epochs", 0, "--vlm", folders[0], "--output_dir", tmp_path / "vlm"
    )
    weights = [files_of(folder)["model.safetensors"] for folder in (*folders, again)]
    assert weights[0] == weights[2] != weights[1]
    assert not (tmp_path / "scratch" / "checkpoints").exists()


def test_a_vlm_s_regions_may_be_crops(finished, tmp_path):
    config, run_dir = finished
    vlm = run_dir / "stage0" / "model"
    words = ("--vlm", vlm, "--region_source", "crop", "--num_epochs", 0, "--output_dir", tmp_path / "crop")
    model = VillaClipModel.from_pretrained(in_child(run_stage, "stage0", config, *words))
    assert model.config.vision_config.region_source == "crop"
    assert VillaClipModel.from_pretrained(vlm).config.vision_config.region_source == "roi"
    copy = copy_of_run(run_dir, tmp_path, "stage0")
    words = ("--run_dir", copy, "--vlm", tmp_path / "crop" / "model", "--max_steps", 1)
    mapping = VillaMappingModel.from_pretrained(in_child(run_stage, "stage1", config, *words))
    assert mapping.config.vlm_config.vision_config.region_source == "crop"


def test_other_towers_go_through_all_stages(tmp_path):
    timm_folder(tmp_path / "image", "resnet18", 24, {"layers": [1, 1], "channels": [8, 16]})
    encoder_folder(tmp_path / "text", "bert", "mean_tokens")
    towers = str(tmp_path / "image"), str(tmp_path / "text")
    vlm = tmp_path / "vlm"
    VillaClipModel.from_towers(*towers, image_size=84).save_pretrained(vlm)
    VillaProcessor.from_towers(*towers, image_size=84).save_pretrained(vlm)
    config = write_config(tmp_path, max_steps=1, stage0={"vlm": str(vlm)}, stage2={"image_tower": "vlm"})
    for stage in ("stage0", "stage1", "map_regions"):
        in_child(run_stage, stage, config)
    start = VillaClipModel.from_pretrained(tmp_path / "run" / "stage0" / "model").state_dict()
    names = {name for name in start if name.startswith("text_model.")}
    for how in ("full", "lora", "frozen"):
        words = ("--text", how, "--vision", "lora", "--output_dir", tmp_path / how)
        trained = VillaClipModel.from_pretrained(in_child(run_stage, "stage2", config, *words)).state_dict()
        moved = {name for name in names if not torch.equal(start[name], trained[name])}
        assert ("text_model.encoder.encoder.layer.0.attention.self.query.weight" in moved) == (how != "frozen")
        assert ("text_model.encoder.embeddings.word_embeddings.weight" in moved) == (how == "full")


def test_a_tokenizer_that_is_not_the_text_tower_s_is_refused(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0")
    folder = copy / "stage0" / "model"
    processor = VillaProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["new", "words"])
    processor.save_pretrained(folder)
    size = VillaClipModel.from_pretrained(folder).config.text_config.vocab_size
    with pytest.raises(ChildError, match=rf"stage0/model: The tokenizer is not .*{size + 2} tokens where .* {size}"):
        in_child(run_stage, "stage1", config, "--run_dir", copy)


@torch.no_grad()
def test_pairs_by_the_vlm_s_own_cosines(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0")
    folder = in_child(run_stage, "map_regions", config, "--run_dir", copy, "--scores", "vlm", "--epsilon", 0.1)
    pairs = load_from_disk(str(folder))["train"]
    args = stage_arguments("map_regions", config, "--scores", "vlm")
    dataset = load_split("docmnist", json.loads(args.dataset_kwargs), "train")
    scorer = map_regions.Scorer("vlm", copy / "stage0" / "model", dataset)
    groups = torch.tensor(VillaMappingModel.from_pretrained(run_dir / "stage1" / "model").config.group_ids)
    for row, example in zip(pairs.select(range(5)), dataset, strict=False):
        inputs = scorer.processor(images=[example["image"]], boxes=[example["regions"]], return_tensors="pt")
        labels = torch.zeros(1, 20, dtype=torch.bool)
        labels[0, example["attributes"]] = True
        scores = scorer.model.get_region_features(**inputs) @ scorer.queries.t()
        expected = assign_attributes(scores, inputs["region_mask"], labels, 0.1, groups=groups)[0]
        assert row["assigned_attributes"] == [region.nonzero()[:, 0].tolist() for region in expected]
    mapped = load_from_disk(str(run_dir / "map_regions"))["train"]
    assert mapped["assigned_attributes"][:] != pairs["assigned_attributes"][:]
