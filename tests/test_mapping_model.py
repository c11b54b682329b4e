"""VillaMappingModel: scores against the formula, and the winners' gradient against the plain way."""

import pytest
import torch
from tiny_models import VLM
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from modeling_villa import VillaMappingConfig, VillaMappingModel
from modeling_villa.losses_villa import mapping_contrastive_loss
from modeling_villa.modeling_villa_mapping import VillaProjectionHeads

COLOURS = ["red", "green", "blue", "yellow", "white"]


def tiny(**changes):
    model = VillaMappingModel(VillaMappingConfig(vlm_config=VLM, **{"attributes": COLOURS, **changes})).eval()
    names = model.config.attributes
    model.set_attribute_embeds(names, torch.randn(len(names), 32))
    return model


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    """Four images with 3, 1, 0 and 2 regions; every attribute has positives and negatives."""
    corners = torch.rand(4, 3, 2) * 16
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()
    boxes = torch.cat([corners, corners + 6 + torch.rand(4, 3, 2) * 10], -1) * mask[..., None]
    labels = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [1, 1, 0, 0, 1], [0, 0, 1, 1, 0]]).bool()
    return {"pixel_values": torch.randn(4, 3, 32, 32), "boxes": boxes, "region_mask": mask, "labels": labels}


def linear_heads(heads):
    """The same heads, as a list of nn.Sequential."""
    found = []
    with torch.no_grad():
        for p in range(len(heads.weight_in)):
            first, second = nn.Linear(32, 32), nn.Linear(32, 32)
            first.weight.copy_(heads.weight_in[p].T)
            first.bias.copy_(heads.bias_in[p, 0])
            second.weight.copy_(heads.weight_out[p].T)
            second.bias.copy_(heads.bias_out[p, 0])
            found.append(nn.Sequential(first, nn.ReLU(), second))
    return found


def slow_scores(model, region_embeds, mask):
    """cosine(P_k(e_ir), h_k), one region and attribute at a time."""
    heads, residual = linear_heads(model.projection_heads), model.config.residual
    scores = torch.zeros(*mask.shape, len(model.config.attributes))
    for i, r in mask.nonzero().tolist():
        for k, embed in enumerate(model.attribute_embeds):
            e = region_embeds[i, r]
            output = (1 - residual) * heads[k % len(heads)](e) + residual * e
            scores[i, r, k] = cosine_similarity(output, embed, dim=0)
    return scores


@torch.no_grad()
@pytest.mark.parametrize("residual", [0.0, 0.8])
@pytest.mark.parametrize("num_heads", [5, 3, 1])
def test_scores_follow_the_formula(num_heads, residual, batch):
    model, mask = tiny(num_heads=num_heads, residual=residual), batch["region_mask"]
    embeds = torch.randn(4, 3, 32)
    output = model(region_embeds=embeds, region_mask=mask, return_maxima=True)
    expected = slow_scores(model, embeds, mask)
    torch.testing.assert_close(output.scores, expected)
    usable = mask.any(1)
    maxima = expected.masked_fill(~mask[..., None], -2).amax(1)
    torch.testing.assert_close(output.maxima[usable], maxima[usable])
    assert output.loss is None and model(region_embeds=embeds, region_mask=mask).maxima is None


def plain_loss(model, region_embeds, batch):
    """Every region through the heads with a graph."""
    scores = model.score_regions(region_embeds, batch["region_mask"])
    return mapping_contrastive_loss(scores, batch["region_mask"], batch["labels"], model.config.temperature)


def gradients(model, loss, *more):
    model.zero_grad()
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found | {str(i): tensor.grad for i, tensor in enumerate(more)}


@pytest.mark.parametrize("residual", [0.0, 0.8])
@pytest.mark.parametrize("num_heads", [5, 3, 1])
def test_winners_alone_give_the_gradient_of_the_plain_way(num_heads, residual, batch):
    model = tiny(num_heads=num_heads, residual=residual).double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    images = [batch["pixel_values"].clone().requires_grad_() for _ in range(2)]

    routed = model(**{**batch, "pixel_values": images[0]})
    assert not routed.scores.requires_grad
    found = gradients(model, routed.loss, images[0])

    vision = model.vlm.vision_model(images[1], batch["boxes"], batch["region_mask"], embed_images=False)
    loss = plain_loss(model, vision.region_embeds, batch)
    expected = gradients(model, loss, images[1])

    torch.testing.assert_close(routed.loss, loss, rtol=1e-5, atol=1e-7)
    assert any("backbone.conv1" in name for name in found) and any("projection_heads" in name for name in found)
    assert sum(gradient.abs().sum() for name, gradient in found.items() if "backbone" in name) > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_winners_alone_give_the_gradient_of_region_embeddings(batch):
    model, embeds = tiny(num_heads=3, residual=0.8), torch.randn(4, 3, 32)
    leaves = [embeds.clone().requires_grad_() for _ in range(2)]
    loss = model(region_embeds=leaves[0], region_mask=batch["region_mask"], labels=batch["labels"]).loss
    found = gradients(model, loss, leaves[0])
    expected = gradients(model, plain_loss(model, leaves[1], batch), leaves[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (leaves[0].grad[~batch["region_mask"]] == 0).all() and leaves[0].grad.abs().sum() > 0


def test_the_gradient_survives_autocast(batch):
    """The first pass, without a graph, must not leave the second one casts of the weights that have none."""
    model = tiny()
    exact = gradients(model, model(**batch).loss)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    found = gradients(model, loss)
    assert set(found) == set(exact)
    for name in ("weight_in", "bias_in", "weight_out", "bias_out"):
        name = f"projection_heads.{name}"
        assert cosine_similarity(found[name].flatten(), exact[name].flatten(), dim=0) > 0.95


def test_training_step_lowers_the_loss(batch):
    model = tiny()
    optimizer = torch.optim.AdamW(model.projection_heads.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("assignment", [[0, 1, 2, 0, 1], [2, 2, 0, 2, 2], [1, 1, 1, 1, 1]])
def test_any_assignment_of_attributes_to_heads(assignment):
    """Uneven, and heads without attributes: scored together or one by one, the same."""
    heads = VillaProjectionHeads(3, 32, 5, 0.0)
    heads.reset_parameters()
    heads.attribute_heads.copy_(torch.tensor(assignment))
    embeds, attributes = torch.randn(7, 32), nn.functional.normalize(torch.randn(5, 32), dim=-1)
    slow = linear_heads(heads)
    expected = torch.stack([cosine_similarity(slow[assignment[k]](embeds), attributes[k]) for k in range(5)], 1)
    torch.testing.assert_close(heads.score_all(embeds, attributes), expected)
    each = heads.score_each(embeds[:, None].expand(-1, 5, -1), attributes)
    torch.testing.assert_close(each, expected)


@pytest.mark.parametrize(("regions", "least"), [(9, 2.2), (300, 2.9)])
def test_arithmetic_saved(regions, least):
    """Heads: 3 (forward) x regions against one forward of all and 3 of the winners: 2.25 at 9, 2.97 at 300."""
    model, labels = tiny(), torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 0, 0]]).bool()
    batch = {"labels": labels, "region_mask": torch.ones(2, regions, dtype=torch.bool)}
    embeds = torch.randn(2, regions, 32, requires_grad=True)

    def count(loss):
        with FlopCounterMode(display=False) as counter:
            loss().backward()
        return counter.get_total_flops()

    plain = count(lambda: plain_loss(model, embeds, batch))
    routed = count(lambda: model(region_embeds=embeds, **batch).loss)
    assert plain / routed >= least


def saved_for_backward(loss):
    """Bytes that autograd keeps for the backward pass, parameters' storages included once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    assert result.requires_grad
    return sum(kept.values())


def test_memory_saved():
    model, labels = tiny(), torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 0, 0]]).bool()
    batch = {"labels": labels, "region_mask": torch.ones(2, 300, dtype=torch.bool)}
    embeds = torch.randn(2, 300, 32)
    plain = saved_for_backward(lambda: plain_loss(model, embeds, batch))
    routed = saved_for_backward(lambda: model(region_embeds=embeds, **batch).loss)
    assert routed < plain / 5


@torch.no_grad()
def test_padding_does_not_matter(batch):
    model, mask = tiny(), batch["region_mask"]
    embeds = torch.randn(4, 3, 32)
    first = model(region_embeds=embeds, region_mask=mask, labels=batch["labels"])
    wider = torch.cat([embeds.masked_fill(~mask[..., None], torch.nan), torch.full((4, 2, 32), torch.inf)], 1)
    wider[2] = 0  # without any region: what stands there goes through the heads, and then out of the loss
    second = model(region_embeds=wider, region_mask=nn.functional.pad(mask, (0, 2)), labels=batch["labels"])
    torch.testing.assert_close(second.scores[:, :3][mask], first.scores[mask])
    assert (second.scores[:, 3:] == 0).all() and (first.scores[~mask] == 0).all()
    torch.testing.assert_close(second.loss, first.loss)


@torch.no_grad()
def test_region_embeds_give_what_pixels_give(batch):
    model = tiny()
    pixels = model(**batch)
    stored = model(region_embeds=pixels.region_embeds, region_mask=batch["region_mask"], labels=batch["labels"])
    assert torch.equal(stored.scores, pixels.scores) and torch.equal(stored.loss, pixels.loss)


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"device_map": "cpu"}], ids=["plain", "device_map"])
def test_round_trip_is_bit_equal(tmp_path, batch, how):
    model = tiny(num_heads=3, residual=0.8, temperature=0.2, attribute_groups={"colour": COLOURS[:4]})
    model.projection_heads.attribute_heads.copy_(torch.tensor([2, 0, 0, 1, 2]))
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = AutoModel.from_pretrained(tmp_path, **how).eval()  # built on the meta device
    assert type(again) is VillaMappingModel
    for field in ("attributes", "attribute_groups", "num_heads", "residual", "temperature"):
        assert getattr(again.config, field) == getattr(model.config, field)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert {"attribute_embeds", "projection_heads.attribute_heads"} <= state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    expected, found = model(**batch), again(**batch)
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.loss, expected.loss)


def test_new_heads_look_like_those_of_linear_layers():
    heads = tiny(num_heads=3).projection_heads
    assert heads.attribute_heads.tolist() == [0, 1, 2, 0, 1]
    for parameter in heads.parameters():
        assert parameter.abs().max() <= 32**-0.5
        assert parameter.std().item() == pytest.approx((32 * 3) ** -0.5, rel=0.2)


@torch.no_grad()
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_bfloat16(how, batch):
    model = tiny(residual=0.8)
    expected = model(**batch)
    if how == "cast":
        model = model.bfloat16()
        batch = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = model(**batch)
    mask = batch["region_mask"]
    torch.testing.assert_close(found.scores[mask].float(), expected.scores[mask], atol=0.05, rtol=0)
    torch.testing.assert_close(found.loss.float(), expected.loss, atol=0.3, rtol=0)


def test_vocabulary_mismatches_name_both_sides(batch):
    model = tiny()
    with pytest.raises(ValueError, match=r"vocabulary 2 names \(cat, dog\), the model's config has 5 names \(red, "):
        model.set_attribute_embeds(["cat", "dog"], torch.randn(2, 32))
    with pytest.raises(ValueError, match=r"5 names \(green, red, .*config has 5 names \(red, green"):
        model.set_attribute_embeds(["green", "red", *COLOURS[2:]], torch.randn(5, 32))
    with pytest.raises(ValueError, match=r"shape \(4, 32\), the config's vocabulary and width want \(5, 32\)"):
        model.set_attribute_embeds(COLOURS, torch.randn(4, 32))
    with pytest.raises(ValueError, match=r"labels have shape \(4, 6\); .* 5 attributes want \(4, 5\)"):
        model(**{**batch, "labels": torch.zeros(4, 6, dtype=torch.bool)})


def test_attribute_embeds_are_normalised():
    model, embeds = tiny(), torch.randn(5, 32)
    model.set_attribute_embeds(COLOURS, 7 * embeds)
    torch.testing.assert_close(model.attribute_embeds, embeds / embeds.norm(dim=1, keepdim=True))


def test_attribute_indices():
    model = tiny()
    assert model.attribute_indices(["blue", "red"]) == [2, 0]
    with pytest.raises(ValueError, match=r"Unknown attribute 'blu': not in the vocabulary of 5; nearest: \['blue'\]"):
        model.attribute_indices(["red", "blu"])


def test_inputs_that_do_not_fit(batch):
    model = tiny()
    for missing in ("pixel_values", "boxes"):
        with pytest.raises(ValueError, match="needs pixel_values and boxes, or region_embeds"):
            model(**{**batch, missing: None})
    for wrong in ((4, 32), (4, 3, 31), (4, 0, 32)):
        with pytest.raises(ValueError, match=r"region_embeds must be \(B, R, 32\) with R > 0, got \(4, "):
            model(region_embeds=torch.zeros(wrong))
    for mask in (torch.ones(4, 2, dtype=torch.bool), torch.ones(4, 3)):
        with pytest.raises(ValueError, match=r"region_mask must be \(4, 3\) bool, got \(4, "):
            model(region_embeds=torch.zeros(4, 3, 32), region_mask=mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attributes": ["red", "red"]}, r"attributes must be distinct names, .* \['red', 'red'\]"),
        ({"attributes": []}, "attributes must be distinct names, at least one"),
        ({"attributes": "red"}, "attributes must be a list of names, got the string 'red'"),
        ({"num_heads": 6}, "num_heads must be from 1 to the number of attributes, 5; got 6"),
        ({"num_heads": 0}, "num_heads must be from 1"),
        ({"attribute_groups": {"colour": ["red", "pink"]}}, r"attribute_groups names \['pink'\]"),
        ({"attribute_groups": {"a": ["red"], "b": ["red"]}}, "An attribute belongs to one group at most"),
        ({"residual": 1.0}, r"residual must be in \[0, 1\), got 1.0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_config_checks_its_values(changes, message):
    with pytest.raises(ValueError, match=message):
        VillaMappingConfig(**{"attributes": COLOURS, **changes})


def test_config_groups():
    config = VillaMappingConfig(attributes=COLOURS, attribute_groups={"dark": ["blue", "red"], "light": ["white"]})
    assert config.group_ids == [0, -1, 0, -1, 1]
    assert config.num_heads == 5
