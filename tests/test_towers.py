"""VillaClipModel.from_towers: towers from folders, their outputs, new projections, processors, and what is refused."""

import json
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from tiny_models import TEXT, VISION, VLM
from torch.nn.functional import normalize
from tower_folders import ENCODER, TEXTS, VIT, clip_folder, encoder_folder, timm_folder, tokenizer
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPTextModelWithProjection,
    T5Config,
    ViTConfig,
)

from modeling_villa import VillaClipConfig, VillaClipModel, VillaImageProcessor, VillaProcessor, VillaTextModel
from modeling_villa.convert_towers import Arguments, convert, main
from modeling_villa.processing_villa import check_tokenizer
from modeling_villa.towers_villa import load_text_tower, warn_of_activation

RESNET = VISION["backbone_kwargs"]
CLIP_VIT = "vit_base_patch32_clip_quickgelu_224"


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """No network, and transformers' warnings where caplog sees them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("towers")
    made = {
        "vit24": timm_folder(root / "vit24", CLIP_VIT, 24, VIT),
        "resnet10": timm_folder(root / "resnet10", "resnet18", 10, RESNET),
        "clip": clip_folder(root / "clip"),
        "bert": encoder_folder(root / "bert", "bert"),
        "sbert": encoder_folder(root / "sbert", "mpnet", "mean_tokens"),
    }
    return root, made


def text_inputs(folder):
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def test_towers_that_agree_in_width_are_the_originals(towers, caplog):
    root, made = towers
    model = VillaClipModel.from_towers(str(root / "vit24"), str(root / "clip")).eval()
    pixels, texts = torch.randn(2, 3, 32, 32), text_inputs(root / "clip")
    torch.testing.assert_close(model.vision_model(pixels).image_embeds, made["vit24"](pixels))
    original = CLIPTextModelWithProjection.from_pretrained(root / "clip").eval()(**texts).text_embeds
    torch.testing.assert_close(model.text_model(**texts).text_embeds, original)
    logits = normalize(made["vit24"](pixels), dim=-1) @ normalize(original, dim=-1).T / 0.07
    torch.testing.assert_close(model(**texts, pixel_values=pixels).logits_per_image, logits, atol=1e-4, rtol=0)
    assert "so new:" not in caplog.text
    vision = model.config.vision_config
    assert (vision.backbone, vision.image_size) == (CLIP_VIT, 32)
    assert (vision.region_head, vision.roi_size) == ("attention", 4)  # a class token, 4 x 4 patches
    regions = model.get_region_features(pixels, torch.tensor([[[0.0, 0, 32, 32]]] * 2))
    torch.testing.assert_close(regions[:, 0], model.get_image_features(pixels), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_sentence_bert_stays_one_and_a_classifier_gets_a_projection(towers, caplog):
    root, made = towers
    model = VillaClipModel.from_towers(str(root / "resnet10"), str(root / "sbert"), roi_size=3).eval()
    assert type(model.text_model) is VillaTextModel and model.config.projection_dim == 32
    assert model.config.vision_config.roi_size == 3 and model.vision_model.region_head == "stages"
    assert "not 32 wide, so new: fc.weight, fc.bias" in caplog.text
    texts = text_inputs(root / "sbert")
    states, mask = made["sbert"](**texts).last_hidden_state, texts["attention_mask"]
    expected = torch.stack([states[i, : int(mask[i].sum())].mean(0) for i in range(len(TEXTS))])
    torch.testing.assert_close(model.get_text_features(**texts), normalize(expected, dim=-1))
    pixels = torch.randn(2, 3, 64, 64)
    before = made["resnet10"].forward_head(made["resnet10"].forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(model.vision_model(pixels).image_embeds, model.vision_model.backbone.fc(before))


@torch.no_grad()
@pytest.mark.parametrize("text", ["clip", "bert"])
def test_a_width_of_ones_own(towers, caplog, text):
    root, made = towers
    model = VillaClipModel.from_towers(str(root / "vit24"), str(root / text), projection_dim=16).eval()
    assert model.config.projection_dim == 16
    new = {"clip": "text_projection.weight", "bert": "projection.weight, projection.bias"}[text]
    assert f"so new: head.weight, head.bias, {new}" in caplog.text
    pixels, texts = torch.randn(2, 3, 32, 32), text_inputs(root / text)
    before = made["vit24"].forward_head(made["vit24"].forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(model.vision_model(pixels).image_embeds, model.vision_model.backbone.head(before))
    assert model.text_model(**texts).text_embeds.shape == (3, 16)


@torch.no_grad()
def test_another_image_size(towers):
    root, _ = towers
    model = VillaClipModel.from_towers(str(root / "vit24"), str(root / "clip"), image_size=48).eval()
    assert model.config.vision_config.image_size == model.config.vision_config.backbone_kwargs["img_size"] == 48
    expected = timm.create_model(f"local-dir:{root / 'vit24'}", pretrained=True, img_size=48).eval()
    pixels = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(model.vision_model(pixels).image_embeds, expected(pixels))
    with pytest.raises(ValueError, match="50 x 50 pixels, VisionTransformer takes multiples of 8 x 8"):
        VillaClipModel.from_towers(str(root / "vit24"), str(root / "clip"), image_size=50)
    resnet = VillaClipModel.from_towers(str(root / "resnet10"), str(root / "clip"), image_size=50)
    assert (
        resnet.config.vision_config.image_size == 50 and "img_size" not in resnet.config.vision_config.backbone_kwargs
    )


@torch.no_grad()
def test_processor_and_command_line(towers, tmp_path, monkeypatch):
    root, made = towers
    words = ["--vision", root / "vit24", "--text", root / "bert", "--output", tmp_path / "mixed", "--image_size", "24"]
    monkeypatch.setattr(sys, "argv", ["convert_towers", *map(str, words)])
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    main()
    model, processor = (
        AutoModel.from_pretrained(tmp_path / "mixed").eval(),
        AutoProcessor.from_pretrained(tmp_path / "mixed"),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]
    source, settings = made["vit24"].pretrained_cfg, processor.image_processor
    assert tuple(settings.image_mean) == tuple(source["mean"]) and tuple(settings.image_std) == tuple(source["std"])
    assert settings.size == {"height": 24, "width": 24} and int(settings.resample) == 3  # bicubic
    assert processor.tokenizer.model_max_length == 20  # the positions of BERT
    assert set(processor.tokenizer("red")) == {"input_ids", "attention_mask"}  # what the model takes
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    inputs = processor(images=[image], text=["red " * 50, "blue"], boxes=[[[0, 0, 30, 40]]])
    assert inputs["input_ids"].shape == (2, 20) and inputs["pixel_values"].shape == (1, 3, 24, 24)
    assert model(**inputs).logits_per_region.shape == (1, 1, 2)
    assert str(root) not in (tmp_path / "mixed" / "config.json").read_text()  # no folder of this machine
    with pytest.raises(ValueError, match="exists already"):
        convert(Arguments(vision="a", text="b", output=str(tmp_path / "mixed")))


LOAD = """
import sys
sys.modules["modeling_villa"] = None  # as if the package were not installed
import torch
from transformers import AutoModel, AutoProcessor

folder, out = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
torch.manual_seed(0)
with torch.no_grad():
    torch.save(model(**processor(text=["red thing"]), pixel_values=torch.randn(1, 3, 32, 32)).logits_per_image, out)
"""


def test_a_mixed_model_needs_no_package(towers, tmp_path):
    root, _ = towers
    convert(Arguments(vision=str(root / "vit24"), text=str(root / "sbert"), output=str(tmp_path / "mixed")))
    (tmp_path / "load.py").write_text(LOAD)
    command = [sys.executable, "load.py", "mixed", "logits.pt"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    model, processor = (
        AutoModel.from_pretrained(tmp_path / "mixed").eval(),
        AutoProcessor.from_pretrained(tmp_path / "mixed"),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(**processor(text=["red thing"]), pixel_values=torch.randn(1, 3, 32, 32)).logits_per_image
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_positions_after_the_padding_shorten_the_texts(towers):
    root, _ = towers
    assert VillaProcessor.from_towers(str(root / "vit24"), str(root / "sbert")).tokenizer.model_max_length == 18


def test_old_placeholder_ids_of_clip_are_replaced(towers):
    root, made = towers
    assert made["clip"].config.text_config.eos_token_id == 2
    config, _ = load_text_tower(str(root / "clip"))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (38, 39, 39)
    check_tokenizer(AutoTokenizer.from_pretrained(root / "clip"), config)


# What is refused


def test_towers_that_are_not_there(towers, tmp_path):
    root, _ = towers
    for vision in ("org/nothing", "no_such_model", str(root / "clip")):
        with pytest.raises(ValueError, match=f"vision: {vision} cannot be loaded: it must be a folder with timm's"):
            VillaClipModel.from_towers(vision, str(root / "bert"))
    for text in ("org/nothing", str(tmp_path)):
        with pytest.raises(ValueError, match=f"text: {text} cannot be loaded"):
            VillaClipModel.from_towers(str(root / "vit24"), text)
    (tmp_path / "config.json").write_text((root / "bert" / "config.json").read_text())
    with pytest.raises(ValueError, match="text: no tokenizer can be loaded from"):
        VillaProcessor.from_towers(str(root / "vit24"), str(tmp_path))


def test_towers_of_another_kind(tmp_path):
    for config in (ViTConfig(), T5Config()):
        config.save_pretrained(tmp_path / config.model_type)
        with pytest.raises(ValueError, match=f"is a {config.model_type}, which is no text encoder"):
            load_text_tower(str(tmp_path / config.model_type))
    encoder_folder(tmp_path / "max", "bert", pooling="max_tokens")
    with pytest.raises(ValueError, match=r"pools by \['pooling_mode_max_tokens'\]; only mean pooling"):
        load_text_tower(str(tmp_path / "max"))
    encoder_folder(tmp_path / "dense", "bert", "mean_tokens", ("Transformer", "Pooling", "Dense"))
    with pytest.raises(ValueError, match=r"has modules \['Dense'\] behind its encoder"):
        load_text_tower(str(tmp_path / "dense"))


def test_towers_that_are_not_whole(towers, tmp_path):
    root, made = towers
    state = made["bert"].state_dict()
    del state["encoder.layer.0.output.dense.bias"], state["embeddings.LayerNorm.weight"], state["pooler.dense.bias"]
    model = BertModel(BertConfig(**ENCODER))
    model.save_pretrained(tmp_path / "bert", state_dict=state)
    with pytest.raises(ValueError) as error:
        load_text_tower(str(tmp_path / "bert"))
    for name in ("encoder.layer.0.output.dense.bias", "embeddings.LayerNorm.weight"):
        assert name in str(error.value)
    assert "pooler" not in str(error.value)
    shutil.copytree(root / "vit24", tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    config["model_args"]["depth"] = 3
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"(?s)vision: .* cannot be loaded.*blocks.2.mlp.fc2.bias"):
        VillaClipModel.from_towers(str(tmp_path / "vit"), str(root / "bert"))


def test_tokenizers_that_are_not_the_towers():
    config = VillaClipConfig(**VLM).text_config  # start 0, padding 1, end 3, 40 tokens
    check_tokenizer(tokenizer(0, 1, 3, bos_token="<start>", eos_token="<end>"), config)
    check_tokenizer(tokenizer(0, 1, 3, size=20), config)  # a smaller vocabulary, padded embeddings
    with pytest.raises(ValueError, match="tokenizer is not the text tower's: 41 tokens where the tower has 40"):
        check_tokenizer(tokenizer(0, 1, 3, size=41), config)
    with pytest.raises(ValueError, match="eos_token_id 4 where the tower has 3, pad_token_id 2 where the tower has 1"):
        check_tokenizer(tokenizer(0, 2, 4, bos_token="<start>", eos_token="<end>"), config)
    with pytest.raises(ValueError, match="bos_token_id 5 where the tower has 0"):
        check_tokenizer(tokenizer(5, 1, 3, bos_token="<start>", eos_token="<end>"), config)
    text = {"model_type": "villa_text", "encoder_config": {"model_type": "bert", **ENCODER}, "projection_dim": 32}
    config = VillaClipConfig(vision_config=VISION, text_config=text).text_config
    check_tokenizer(tokenizer(3, 0, 2), config)
    with pytest.raises(ValueError, match="pad_token_id 1 where the tower has 0"):
        check_tokenizer(tokenizer(3, 1, 2), config)


def test_a_processor_that_is_not_the_models(towers):
    vision = {**VISION, "backbone": "vit_tiny_patch16_224", "backbone_kwargs": VIT}
    model = VillaClipModel(VillaClipConfig(vision_config=vision, text_config=TEXT))
    good = tokenizer(0, 1, 3)
    model.check_processor(VillaProcessor(VillaImageProcessor(size={"height": 32, "width": 32}), good))
    with pytest.raises(ValueError, match="40 x 32 pixels, VisionTransformer takes 32 x 32"):
        model.check_processor(VillaProcessor(VillaImageProcessor(size={"height": 40, "width": 32}), good))
    with pytest.raises(ValueError, match="tokenizer is not the text tower's"):
        model.check_processor(VillaProcessor(VillaImageProcessor(size={"height": 32, "width": 32}), tokenizer(0, 2, 3)))


@pytest.mark.parametrize(
    ("name", "quick"),
    [
        ("openai/clip-vit-base-patch32", True),
        ("timm/vit_base_patch16_clip_224.openai", True),
        ("downloads/vit_large_patch14_clip_224.openai.safetensors", True),
        ("timm/resnet50_clip.openai", True),
        ("apple/DFN2B-CLIP-ViT-B-16", True),
        ("facebook/metaclip-b32-400m", True),
        ("vit_base_patch32_clip_quickgelu_224.openai", True),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", False),
        ("timm/vit_base_patch16_clip_224.laion400m_e32", False),
        ("timm/vit_base_patch32_clip_224.openai_ft_in1k", False),
        ("model.safetensors", False),
    ],
)
def test_known_quickgelu_weights_in_a_gelu_model(name, quick, caplog):
    warn_of_activation(name, "quick_gelu")
    assert ("trained with GELU, and the model has QuickGELU" in caplog.text) is ("laion2B" in name)
    caplog.clear()
    warn_of_activation(name, "gelu")
    assert bool(caplog.text) is quick
    if quick:
        name = name.removesuffix(".safetensors")
        assert f"{name} was trained with QuickGELU, and the model has GELU" in caplog.text


def test_known_quickgelu_weights_are_open_clips(caplog):
    pretrained = pytest.importorskip("open_clip.pretrained", reason="open_clip_torch is not installed")
    for tags in pretrained._PRETRAINED.values():
        for settings in tags.values():
            if name := settings.get("hf_hub", "").strip("/"):
                caplog.clear()
                warn_of_activation(name, "gelu")
                assert bool(caplog.text) is bool(settings.get("quick_gelu")), name
                caplog.clear()
                warn_of_activation(name, "quick_gelu")
                assert not (caplog.text and settings.get("quick_gelu")), name


def test_a_gelu_backbone_for_quickgelu_weights_is_warned_of(towers, tmp_path, caplog):
    root, _ = towers
    folder = tmp_path / "vit_base_patch32_clip_224.openai"
    timm_folder(folder, "vit_base_patch32_clip_224", 24, VIT)
    VillaClipModel.from_towers(str(folder), str(root / "clip"))
    assert "clip_224.openai was trained with QuickGELU, and the model has GELU" in caplog.text
