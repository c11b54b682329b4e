"""open_clip's RN50, randomly initialised, converted: the same features, logits and token ids."""

import logging
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from modeling_villa import VillaClipModel
from modeling_villa.convert_open_clip import (
    Arguments,
    build_config,
    build_processor,
    convert,
    convert_state_dict,
    load_checkpoint,
    main,
)

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")

STRINGS = [
    "a photo of a cat",
    "A red, SHINY car; it's parked -- 1,234 metres away!",
    "naïve café: 東京 🙂",
    "",
    "many words " * 60,
]


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    model = open_clip.create_model("RN50-quickgelu", pretrained=None).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # nothing may be equal to its initial constant
            if tensor.is_floating_point() and ("bn" in name or "ln" in name or "bias" in name):
                tensor.add_(0.2 * torch.rand_like(tensor))
    return model


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    """The one conversion, by the command line."""
    root = tmp_path_factory.mktemp("convert")
    save_file(original.state_dict(), root / "rn50.safetensors")
    arguments = ["--model", "RN50", "--checkpoint", str(root / "rn50.safetensors"), "--output", str(root / "clip")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert_open_clip", *arguments])
        patch.setattr(logging, "basicConfig", lambda **_: None)
        main()
    assert sorted(path.name for path in root.iterdir()) == ["clip", "rn50.safetensors"]
    return root / "clip"


@torch.no_grad()
def test_features_logits_and_tokens_are_the_same(original, folder):
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert type(model) is VillaClipModel
    ids = open_clip.get_tokenizer("RN50")(STRINGS)
    tokens = processor(text=STRINGS)
    for theirs, ours, mask in zip(ids, tokens["input_ids"], tokens["attention_mask"], strict=True):
        length = int(mask.sum())
        assert ours[:length].tolist() == theirs[:length].tolist() and not theirs[length:].any()

    pixels = torch.randn(2, 3, 224, 224)
    images, texts, scale = original(pixels, ids)
    output = model(**tokens, pixel_values=pixels)
    torch.testing.assert_close(output.image_embeds, images, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.text_embeds, texts, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.logits_per_image, scale * images @ texts.T, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.get_image_features(pixels), images, atol=1e-4, rtol=0)
    assert images.std() > 1e-3 and (texts[0] - texts[1]).abs().max() > 1e-3

    settings = processor.image_processor
    assert tuple(settings.image_mean) == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert tuple(settings.image_std) == pytest.approx(open_clip.OPENAI_DATASET_STD)
    assert (settings.size["height"], settings.size["width"], int(settings.resample)) == (224, 224, 3)
    assert model.config.text_config.hidden_act == "quick_gelu"


def test_tensors_that_do_not_fit_are_all_named(original):
    with torch.device("meta"):
        model = VillaClipModel(build_config("RN50", "quick_gelu"))
    state = original.state_dict()
    del state["visual.conv1.weight"], state["ln_final.bias"]
    state["visual.layer5.weight"] = state["transformer.resblocks.0.extra.bias"] = torch.zeros(1)
    state["token_embedding.weight"] = state["token_embedding.weight"][:100]
    with pytest.raises(ValueError) as error:
        convert_state_dict(state, model)
    message = str(error.value)
    for part in (
        "missing: vision_model.backbone.stem.conv1.conv.weight, text_model.text_model.final_layer_norm.bias;",
        "left over: ",
        "visual.layer5.weight",
        "transformer.resblocks.0.extra.bias",
        "of another shape: text_model.text_model.embeddings.token_embedding.weight (100, 512) instead of (49408, 512)",
    ):
        assert part in message


def test_training_checkpoints_and_bad_files(tmp_path, monkeypatch):
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {"module.logit_scale": torch.ones(())}}, path)
    assert load_checkpoint(str(path)) == {"logit_scale": torch.ones(())}
    torch.save({"state_dict": Arguments("a", "b")}, path)
    with pytest.raises(ValueError, match=r"epoch_1.pt cannot be read as plain tensors .* as .safetensors"):
        load_checkpoint(str(path))
    with pytest.raises(ValueError, match=r"there is no file .*absent.safetensors"):
        load_checkpoint(str(tmp_path / "absent.safetensors"))
    with pytest.raises(ValueError, match=r"neither a local file nor a Hub id with open_clip_model.safetensors"):
        load_checkpoint("not/a/hub/id")
    with pytest.raises(ValueError, match="exists already"):
        convert(Arguments(checkpoint=str(path), output=str(tmp_path)))


def test_without_network(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("modeling_villa.convert_open_clip.hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=r"timm/x is no local file, .* cannot be reached; .* give a local file"):
        load_checkpoint("timm/x")


def test_without_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(ImportError, match=r"pip install 'open_clip_torch>=3,<4'"):
        build_processor()
