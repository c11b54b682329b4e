"""The image tower: the backbone cut in two and put together again, RoIAlign in between, padding and errors."""

import pytest
import timm
import torch
from vision_helpers import BACKBONES, run, shake_batchnorm, tiny

from modeling_villa import VillaVisionConfig, VillaVisionModel
from modeling_villa.vision_villa import split_backbone

pytestmark = pytest.mark.usefixtures("seeded")


@torch.no_grad()
@pytest.mark.parametrize(("name", "kwargs"), BACKBONES, ids=[name for name, _ in BACKBONES])
def test_trunk_and_head_are_the_backbone(name, kwargs):
    backbone = timm.create_model(name, num_classes=5, **kwargs).eval()
    shake_batchnorm(backbone)
    size = 224 if name == "resnet50_clip" else 64
    pixels = torch.randn(1, 3, size, size)
    expected = backbone(pixels)
    for stage in range(len(backbone.feature_info) - 1):
        trunk, head, stride = split_backbone(backbone, stage)
        assert split_backbone(backbone, stage - len(backbone.feature_info)) == (trunk, head, stride)
        feature_map = run(backbone, trunk, pixels)
        assert feature_map.shape[-1] == size // stride
        assert torch.equal(backbone.forward_head(run(backbone, head, feature_map)), expected)


@torch.no_grad()
@pytest.mark.slow
def test_clip_resnet50_in_full():
    model = VillaVisionModel(VillaVisionConfig()).eval()
    pixels = torch.randn(1, 3, 224, 224)
    assert (model.stride, model.get_feature_map(pixels).shape) == (16, (1, 1024, 14, 14))
    output = model(pixels, torch.tensor([[[0.0, 0.0, 224.0, 224.0]]]))
    assert torch.equal(output.image_embeds, model.backbone(pixels))
    # The box that is the whole image is cut to exactly the whole map.
    torch.testing.assert_close(output.region_embeds[:, 0], output.image_embeds)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "hrnet_w18_small"])
def test_other_backbones_are_refused(name):
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=5)
    with pytest.raises(ValueError, match=rf"{type(backbone).__name__} is not a stage-wise .* such as resnet50_clip"):
        split_backbone(backbone, -2)


@pytest.mark.parametrize("stage", [-1, 4, 5, -6])
def test_cut_must_be_before_the_last_stage(stage):
    with pytest.raises(ValueError, match=f"region_stage must be a stage before the last of 5, got {stage}"):
        tiny(region_stage=stage)


@torch.no_grad()
def test_regions_are_crops_of_the_map_where_cells_and_boxes_agree():
    """Stride 2, 56 x 56 pixels: 28 x 28 cells. RoIAlign 14 x 14 of a 28-pixel box at even pixels is a crop."""
    model = tiny(region_stage=0, roi_size=14, image_size=56)
    shake_batchnorm(model)
    pixels = torch.randn(2, 3, 56, 56)
    corners = [[(0, 0), (14, 6)], [(28, 28), (2, 20)]]
    boxes = torch.tensor([[(x, y, x + 28, y + 28) for x, y in image] for image in corners]).float()
    feature_map = model.get_feature_map(pixels)
    assert feature_map.shape[-2:] == (28, 28)
    _, head, _ = split_backbone(model.backbone, 0)
    found = model(pixels, boxes).region_embeds
    for i, image in enumerate(corners):
        for r, (x, y) in enumerate(image):
            crop = feature_map[i : i + 1, :, y // 2 : y // 2 + 14, x // 2 : x // 2 + 14]
            expected = model.backbone.forward_head(run(model.backbone, head, crop))[0]
            torch.testing.assert_close(found[i, r], expected)


@torch.no_grad()
def test_a_crop_is_embedded_as_an_image_of_its_own():
    """Where a box is half as wide and high, RoIAlign at stride 1 is bilinear interpolation to twice its size."""
    model = tiny(region_source="crop")
    shake_batchnorm(model)
    pixels = torch.randn(2, 3, 64, 64)
    boxes = torch.tensor([[[0, 0, 64, 64], [16, 8, 48, 40]], [[0, 32, 32, 64], [0] * 4]]).float()
    mask = torch.tensor([[True, True], [True, False]])
    found = model(pixels, boxes, mask)
    torch.testing.assert_close(found.region_embeds[0, 0], found.image_embeds[0])
    assert (found.region_embeds[1, 1] == 0).all()
    crop = torch.nn.functional.interpolate(pixels[:1, :, 8:40, 16:48], scale_factor=2, mode="bilinear")
    # The outermost pixels see beyond the box, which interpolation of the cut piece can't.
    seen = []
    model.get_feature_map = lambda crops: seen.append(crops) or type(model).get_feature_map(model, crops)
    alone = model(pixels, boxes, mask, embed_images=False)
    assert alone.image_embeds is None and len(seen) == 1 and seen[0].shape == (3, 3, 64, 64)
    torch.testing.assert_close(seen[0][1, :, 1:-1, 1:-1], crop[0, :, 1:-1, 1:-1])
    torch.testing.assert_close(alone.region_embeds, found.region_embeds)
    none = model(pixels, boxes, torch.zeros_like(mask)).region_embeds
    assert none.shape == (2, 2, 12) and (none == 0).all()
    assert not torch.allclose(tiny(region_source="roi")(pixels, boxes, mask).region_embeds, found.region_embeds)


def test_an_unknown_region_source_is_refused():
    with pytest.raises(ValueError, match=r'region_source must be "roi" or "crop", got \'box\''):
        tiny(region_source="box")


@torch.no_grad()
def test_padding_is_zero_and_changes_nothing():
    model = tiny()
    shake_batchnorm(model)
    pixels = torch.randn(2, 3, 64, 64)
    boxes = torch.tensor([[[0, 0, 32, 32], [8, 16, 64, 40], [0, 0, 64, 64]], [[4, 4, 20, 60], [0] * 4, [0] * 4]])
    boxes, mask = boxes.float(), torch.tensor([[True, True, True], [True, False, False]])
    found = model(pixels, boxes, mask).region_embeds
    assert found.shape == (2, 3, 12)
    assert (found[~mask] == 0).all() and (found[mask] != 0).all()
    for i in range(2):
        alone = model(pixels[i : i + 1], boxes[i : i + 1, mask[i]]).region_embeds[0]
        torch.testing.assert_close(found[i, mask[i]], alone)
    boxes[~mask] = torch.nan
    assert torch.equal(model(pixels, boxes, mask).region_embeds, found)


@torch.no_grad()
@pytest.mark.parametrize("regions", [0, 2])
def test_no_real_region_at_all(regions):
    boxes, mask = torch.zeros(2, regions, 4), torch.zeros(2, regions, dtype=torch.bool)
    found = tiny()(torch.randn(2, 3, 64, 64), boxes, mask)
    assert torch.equal(found.region_embeds, torch.zeros(2, regions, 12))
    assert found.image_embeds.shape == (2, 12)


@torch.no_grad()
def test_one_trunk_pass_serves_the_image_and_its_regions():
    model, calls = tiny(), {"trunk": 0, "head": 0}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    model.backbone.conv1.register_forward_hook(count("trunk"))
    model.backbone.layer4.register_forward_hook(count("head"))
    pixels, boxes = torch.randn(2, 3, 64, 64), torch.tensor([[[0.0, 0, 32, 32], [8, 8, 40, 64]]] * 2)
    output = model(pixels, boxes)
    assert calls == {"trunk": 1, "head": 2}
    assert torch.equal(output.image_embeds, model(pixels).image_embeds)
    assert torch.equal(output.region_embeds, model(pixels, boxes, embed_images=False).region_embeds)
    assert model(pixels, boxes, embed_images=False).image_embeds is None
    assert model(pixels).region_embeds is None


@torch.no_grad()
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_bfloat16_keeps_images_and_pixels_apart(how):
    """bfloat16 holds whole numbers up to 256: boxes and image numbers above it must not be rounded."""
    kwargs = {"layers": [1, 1, 1, 1], "channels": [2, 2, 2, 2]}
    model = tiny(backbone_kwargs=kwargs, region_stage=0, roi_size=2, projection_dim=3)
    pixels = torch.zeros(260, 3, 8, 8)
    pixels[257] = 1
    boxes = torch.tensor([0.0, 0, 8, 8]).expand(260, 1, 4)
    if how == "cast":
        model, pixels = model.bfloat16(), pixels.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = model(pixels, boxes, embed_images=False).region_embeds[:, 0]
    assert found.dtype == torch.bfloat16
    other = (found != found[0]).any(1).nonzero().flatten().tolist()
    assert other == [257]


def test_wrong_shapes_name_what_was_expected():
    model, pixels, boxes = tiny(), torch.randn(2, 3, 64, 64), torch.zeros(2, 3, 4)
    for wrong in (boxes[0], boxes[:1], boxes[..., :3]):
        shape = str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=rf"boxes must be \(2, R, 4\), got {shape}"):
            model(pixels, wrong)
    with pytest.raises(ValueError, match=r"region_mask must be \(2, 3\) bool, got \(2, 2\)"):
        model(pixels, boxes, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"region_mask must be \(2, 3\) bool, got \(2, 3\) torch.float32"):
        model(pixels, boxes, torch.ones(2, 3))


@pytest.mark.parametrize("field", ["roi_size", "projection_dim", "image_size", "num_channels"])
def test_config_refuses_sizes_below_one(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        VillaVisionConfig(**{field: 0})


def test_config_refuses_an_empty_backbone():
    with pytest.raises(ValueError, match="backbone must name a timm model"):
        VillaVisionConfig(backbone="")


@torch.no_grad()
def test_projector_is_an_mlp_behind_the_backbone():
    plain, model = tiny(), tiny(projector_width=8)
    model.backbone.load_state_dict(plain.backbone.state_dict())
    pixels, boxes = torch.rand(2, 3, 64, 64), torch.tensor([[[0.0, 0, 32, 32]], [[32.0, 0, 64, 32]]])
    norm, first, _, second = model.projector
    assert first.out_features == 8 and second.out_features == model.config.projection_dim
    before, after = plain(pixels, boxes), model(pixels, boxes)
    for name in ("image_embeds", "region_embeds"):
        torch.testing.assert_close(after[name], second(first(norm(before[name])).relu()))
    with pytest.raises(ValueError, match="projector_width must not be negative, got -1"):
        tiny(projector_width=-1)


@torch.no_grad()
def test_projector_without_norm_makes_the_backbones_projection_its_first_layer():
    model = tiny(projector_width=8, projector_norm=False)
    _, last = model.projector
    assert (model.backbone.fc.out_features, last.in_features, last.out_features) == (8, 8, 12)
    pixels, boxes = torch.rand(2, 3, 64, 64), torch.tensor([[[0.0, 0, 64, 64]]] * 2)
    expected = last(model.backbone(pixels).relu())
    output = model(pixels, boxes)
    torch.testing.assert_close(output.image_embeds, expected)
    assert output.region_embeds.shape == (2, 1, 12)
    plain = tiny(projector_norm=False)  # nothing to leave the norm out of
    assert plain.backbone.fc.out_features == 12 and isinstance(plain.projector, torch.nn.Identity)
