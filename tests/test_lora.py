"""LoRA in Stages 1 and 2: what is trained, what is kept, and that every way to load it gives the same model."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from local_hub import LocalHub
from safetensors.torch import load_file
from tiny_models import VLM
from torch import nn
from training_helpers import (
    ENVIRONMENT,
    ROOT,
    STAGES,
    copy_of_run,
    files_of,
    in_two_processes,
    read_log,
    reset_accelerate,
    run_stage,
    stage_arguments,
    write_config,
)

import lora
import stage1
import stage2
from modeling_villa import VillaClipConfig, VillaClipModel, VillaMappingModel

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# Batch normalisation, whose statistics must stay; the dropout makes every update random.
BACKBONE = {"layers": [1, 1], "channels": [8, 16], "drop_rate": 0.1}
FAST = ("--learning_rate", 1e-2)
LORA = ("--lora_rank", 4, *FAST)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, run folder) of Stage 1 with LoRA, and what comes before and after it."""
    folder = tmp_path_factory.mktemp("lora")
    config = write_config(folder, stage0={"backbone_kwargs": BACKBONE}, stage1={"encoder": "lora"})
    for stage, words in (("stage0", ()), ("stage1", LORA), ("map_regions", ())):
        reset_accelerate()
        run_stage(stage, config, *words)
    return config, folder / "run"


def state_of(folder, cls=VillaMappingModel):
    return cls.from_pretrained(folder).state_dict()


def trained_state(output_dir):
    """The model as the training loop left it, PEFT's layers inside."""
    return load_file(sorted((output_dir / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def assert_equal(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def changed(before, after):
    """Names of the tensors that differ."""
    assert set(before) == set(after)
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def batch():
    """Pixels, boxes and token ids, the same every time."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 84, 84, generator=generator)
    boxes = torch.tensor([[[0.0, 0, 28, 28], [20, 30, 84, 60]]] * 2)
    return pixels, boxes, torch.randint(4, 50, (3, 7), generator=generator)


@torch.no_grad()
def outputs_of(model):
    pixels, boxes, ids = batch()
    model.eval()
    if isinstance(model, VillaMappingModel):
        return model(pixels, boxes).scores
    return torch.cat([model.get_region_features(pixels, boxes).flatten(0, 1), model.get_text_features(ids)])


# Stage 1


def test_stage1_trains_adapters_and_heads_and_nothing_else(finished):
    _, run_dir = finished
    base, whole = (state_of(run_dir / "stage1" / name) for name in ("base", "model"))
    vlm = VillaMappingModel.from_pretrained(run_dir / "stage1" / "base").vlm.state_dict()
    assert_equal(vlm, state_of(run_dir / "stage0" / "model", VillaClipModel))
    layers = {name for name in base if "vision_model" in name and base[name].dim() > 1}
    heads = {f"projection_heads.{kind}_{side}" for kind in ("weight", "bias") for side in ("in", "out")}
    assert changed(base, whole) == layers | heads
    # The same of what was trained, before it was merged.
    trained = trained_state(run_dir / "stage1")
    for name, tensor in trained.items():
        own = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if "lora_" not in name and ".modules_to_save." not in name:
            assert torch.equal(tensor, base[own]), name
    assert len([name for name in trained if ".lora_B." in name and tensor_is_trained(trained[name])]) == len(layers)


def tensor_is_trained(tensor):
    """LoRA's B begins as zeros."""
    return tensor.abs().max() > 1e-4


def test_batch_statistics_stay_and_would_move_without_lora(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0")
    run_stage("stage1", config, "--run_dir", copy, "--encoder", "full", "--max_steps", 1)
    before = state_of(run_dir / "stage0" / "model", VillaClipModel)
    statistics = {name for name in before if "running_" in name or "num_batches" in name}
    assert statistics
    moved = {}
    for folder in (run_dir, copy):
        vlm = VillaMappingModel.from_pretrained(folder / "stage1" / "model").vlm
        moved[folder] = changed(before, vlm.state_dict())
    assert not statistics & moved[run_dir] and statistics <= moved[copy]
    assert not (copy / "stage1" / "adapter").exists()


@pytest.mark.parametrize(
    ("trained", "modes"),
    [
        ((True, True), [True, True, True]),
        ((True, False), [True, False, True]),  # adapted: the dropout works on
        ((False, False), [False, False, False]),
    ],
)
def test_what_is_not_trained_keeps_its_statistics(trained, modes):
    tower = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout())
    for module, value in zip(tower, trained, strict=False):
        module.requires_grad_(value)
    lora.keep_statistics(tower.train())
    assert [module.training for module in tower] == modes


# Stage 2


@pytest.mark.parametrize(
    ("vision", "text", "words"),
    [
        ("lora", "lora", ()),
        ("lora", "frozen", ("--projector_width", 8)),
        ("lora", "full", ()),
        ("full", "lora", ("--image_tower", "vlm")),
        ("frozen", "lora", ("--projector_width", 8)),
    ],
)
def test_stage2_trains_each_tower_as_told(finished, tmp_path, vision, text, words):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1", "map_regions")
    words = ("--run_dir", copy, "--vision", vision, "--text", text, "--max_steps", 3, *LORA, *words)
    run_stage("stage2", config, *words)
    folder = copy / "stage2"
    base, whole = (state_of(folder / name, VillaClipModel) for name in ("base", "model"))
    built, _ = stage2.build_vlm(
        stage_arguments("stage2", config, *words), copy / "stage0" / "model", copy / "stage1" / "model"
    )
    assert all(".projector." in name for name in changed(built.state_dict(), base))
    moved = changed(base, whole)
    for prefix, how in (("vision_model.backbone.", vision), ("text_model.", text)):
        weights = {name for name in base if name.startswith(prefix)}
        adapted = {name for name in weights if base[name].dim() > 1 and "embedding" not in name}
        if how == "full":
            # Tokens that never occur and biases of keys get no gradient; all that matters does.
            assert adapted <= moved
            assert ({name for name in weights if "running_" in name}) <= moved
        else:
            assert weights & moved == (adapted if how == "lora" else set())
    projector = {name for name in base if ".projector." in name}
    assert projector <= moved and bool(projector) == ("--projector_width" in words)
    assert "logit_scale" not in moved

    model = VillaClipModel.from_pretrained(folder / "base")
    before = outputs_of(model)
    model.load_adapter(folder / "adapter")
    in_one_call = VillaClipModel.from_pretrained(folder / "adapter")
    for loaded in (model, in_one_call):
        assert_equal(loaded.state_dict(), trained_state(folder))
    expected = outputs_of(in_one_call)
    merged = outputs_of(VillaClipModel.from_pretrained(folder / "model"))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
    assert (before - expected).abs().max() > 1e-3


# The adapter


FRESH = """
import sys, torch
from transformers import AutoModel
import modeling_villa
folder, batch, out = sys.argv[1:]
pixels, boxes = torch.load(batch)
values = {}
def scores(model):
    with torch.no_grad():
        return model.eval()(pixels, boxes).scores
model = AutoModel.from_pretrained(folder + "/adapter")
values["adapter"] = scores(model)
values["merged"] = scores(AutoModel.from_pretrained(folder + "/model"))
base = AutoModel.from_pretrained(folder + "/base")
values["base"] = scores(base)
base.push_to_hub("org/base")
base.load_adapter(folder + "/adapter")
values["load_adapter"] = scores(base)
base.disable_adapters()
values["disabled"] = scores(base)
model.peft_config["default"].base_model_name_or_path = "org/base"
model.push_to_hub("org/adapter")
values["pushed"] = scores(AutoModel.from_pretrained("org/adapter"))
other = AutoModel.from_pretrained("org/base")
other.load_adapter("org/adapter")
values["pushed_load_adapter"] = scores(other)
torch.save(values, out)
"""


@pytest.fixture(scope="module")
def fresh(finished, tmp_path_factory):
    """(scores of each way to load Stage 1's model, files on the Hub) in a process that only imports the package."""
    folder, moved = finished[1] / "stage1", tmp_path_factory.mktemp("moved")
    torch.save(batch()[:2], moved / "batch.pt")
    copy = copy_of_run(finished[1], moved, "stage1") / "stage1"
    assert files_of(copy) == files_of(folder)
    with LocalHub() as hub:
        environment = {**os.environ, **ENVIRONMENT, **hub.environment(moved / "hf"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", FRESH, copy, moved / "batch.pt", moved / "scores.pt"]
        done = subprocess.run(
            list(map(str, command)), cwd=moved, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        pushed = {name: hub.files(name) for name in ("org/base", "org/adapter")}
    return torch.load(moved / "scores.pt", weights_only=True), pushed


def test_every_way_to_load_gives_the_trained_model(finished, fresh):
    values, _ = fresh
    adapted = VillaMappingModel.from_pretrained(finished[1] / "stage1" / "adapter")
    assert_equal(adapted.state_dict(), trained_state(finished[1] / "stage1"))
    expected = outputs_of(adapted)
    for name in ("adapter", "load_adapter", "pushed", "pushed_load_adapter"):
        assert torch.equal(values[name], expected), name
    torch.testing.assert_close(values["merged"], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(values["disabled"], values["base"])
    assert (values["base"] - expected).abs().max() > 1e-3


def test_what_is_pushed_is_the_adapter_alone(fresh):
    _, pushed = fresh
    config = json.loads(pushed["org/adapter"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/base"
    assert "model.safetensors" not in pushed["org/adapter"] and "model.safetensors" in pushed["org/base"]
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(pushed["org/adapter"])


def test_the_adapter_names_no_path_of_this_machine(finished):
    folder = finished[1] / "stage1"
    for path in [*folder.glob("adapter/*.json"), *folder.glob("base/*.json"), *folder.glob("*/README.md")]:
        assert str(finished[1].parent) not in path.read_text(), path
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base" and (folder / "adapter" / "../base").is_dir()
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 32, ["projection_heads"])
    assert config["target_modules"] == sorted(config["target_modules"])
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name or "projection_heads" in name for name in kept)


def test_later_steps_read_an_adapter_as_they_read_a_model(finished, tmp_path):
    config, run_dir = finished
    words = ("--mapping_model", run_dir / "stage1" / "adapter", "--output_dir", tmp_path / "pairs")
    run_stage("map_regions", config, *words)
    tables = [next((folder / "train").glob("*.arrow")) for folder in (tmp_path / "pairs", run_dir / "map_regions")]
    assert tables[0].read_bytes() == tables[1].read_bytes()


# Going on, and processes


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_interrupted_and_resumed_it_ends_with_the_same_bytes(finished, tmp_path, monkeypatch, stage):
    config, run_dir = finished
    before = ("stage0",) if stage == "stage1" else ("stage0", "stage1", "map_regions")
    copy = copy_of_run(run_dir, tmp_path, *before)
    words = ("--run_dir", copy, *LORA, "--lora_dropout", 0.1)
    if stage == "stage2":
        words += ("--vision", "lora", "--text", "lora", "--projector_width", 8)
    objective = {"stage1": stage1.MappingObjective, "stage2": stage2.RegionTextObjective}[stage]
    run_stage(stage, config, *words, "--output_dir", tmp_path / "whole")
    forward, calls = objective.forward, []

    def breaks(self, batch):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(objective, "forward", breaks)
        with pytest.raises(KeyboardInterrupt):
            run_stage(stage, config, *words)
    assert [path.name for path in (copy / stage / "checkpoints").iterdir()] == ["step-00000003"]
    assert not (copy / stage / "base").exists() and not (copy / stage / "adapter").exists()
    run_stage(stage, config, *words)
    for name in ("model", "base", "adapter"):
        assert files_of(copy / stage / name) == files_of(tmp_path / "whole" / name)
    assert read_log(copy / stage) == read_log(tmp_path / "whole")


def test_two_processes_train_adapters(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0")
    in_two_processes(run_stage, "stage1", config, "--run_dir", copy, "--max_steps", 2, "--batch_size", 4, *LORA)
    expected = outputs_of(VillaMappingModel.from_pretrained(copy / "stage1" / "adapter"))
    found = outputs_of(VillaMappingModel.from_pretrained(copy / "stage1" / "model"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_adapters_of_an_earlier_run_do_not_stay(finished, tmp_path):
    config, run_dir = finished
    copy = copy_of_run(run_dir, tmp_path, "stage0", "stage1")
    words = ("--run_dir", copy, "--max_steps", 1, "--no_resume")
    run_stage("stage1", config, *words, "--encoder", "full")
    assert sorted(path.name for path in (copy / "stage1").iterdir()) == ["checkpoints", "log.jsonl", "model"]


# What is refused


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        ("stage1", ("--lora_rank", 0), "lora_rank must be at least 1, got 0"),
        ("stage2", ("--lora_rank", -3), "lora_rank must be at least 1, got -3"),
        ("stage1", ("--lora_alpha", 0), r"lora_alpha must be positive, got 0\.0"),
        ("stage1", ("--lora_dropout", 1), r"lora_dropout must be in \[0, 1\), got 1\.0"),
        ("stage2", ("--text", "lora", "--learn_temperature", "true"), "learn_temperature does not go with lora"),
    ],
)
def test_bad_values_are_named(finished, stage, words, message):
    with pytest.raises(ValueError, match=message):
        stage_arguments(stage, finished[0], *words)


@pytest.mark.parametrize(("stage", "option"), [("stage1", "encoder"), ("stage2", "vision"), ("stage2", "text")])
def test_without_peft_lora_is_refused_at_once(monkeypatch, stage, option):
    monkeypatch.setitem(sys.modules, "peft", None)
    arguments = STAGES[stage][1]
    assert getattr(arguments(**{option: "full"}), option) == "full"
    with pytest.raises(ImportError, match=r"LoRA needs peft .*pip install modeling-villa\[train\]"):
        arguments(**{option: "lora"})


def test_a_part_without_layers_to_adapt_is_named():
    model = VillaClipModel(VillaClipConfig(**VLM))
    with pytest.raises(ValueError, match=r"vision_model\.projector \(Identity\) has no layer that LoRA can adapt"):
        lora.add_adapter(model, ["vision_model.projector"], [], lora.LoraArguments())


def test_layers_that_could_not_be_merged_are_left_alone():
    class Standardised(nn.Conv2d):
        pass

    model = nn.Module()
    model.part = nn.ModuleDict(
        {
            "plain": nn.Conv2d(4, 4, 3),
            "strided": nn.Conv2d(4, 4, 3, stride=2, padding=1),
            "linear": nn.Linear(4, 4),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "dilated": nn.Conv2d(4, 4, 3, dilation=2),
            "mirrored": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "standardised": Standardised(4, 4, 3),
            "norm": nn.LayerNorm(4),
        }
    )
    model.part["attention"] = nn.Module()
    model.part["attention"].qkv, model.part["attention"].proj = nn.Linear(4, 12, bias=False), nn.Linear(4, 4)
    always = ["part.plain", "part.strided", "part.linear"]
    assert lora.layers_to_adapt(model, "part") == [*always, "part.attention.qkv", "part.attention.proj"]
    model.part["attention"].q_bias = nn.Parameter(torch.zeros(4))
    assert lora.layers_to_adapt(model, "part") == [*always, "part.attention.proj"]


def test_the_adapter_lists_every_layer_by_its_whole_name():
    model = VillaClipModel(VillaClipConfig(**VLM))
    names = [*lora.layers_to_adapt(model, "vision_model.backbone"), *lora.layers_to_adapt(model, "text_model")]
    lora.add_adapter(model, ["vision_model.backbone", "text_model"], [], lora.LoraArguments())
    wrapped = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert wrapped == set(names) == model.peft_config["default"].target_modules and len(names) == 27


def test_what_is_trained_is_said_once(caplog):
    model = VillaClipModel(VillaClipConfig(**VLM))
    whole = model.num_parameters()
    with caplog.at_level(logging.INFO, logger="lora"):
        lora.add_adapter(model, ["text_model"], [], lora.LoraArguments(lora_rank=2))
    # Per layer of width 32: q, k, v, out (32 + 32), fc1, fc2 (32 + 64); two layers and the projection (32 + 32).
    trained = 2 * (2 * (4 * 64 + 2 * 96) + 64)
    expected = f"LoRA of rank 2 in 13 layers of a model of {whole:,} parameters: {trained:,} are trained"
    assert [record.getMessage().split(", their")[0] for record in caplog.records] == [expected]
