"""open_clip's CLIPs, randomly initialised, converted: the same features, logits and token ids."""

import logging
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from modeling_villa import VillaClipModel
from modeling_villa.convert_open_clip import (
    ARCHITECTURES,
    Arguments,
    build_config,
    build_processor,
    convert,
    convert_state_dict,
    load_checkpoint,
    main,
)
from modeling_villa.vision_villa import check_image_size

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
    return shaken(open_clip.create_model("RN50-quickgelu", pretrained=None))


@torch.no_grad()
def shaken(model):
    """Nothing is equal to its initial constant any more."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and ("bn" in name or "ln" in name or "bias" in name):
            tensor.add_(0.2 * torch.rand_like(tensor))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if norms:  # the statistics of some images, or a deep ResNet makes the same of every image
        for norm in norms:
            norm.momentum = 1.0
        size = model.visual.image_size
        model.train().encode_image(torch.randn(2, 3, *((size, size) if isinstance(size, int) else size)))
    return model.eval()


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
    assert (images[0] - images[1]).abs().max() > 1e-3 and (texts[0] - texts[1]).abs().max() > 1e-3

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
    torn, numbers = tmp_path / "torn.safetensors", tmp_path / "numbers.pt"
    torn.write_bytes(b"\x00" * 5)
    torch.save([1, 2], numbers)
    for bad in (torn, numbers):
        with pytest.raises(ValueError, match=rf"{bad.name} cannot be read as plain tensors .* a whole file"):
            load_checkpoint(str(bad))
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


# The other architectures


def small_open_clip(name, activation):
    """open_clip's model under its real name, with thin towers' depth cut: a few layers do what many do."""
    settings = open_clip.get_model_config(name)
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    if isinstance(vision["layers"], int):
        vision["layers"] = 2
    text |= {"layers": 2, "vocab_size": 1000}
    quick = activation == "quick_gelu"
    return shaken(open_clip.CLIP(settings["embed_dim"], vision_cfg=vision, text_cfg=text, quick_gelu=quick))


def small_villa(name, activation):
    """Ours, with the same layers and tokens."""
    config = build_config(name, activation)
    vision, text = config.vision_config, config.text_config
    if vision.backbone.startswith("vit_"):
        vision.backbone_kwargs = {"depth": 2}
    text.num_hidden_layers, text.vocab_size, text.eos_token_id = 2, 1000, 999
    return VillaClipModel(config).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("ViT-B-32", "quick_gelu"),
        ("ViT-B-32", "gelu"),
        ("ViT-B-16", "gelu"),
        pytest.param("ViT-L-14", "quick_gelu", marks=pytest.mark.slow),
        pytest.param("RN101", "quick_gelu", marks=pytest.mark.slow),
        pytest.param("RN50x4", "quick_gelu", marks=pytest.mark.slow),
    ],
)
def test_other_architectures(name, activation):
    original, model = small_open_clip(name, activation), small_villa(name, activation)
    model.load_state_dict(convert_state_dict(original.state_dict(), model))
    size = model.config.vision_config.image_size
    pixels, ids = torch.randn(2, 3, size, size), torch.tensor([[998, 5, 999, 0], [998, 7, 8, 999]])
    ids = torch.nn.functional.pad(ids, (0, 73))
    images, texts, scale = original(pixels, ids)
    output = model(ids, (ids > 0).long(), pixels)
    torch.testing.assert_close(output.image_embeds, images, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.text_embeds, texts, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.logits_per_image, scale * images @ texts.T, atol=1e-4, rtol=0)
    assert (texts[0] - texts[1]).abs().max() > 1e-3 and (images[0] - images[1]).abs().max() > 1e-3
    # The box of the whole image is the image, where the head takes as many cells as the map has.
    regions = model.get_region_features(pixels, torch.tensor([[[0.0, 0, size, size]]] * 2))
    torch.testing.assert_close(regions[:, 0], images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_sizes_by_names_and_shapes(name):
    """Without memory: every tensor of open_clip's model finds its place."""
    with torch.device("meta"):
        original = open_clip.CLIP(**open_clip.get_model_config(name))
        model = VillaClipModel(build_config(name, "gelu"))
    converted = convert_state_dict(original.state_dict(), model)
    assert converted.keys() == model.state_dict().keys()
    check_image_size(model.vision_model.backbone, *[ARCHITECTURES[name].image_size] * 2)
    assert ("quickgelu" in build_config(name, "quick_gelu").vision_config.backbone) is name.startswith("ViT")


def test_tensors_of_a_vit_that_do_not_fit_are_all_named():
    with torch.device("meta"):
        settings = open_clip.get_model_config("ViT-B-32")
        state = open_clip.CLIP(**settings).state_dict()
        model = VillaClipModel(build_config("ViT-B-32", "gelu"))
    del state["visual.class_embedding"], state["visual.transformer.resblocks.3.mlp.c_fc.bias"]
    state["visual.positional_embedding"] = torch.empty(65, 768, device="meta")  # of 256 pixels: not to be resampled
    state["visual.transformer.resblocks.12.ln_1.bias"] = state["visual.extra"] = torch.empty(1)
    with pytest.raises(ValueError) as error:
        convert_state_dict(state, model)
    for part in (
        "missing: vision_model.backbone.cls_token, vision_model.backbone.blocks.3.mlp.fc1.bias;",
        "left over: vision_model.backbone.blocks.12.norm1.bias, vision_model.backbone.visual.extra;",
        "of another shape: vision_model.backbone.pos_embed (1, 65, 768) instead of (1, 50, 768)",
    ):
        assert part in str(error.value)
