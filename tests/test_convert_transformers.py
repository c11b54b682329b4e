"""A CLIPModel of transformers, randomly initialised, converted: the same features, logits and token ids."""

import json
import logging
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from tower_folders import TEXTS, clip_folder, encoder_folder
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPConfig, CLIPModel

from modeling_villa import VillaClipModel
from modeling_villa.convert_open_clip import build_config as open_clip_config
from modeling_villa.convert_transformers import Arguments, build_config, convert, convert_state_dict, main


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("legacy", [True, False], ids=["placeholder ids", "own ids"])
def test_features_logits_and_tokens_are_the_same(tmp_path, monkeypatch, legacy, activation):
    original = clip_folder(tmp_path / "clip", legacy, activation)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["x", "--checkpoint", str(tmp_path / "clip"), "--output", str(tmp_path / "villa")])
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    main()
    assert {path.name for path in tmp_path.iterdir()} == {"clip", "villa"}
    model, processor = (
        AutoModel.from_pretrained(tmp_path / "villa").eval(),
        AutoProcessor.from_pretrained(tmp_path / "villa"),
    )
    assert type(model) is VillaClipModel
    assert str(tmp_path) not in (tmp_path / "villa" / "config.json").read_text()  # no folder of this machine
    tokens, pixels = processor(text=TEXTS), torch.randn(2, 3, 32, 32)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "clip")(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(tokens["input_ids"], theirs["input_ids"])
    expected, found = original(**tokens, pixel_values=pixels), model(**tokens, pixel_values=pixels)
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0)
    torch.testing.assert_close(normalize(found.image_embeds, dim=-1), expected.image_embeds, atol=1e-5, rtol=0)
    assert expected.logits_per_image.std() > 1e-3
    whole = model.get_region_features(pixels, torch.tensor([[[0.0, 0, 32, 32]]] * 2))[:, 0]
    torch.testing.assert_close(whole, expected.image_embeds, atol=1e-4, rtol=0)
    found = processor.image_processor
    assert [list(found.image_mean), list(found.image_std)] == list(settings.values())
    text = model.config.text_config
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id, text.hidden_act) == (38, 39, 39, activation)
    assert ("quickgelu" in model.config.vision_config.backbone) is (activation == "quick_gelu")


@pytest.mark.parametrize(
    ("name", "vision", "text"),
    [
        ("ViT-B-32", {}, {}),
        ("ViT-B-16", {"patch_size": 16}, {}),
        (
            "ViT-L-14",
            {
                "patch_size": 14,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
            },
            {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        ),
    ],
)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_real_sizes_by_names_and_shapes(name, vision, text, activation):
    """OpenAI's three, without memory: the same model as from open_clip, and every tensor finds its place."""
    dim = 768 if name == "ViT-L-14" else 512
    vision, text = ({**given, "hidden_act": activation, "projection_dim": dim} for given in (vision, text))
    source = CLIPConfig(vision_config=vision, text_config=text, projection_dim=dim)
    config, expected = build_config(source), open_clip_config(name, activation)
    assert config.vision_config.to_dict() == expected.vision_config.to_dict()
    for key in ("hidden_size", "num_attention_heads", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config.text_config, key) == getattr(expected.text_config, key)
    with torch.device("meta"):
        model, state = VillaClipModel(config), CLIPModel(source).state_dict()
    assert convert_state_dict(state, model).keys() == model.state_dict().keys()


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    clip_folder(tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    state = load_file(path)
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"], state["text_model.final_layer_norm.weight"]
    state["vision_model.extra"], state["text_model.encoder.extra"] = torch.zeros(1), torch.zeros(1)
    state["vision_model.embeddings.position_embedding.weight"] = torch.zeros(17, 48)
    state["text_model.embeddings.position_ids"] = torch.arange(20)[None]  # of older files: no complaint
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        convert(Arguments(checkpoint=str(tmp_path / "clip"), output=str(tmp_path / "villa")))
    message = str(error.value)
    for part in (
        "missing: vision_model.backbone.blocks.1.attn.qkv.bias, text_model.text_model.final_layer_norm.weight;",
        "left over: ",
        "vision_model.extra",
        "text_model.encoder.extra",
        "vision_model.encoder.layers.1.self_attn.q_proj.bias",
        "of another shape: vision_model.backbone.pos_embed (1, 17, 48) instead of (1, 5, 48)",
    ):
        assert part in message
    assert "position_ids" not in message and not (tmp_path / "villa").exists()


def test_what_cannot_be_converted(tmp_path):
    output = str(tmp_path / "villa")
    with pytest.raises(ValueError, match="checkpoint: org/nothing must be a folder, or a Hub id that can be reached"):
        convert(Arguments(checkpoint="org/nothing", output=output))
    encoder_folder(tmp_path / "bert", "bert")
    with pytest.raises(ValueError, match="is a 'bert', expected a CLIPModel"):
        convert(Arguments(checkpoint=str(tmp_path / "bert"), output=output))
    with pytest.raises(ValueError, match="exists already"):
        convert(Arguments(checkpoint="org/nothing", output=str(tmp_path)))
    clip_folder(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has none of model.safetensors, pytorch_model.bin"):
        convert(Arguments(checkpoint=str(tmp_path / "clip"), output=output))
    for field, value, message in (
        ("patch_size", 12, "patch_size is 12; known are 32, 16, 14"),
        ("image_size", 230, "image_size is 230, which is no multiple of the patch size 32"),
        ("layer_norm_eps", 1e-6, "layer_norm_eps is 1e-06, expected 1e-05"),
        ("hidden_act", "relu", "hidden_act is relu, expected quick_gelu or gelu"),
    ):
        with pytest.raises(ValueError, match=f"vision_config.{message}"):
            build_config(CLIPConfig(vision_config={field: value}))


def test_a_tokenizer_that_is_not_the_towers(tmp_path):
    clip_folder(tmp_path / "clip")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "clip")
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="tokenizer is not the text tower's: 41 tokens where the tower has 40"):
        convert(Arguments(checkpoint=str(tmp_path / "clip"), output=str(tmp_path / "villa")))


def test_known_quickgelu_weights_with_gelu_are_warned_of(tmp_path, caplog):
    folder = tmp_path / "vit_base_patch16_clip_224.openai"
    clip_folder(folder, activation="gelu")
    convert(Arguments(checkpoint=str(folder), output=str(tmp_path / "villa")))
    assert "patch16_clip_224.openai was trained with QuickGELU, and the model has GELU" in caplog.text
