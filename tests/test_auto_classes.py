"""Auto classes: every kind of backbone comes back bit-equal, in every way that transformers loads a model."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from tiny_models import SPECIAL, TEXT, VISION, make_tokenizer, shake
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer
from transformers.integrations.accelerate import infer_auto_device_map

from modeling_villa import (
    VillaClipConfig,
    VillaClipModel,
    VillaImageProcessor,
    VillaMappingConfig,
    VillaMappingModel,
    VillaProcessor,
    VillaVisionModel,
)

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
# Windows smaller than the map and two blocks in a stage: the second one has shifted windows and their mask.
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 1, 1], "num_heads": [1, 2, 2], "window_size": 4}
BACKBONES = {
    # timm's name, its arguments, what it computes for itself and no checkpoint holds
    "resnet": ("resnet18", VISION["backbone_kwargs"], set()),
    "convnext": ("convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, set()),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, {"relative_position_index", "attn_mask"}),
    "rope vit": ("vit_base_patch16_rope_reg1_gap_256", VIT, {"bands", "pos_embed", "k_bias"}),
}
MORE_BACKBONES = {
    "swin v2": (
        "swinv2_tiny_window8_256",
        SWIN,
        {"relative_coords_table", "relative_position_index", "attn_mask", "k_bias"},
    ),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", VIT, {"t_x", "t_y"}),
    "dinov3": ("vit_small_patch16_dinov3", {**VIT, "dynamic_img_size": False}, {"periods", "pos_embed_cached"}),
    "any size": ("vit_base_patch16_rope_reg1_gap_256", {**VIT, "dynamic_img_size": True}, {"bands", "k_bias"}),
}
MODELS = {"clip": VillaClipModel, "mapping": VillaMappingModel}


@pytest.fixture(autouse=True)
def seeded():
    """Memory that nobody fills holds NaN, not by chance what was there before."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def build_config(kind, backbone, **vision):
    name, kwargs, _ = {**BACKBONES, **MORE_BACKBONES}[backbone]
    settings = {**VISION, "backbone": name, "backbone_kwargs": kwargs, **vision}
    config = VillaClipConfig(vision_config=settings, text_config=TEXT, temperature=0.3)
    if kind == "clip":
        return config
    return VillaMappingConfig(vlm_config=config, attributes=["red", "blue", "round"], num_heads=2)


def build(kind, backbone, **vision):
    """A model none of whose weights is as it was initialised, nor a special number in half precision."""
    model = shake(MODELS[kind](build_config(kind, backbone, **vision)))
    if kind == "mapping":
        model.set_attribute_embeds(model.config.attributes, torch.randn(3, 32))
    return model


def tower(model):
    return model.vision_model if isinstance(model, VillaClipModel) else model.vlm.vision_model


@torch.no_grad()
def outputs(model):
    """Regions, images and texts, and all that the model itself returns."""
    seed = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 32, 32, generator=seed).to(model.dtype)
    boxes = torch.tensor([[[0.0, 0, 16, 16], [8, 4, 32, 32]], [[3, 5, 30, 20], [0, 0, 32, 32]]])
    ids = torch.tensor([[0, 7, 8, 9, 3], [0, 5, 3, 1, 1]])
    texts = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    clip = model if isinstance(model, VillaClipModel) else model.vlm
    result = {
        "images": clip.get_image_features(pixels),
        "regions": clip.get_region_features(pixels, boxes),
        "texts": clip.get_text_features(**texts),
    }
    if clip is model:
        return {**result, **model(**texts, pixel_values=pixels, boxes=boxes, return_loss=True)}
    labels = torch.tensor([[True, False, False], [False, True, True]])
    return {**result, **model(pixel_values=pixels, boxes=boxes, labels=labels)}


def tensors(model):
    """Every parameter and every buffer, those that no checkpoint holds included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not found[name].is_meta, name
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same(found, expected):
    assert type(found) is type(expected)
    assert_same_tensors(tensors(found), tensors(expected))
    assert_same_tensors(outputs(found.eval()), outputs(expected))


# Saving and loading


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_reloaded_model_is_bit_equal(tmp_path, backbone, kind):
    model = build(kind, backbone)
    computed = {name.split(".")[-1] for name, _ in tower(model).named_non_persistent_buffers()}
    assert computed == BACKBONES[backbone][2]
    model.save_pretrained(tmp_path)
    assert_same(AutoModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("backbone", MORE_BACKBONES)
def test_tables_that_no_checkpoint_holds_come_back(tmp_path, backbone):
    model = build("clip", backbone)
    computed = {name.split(".")[-1] for name, _ in tower(model).named_non_persistent_buffers()}
    assert computed == MORE_BACKBONES[backbone][2]
    model.save_pretrained(tmp_path)
    assert_same(AutoModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("backbone", ["resnet", "swin", "rope vit"])
def test_the_image_tower_alone(tmp_path, backbone):
    model = tower(build("clip", backbone, projector_width=8))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is VillaVisionModel and again.region_head == model.region_head
    assert_same_tensors(tensors(again), tensors(model))
    pixels, boxes = torch.randn(2, 3, 32, 32), torch.tensor([[[0.0, 0, 16, 16]]] * 2)
    with torch.no_grad():
        assert_same_tensors(again(pixels, boxes), model(pixels, boxes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_half_precision(tmp_path, backbone, kind, dtype):
    model = build(kind, backbone)
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert half.dtype == half.config.dtype == dtype
    assert_same(half, copy.deepcopy(model).to(dtype))
    found, expected = outputs(half), outputs(model)
    for name in ("images", "regions", "texts"):
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].float(), expected[name], rtol=0, atol=0.05)
    half.save_pretrained(tmp_path / "half")
    assert_same(AutoModel.from_pretrained(tmp_path / "half"), half)  # as it was saved


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=["cpu", "auto", "named"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backbone", ["resnet", "swin", "rope vit"])
def test_device_map(tmp_path, backbone, kind, device_map):
    model = build(kind, backbone)
    model.save_pretrained(tmp_path)
    assert_same(AutoModel.from_pretrained(tmp_path, device_map=device_map), model)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_device_map_never_divides_the_image_tower(backbone):
    """The region head goes through the backbone's submodules in its own way: they have to stay together."""
    model = build("clip", backbone)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(tower(model)).values())
    room, whole = {"cpu": size - 1, "disk": 2**30}, model._no_split_modules
    maps = [infer_auto_device_map(model, max_memory=room, no_split_module_classes=c) for c in ([], whole)]
    assert [any(name.startswith("vision_model.") for name in found) for found in maps] == [True, False]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_meta_device(tmp_path, backbone, kind):
    """A model is described without memory, and from_pretrained, which builds it so, leaves nothing behind there."""
    model = build(kind, backbone)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        described = MODELS[kind](AutoConfig.from_pretrained(tmp_path))
    assert all(tensor.is_meta for tensor in tensors(described).values())
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors(described).items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in tensors(model).items()}
    again = MODELS[kind].from_pretrained(None, config=described.config, state_dict=model.state_dict())
    assert_same(again, model)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_sharded_safetensors(tmp_path, backbone, kind):
    model = build(kind, backbone)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == files
    assert_same(AutoModel.from_pretrained(tmp_path), model)


# The folder of a model with its processor


@pytest.mark.parametrize("kind", MODELS)
def test_everything_from_one_folder(tmp_path, kind):
    tokenizer = make_tokenizer([*SPECIAL, "a", "red", "thing"], 5, eos_token="<end>", unk_token="<unk>")
    processor = VillaProcessor(VillaImageProcessor(size={"height": 32, "width": 24}), tokenizer)
    model = build(kind, "swin", backbone_kwargs={**SWIN, "img_size": [32, 24]})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    config, again = AutoConfig.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(config) is type(model.config) and type(again) is VillaProcessor
    assert {**config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VillaImageProcessor
    sentence = "a red red red thing"
    assert AutoTokenizer.from_pretrained(tmp_path)(sentence)["input_ids"] == tokenizer(sentence)["input_ids"]

    image = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    inputs = {"images": [image], "text": [sentence], "boxes": [[[0, 0, 20, 10], [10, 5, 40, 20]]]}
    expected, found = processor(**inputs), again(**inputs)
    assert_same_tensors(found, expected)
    assert found["pixel_values"].shape[-2:] == (32, 24) and found["input_ids"].tolist() == [[0, 4, 5, 5, 3]]
    with torch.no_grad():
        before, after = model(**expected), AutoModel.from_pretrained(tmp_path).eval()(**found)
    assert_same_tensors(after, before)
    assert (after.region_embeds[0, 0] - after.region_embeds[0, 1]).abs().max() > 0


# Weights that are there already


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pretrained_weights_of_timm_survive_construction(tmp_path, monkeypatch, backbone):
    """timm loads its weights as it loads those of the Hub; around it, nothing may touch them."""
    name, kwargs, _ = BACKBONES[backbone]
    state = tower(build("clip", backbone)).backbone.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    create, source = timm.create_model, {"file": str(tmp_path / "weights.pth"), "num_classes": 32}

    def create_pretrained(name, pretrained, **kwargs):
        return create(name, pretrained=True, pretrained_cfg_overlay=source, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_pretrained)
    plain = create(name, num_classes=32, **kwargs).state_dict()
    assert not all(torch.equal(plain[key], tensor) for key, tensor in state.items())
    for built in (
        VillaVisionModel(build_config("clip", backbone, projector_width=8).vision_config),
        VillaClipModel(build_config("clip", backbone)).vision_model,
        VillaMappingModel(build_config("mapping", backbone)).vlm.vision_model,
    ):
        assert_same_tensors(built.backbone.state_dict(), state)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_checkpoint_without_the_projector_leaves_the_rest_as_saved(tmp_path, backbone, kind):
    model = build(kind, backbone)
    model.save_pretrained(tmp_path)
    config = build_config(kind, backbone, projector_width=8)
    again, info = AutoModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    saved = tensors(model)
    fresh = {name: tensor for name, tensor in tensors(again).items() if name not in saved}
    assert {name.split(".projector.")[1] for name in fresh} == {
        f"{i}.{part}" for i in (0, 1, 3) for part in ("weight", "bias")
    }
    assert set(info["missing_keys"]) == set(fresh)
    assert_same_tensors({name: tensor for name, tensor in tensors(again).items() if name in saved}, saved)
    for name, tensor in fresh.items():
        if name.endswith((".1.weight", ".3.weight")):
            assert tensor.std().item() == pytest.approx(tensor.shape[1] ** -0.5, rel=0.3), name
        else:
            assert (tensor == float(name.endswith("0.weight"))).all(), name


@pytest.mark.parametrize("backbone", [*BACKBONES, "swin v2"])
def test_weights_of_the_backbone_that_do_not_fit_are_made_anew(tmp_path, backbone):
    model = build("clip", backbone)
    model.save_pretrained(tmp_path)
    config = build_config("clip", backbone, projection_dim=24)
    config.text_config.projection_dim = 24
    again, info = AutoModel.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    misfits = {name for name, *_ in info["mismatched_keys"]}
    assert len(misfits) == 3 and sum("backbone" in name for name in misfits) == 2
    saved = tensors(model)
    for name, tensor in tensors(again).items():
        if name not in misfits:
            assert torch.equal(tensor, saved[name]), name
        elif "backbone" in name:
            assert (tensor == 0).all() if name.endswith("bias") else 0.01 < tensor.std() < 0.04, name


def test_position_embeddings_for_another_size_are_made_anew(tmp_path):
    kwargs = {**VIT, "use_abs_pos_emb": True}
    model = build("clip", "rope vit", backbone_kwargs=kwargs)
    model.save_pretrained(tmp_path)
    config = build_config("clip", "rope vit", backbone_kwargs={**kwargs, "img_size": 64})
    again = AutoModel.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    assert 0.01 < again.vision_model.backbone.pos_embed.std() < 0.04
    same = VillaClipModel(config).vision_model.backbone.rope
    assert torch.equal(again.vision_model.backbone.rope.pos_embed, same.pos_embed)


def test_buffers_that_cannot_be_filled_in_are_refused(monkeypatch):
    """As with a timm that is too old: nothing would be said, and the tables would hold whatever was in memory."""
    monkeypatch.delattr("timm.models.swin_transformer.WindowAttention.init_non_persistent_buffers")
    with pytest.raises(
        ValueError, match=r"WindowAttention has buffers that no checkpoint holds.* install a newer timm"
    ):
        build("clip", "swin")
