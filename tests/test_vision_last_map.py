"""The image tower over Swins and ViTs: regions from the last map, by its mean or by the backbone's own attention."""

import pytest
import timm
import torch
from vision_helpers import SMALL_RESNET, shake_batchnorm, tiny

from modeling_villa import VillaVisionConfig
from modeling_villa.vision_villa import choose_region_head

pytestmark = pytest.mark.usefixtures("seeded")

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2, 1], "num_heads": [1, 2, 2], "window_size": 2}
LAST_MAPS = {
    # name: timm's name, its arguments, side of a cell in pixels, pixels, what follows the pooling
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 8, (32, 32), lambda net, x: net.head.fc(x)),
    "swin v2": ("swinv2_tiny_window8_256", SWIN, 8, (32, 32), lambda net, x: net.head.fc(x)),
    "class token": ("vit_tiny_patch16_224", VIT, 4, (32, 32), lambda net, x: net.head(x)),
    "average": (
        "vit_tiny_patch16_224",
        {**VIT, "global_pool": "avg", "class_token": False, "reg_tokens": 2},
        4,
        (32, 32),
        lambda net, x: net.head(net.fc_norm(x)),
    ),
    "any size": (
        "vit_tiny_patch16_224",
        {**VIT, "global_pool": "avg", "dynamic_img_size": True},
        4,
        (24, 40),
        lambda net, x: net.head(net.fc_norm(x)),
    ),
    "attention pool": (
        "vit_base_patch16_siglip_224",
        VIT,
        4,
        (32, 32),
        # attention to a single token is its value
        lambda net, x: net.head(after_attention(net.attn_pool, net.attn_pool.kv(x).chunk(2)[1])),
    ),
    "rope": ("vit_base_patch16_rope_reg1_gap_256", VIT, 4, (32, 32), lambda net, x: net.head(net.fc_norm(x))),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", VIT, 4, (32, 32), lambda net, x: net.head(x)),
    "eva02": ("eva02_tiny_patch14_224", VIT, 4, (32, 32), lambda net, x: net.head(net.fc_norm(x))),
    "resnet": ("resnet18", SMALL_RESNET, 32, (128, 128), lambda net, x: net.fc(x)),
}
AVERAGING = ["swin", "swin v2", "average", "any size", "rope", "eva02", "resnet"]


def after_attention(pool, x):
    x = pool.proj(x)
    return x + pool.mlp(pool.norm(x))


def last_map(name, **changes):
    """A model with a region head over the last map, none of whose parameters is as it was initialised."""
    backbone, kwargs, cell, size, finish = LAST_MAPS[name]
    settings = {"backbone": backbone, "backbone_kwargs": kwargs, "region_head": "mean", "roi_size": 2}
    model = tiny(**{**settings, **changes})
    shake_batchnorm(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, *size), cell, finish


def cells_of(model, pixels, cell):
    """(B, H, W, C), gathered cell by cell from whatever the backbone's last features look like."""
    features = model.backbone.forward_features(pixels)
    height, width = pixels.shape[2] // cell, pixels.shape[3] // cell
    cells = torch.zeros(len(pixels), height, width, model.backbone.num_features)
    for row in range(height):
        for column in range(width):
            if features.dim() == 3:
                there = features[:, model.backbone.num_prefix_tokens + row * width + column]
            elif getattr(model.backbone, "output_fmt", "NCHW") == "NHWC":
                there = features[:, row, column]
            else:
                there = features[:, :, row, column]
            cells[:, row, column] = there
    return cells


@torch.no_grad()
@pytest.mark.parametrize("roi_size", [1, 2])
@pytest.mark.parametrize("name", LAST_MAPS)
def test_mean_head_is_the_mean_of_the_cells_in_a_box(name, roi_size):
    """Boxes along cell borders whose sides are multiples of the RoIAlign size are sampled at the cells' centres."""
    model, pixels, cell, finish = last_map(name, roi_size=roi_size)
    assert (model.region_head, model.stride) == ("mean", cell)
    cells = cells_of(model, pixels, cell)
    corners = [[(0, 0, 2, 2), (1, 0, 3, 2)], [(0, 1, 2, 3), (1, 1, 3, 3)]]
    if roi_size == 1:
        corners = [[(0, 0, 1, 1), (2, 1, 3, 3)], [(0, 2, 3, 3), (1, 0, 3, 2)]]
    found = model(pixels, cell * torch.tensor(corners).float()).region_embeds
    for i, image in enumerate(corners):
        for r, (left, top, right, bottom) in enumerate(image):
            total = torch.zeros(cells.shape[-1])
            for row in range(top, bottom):
                for column in range(left, right):
                    total += cells[i, row, column]
            expected = finish(model.backbone, total / ((right - left) * (bottom - top)))
            torch.testing.assert_close(found[i, r], expected, rtol=1e-4, atol=1e-5)
    assert (found[0, 0] - found[0, 1]).abs().max() > 1e-3


def attend(pool, cells):
    """Attention of the learned query to (N, C) cells, head by head."""
    query, keys, values = pool.q(pool.latent[0, 0]), *pool.kv(cells).chunk(2, dim=1)
    outputs, width = [], len(query) // pool.num_heads
    for head in range(pool.num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.zeros(len(cells))
        for n in range(len(cells)):
            weights[n] = (query[part] @ keys[n, part] / width**0.5).exp()
        outputs.append(weights / weights.sum() @ values[:, part])
    return after_attention(pool, torch.cat(outputs))


@torch.no_grad()
@pytest.mark.parametrize(
    ("backbone", "kwargs"),
    [
        ("vit_base_patch16_siglip_224", VIT),
        ("vit_tiny_patch16_224", {**VIT, "global_pool": "map"}),
        ("vit_tiny_patch16_224", {**VIT, "global_pool": "map", "pool_include_prefix": True}),
        ("vit_pe_core_tiny_patch16_384", VIT),
    ],
    ids=["no class token", "class token cut off", "class token pooled", "rope"],
)
def test_attention_head_attends_to_the_cells_in_a_box(backbone, kwargs):
    model, pixels, cell, _ = last_map(
        "class token", backbone=backbone, backbone_kwargs=kwargs, region_head="attention", roi_size=3
    )
    cells = cells_of(model, pixels, cell)
    corners = [[(0, 0), (1, 0)], [(3, 4), (5, 5)]]
    boxes = cell * torch.tensor([[(x, y, x + 3, y + 3) for x, y in image] for image in corners]).float()
    found = model(pixels, boxes)
    for i, image in enumerate(corners):
        for r, (x, y) in enumerate(image):
            inside = cells[i, y : y + 3, x : x + 3].reshape(9, -1)
            expected = model.backbone.head(attend(model.backbone.attn_pool, inside))
            torch.testing.assert_close(found.region_embeds[i, r], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.image_embeds, model.backbone(pixels))


CLASS_TOKENS = {
    "clip": ("vit_base_patch32_clip_quickgelu_224", VIT),
    "registers": ("vit_tiny_patch16_224", {**VIT, "reg_tokens": 2}),
    "any size": ("vit_tiny_patch16_224", {**VIT, "dynamic_img_size": True}),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT),
}


def class_token_model(name, **changes):
    backbone, kwargs = CLASS_TOKENS[name]
    settings = {"backbone": backbone, "backbone_kwargs": kwargs, "region_head": "attention", "roi_size": 3}
    return last_map("class token", **{**settings, **changes})


def masked_last_block(backbone, pixels, inside):
    """The backbone's own output if, in its last block, only the cells `inside` (row, column) and the prefix are there.

    Written as a mask over all tokens: attention, by hand and head by head, gives the others no weight.
    """
    x = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(pixels)))
    for block in backbone.blocks[:-1]:
        x = block(x)
    last, prefix = backbone.blocks[-1], backbone.num_prefix_tokens
    side = backbone.patch_embed.grid_size[1]
    seen = torch.zeros(x.shape[1], dtype=torch.bool)
    seen[:prefix] = True
    for row, column in inside:
        seen[prefix + row * side + column] = True
    normed, outputs = last.norm1(x), []
    q, k, v = last.attn.qkv(normed).chunk(3, dim=-1)
    width = q.shape[-1] // last.attn.num_heads
    for head in range(last.attn.num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / width**0.5).masked_fill(~seen, -torch.inf)
        outputs.append(weights.softmax(-1) @ v[..., part])
    x = x + last.attn.proj(torch.cat(outputs, -1))
    x = backbone.norm(x + last.mlp(last.norm2(x)))
    return backbone.forward_head(x)


@torch.no_grad()
@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_the_class_token_attends_to_the_cells_in_a_box_alone(name):
    model, pixels, cell, _ = class_token_model(name)
    corners = [[(0, 0), (1, 0)], [(3, 4), (5, 5)]]
    boxes = cell * torch.tensor([[(x, y, x + 3, y + 3) for x, y in image] for image in corners]).float()
    found = model(pixels, boxes)
    for i, image in enumerate(corners):
        for r, (x, y) in enumerate(image):
            inside = [(y + row, x + column) for row in range(3) for column in range(3)]
            expected = masked_last_block(model.backbone, pixels[i : i + 1], inside)[0]
            torch.testing.assert_close(found.region_embeds[i, r], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.image_embeds, model.backbone(pixels))
    assert torch.equal(found.image_embeds, model(pixels).image_embeds)


@torch.no_grad()
@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_the_whole_image_as_a_box_is_the_image_where_a_class_token_attends(name):
    model, pixels, _, _ = class_token_model(name, roi_size=8)
    output = model(pixels, torch.tensor([[[0.0, 0, 32, 32], [0, 0, 32, 16]]] * 2))
    torch.testing.assert_close(output.region_embeds[:, 0], output.image_embeds, rtol=1e-4, atol=1e-5)
    assert (output.region_embeds[:, 1] - output.image_embeds).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", LAST_MAPS)
def test_images_are_the_backbones_own_output_from_one_pass(name):
    model, pixels, _, _ = last_map(name)
    expected, passes = model.backbone(pixels), []
    first = model.backbone.conv1 if name == "resnet" else model.backbone.patch_embed
    first.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(model(pixels).image_embeds, expected)
    output = model(pixels, torch.tensor([[[0.0, 0, 16, 24], [8, 8, 24, 24]]] * 2))
    assert torch.equal(output.image_embeds, expected)
    assert len(passes) == 2


@torch.no_grad()
@pytest.mark.parametrize("name", AVERAGING)
def test_the_whole_image_as_a_box_is_the_image_where_the_backbone_averages(name):
    model, pixels, _, _ = last_map(name)
    height, width = pixels.shape[-2:]
    output = model(pixels, torch.tensor([[[0.0, 0, width, height], [0, 0, width, height / 2]]] * 2))
    torch.testing.assert_close(output.region_embeds[:, 0], output.image_embeds, rtol=1e-4, atol=1e-5)
    assert (output.region_embeds[:, 1] - output.image_embeds).abs().max() > 1e-3


@torch.no_grad()
def test_the_whole_image_as_a_box_is_the_image_where_the_backbone_attends_to_every_cell():
    model, pixels, _, _ = last_map("attention pool", region_head="attention", roi_size=8)
    output = model(pixels, torch.tensor([[[0.0, 0, 32, 32]]] * 2))
    torch.testing.assert_close(output.region_embeds[:, 0], output.image_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["swin", "class token", "attention pool", "last block"])
def test_padding_of_regions_from_the_last_map(name):
    model, pixels, _, _ = class_token_model("registers") if name == "last block" else last_map(name)
    boxes = torch.tensor([[[0, 0, 16, 16], [8, 16, 32, 20.5]], [[4, 4, 20, 30], [0] * 4]])
    mask = torch.tensor([[True, True], [True, False]])
    found = model(pixels, boxes, mask, embed_images=False).region_embeds
    assert (found[~mask] == 0).all() and (found[mask] != 0).all()
    for i in range(2):
        alone = model(pixels[i : i + 1], boxes[i : i + 1, mask[i]]).region_embeds[0]
        torch.testing.assert_close(found[i, mask[i]], alone)
    found.sum().backward()
    assert model.backbone.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("backbone", "asked", "chosen"),
    [
        ("resnet18", None, "stages"),
        ("resnet18", "attention", "ResNet cannot have region_head 'attention'; possible: stages, mean"),
        ("resnet50_clip", None, "stages"),
        ("resnet50_clip", "mean", "ByobNet cannot have region_head 'mean'; possible: stages"),
        ("swin_tiny_patch4_window7_224", None, "mean"),
        ("swin_tiny_patch4_window7_224", "stages", "SwinTransformer cannot have region_head 'stages'; possible: mean"),
        ("vit_tiny_patch16_224", None, "mean"),
        ("vit_tiny_patch16_224", "stages", "VisionTransformer cannot have region_head 'stages'; possible: mean"),
        ("vit_tiny_patch16_224", "attention", "attention"),
        ("vit_base_patch32_clip_quickgelu_224", "attention", "attention"),
        ("vit_small_patch16_rope_mixed_224", "attention", "Eva cannot have region_head 'attention'; possible: mean"),
        ("vit_base_patch16_gap_224", "attention", "VisionTransformer cannot have region_head 'attention'; possible: m"),
        ("vit_base_patch16_siglip_224", None, "mean"),
        ("vit_base_patch16_siglip_224", "stages", "cannot have region_head 'stages'; possible: mean, attention"),
        ("vit_base_patch16_rope_reg1_gap_256", None, "mean"),
        ("hrnet_w18_small", None, "HighResolutionNet cannot have a region head; possible: none"),
    ],
)
def test_region_head_is_chosen_by_the_kind_of_backbone(backbone, asked, chosen):
    with torch.device("meta"):
        network = timm.create_model(backbone, num_classes=5)
    if chosen in ("stages", "mean", "attention"):
        assert choose_region_head(network, asked) == chosen
    else:
        with pytest.raises(ValueError, match=chosen):
            choose_region_head(network, asked)


def test_config_refuses_an_unknown_region_head():
    with pytest.raises(ValueError, match='region_head must be "stages", "mean", "attention" or None, got \'max\''):
        VillaVisionConfig(region_head="max")


def test_images_that_the_backbone_cannot_take():
    for name, network in (("swin", "SwinTransformer"), ("class token", "VisionTransformer"), ("rope", "Eva")):
        model, _, _, _ = last_map(name)
        with pytest.raises(ValueError, match=f"pixel_values are 40 x 32 pixels, {network} takes 32 x 32; .*img_size"):
            model(torch.zeros(1, 3, 40, 32))
    model, _, _, _ = last_map("any size")
    with pytest.raises(ValueError, match="pixel_values are 24 x 30 pixels, VisionTransformer takes multiples of 4 x 4"):
        model(torch.zeros(1, 3, 24, 30))


def test_features_that_are_no_map():
    model, pixels, _, _ = last_map("average", backbone_kwargs={**VIT, "patch_drop_rate": 0.5})
    assert model.eval()(pixels).image_embeds.shape == (2, 12)
    with pytest.raises(ValueError, match="gives 33 tokens where 8 x 8 cells and 1 prefix tokens are expected"):
        model.train()(pixels)
    model = tiny(backbone="levit_128s", backbone_kwargs={}, region_head="mean")
    with pytest.raises(ValueError, match=r"LevitDistilled ends in features of shape \(1, 16, 384\), which are no map"):
        model(torch.zeros(1, 3, 224, 224))
