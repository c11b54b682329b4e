"""VillaClipModel: features, logits, loss, initial weights, saving and loading."""

import math

import pytest
import timm
import torch
from tiny_models import SPECIAL, TEXT, VISION, VLM, make_tokenizer
from torch.nn.functional import normalize
from transformers import AutoModel

from modeling_villa import VillaClipConfig, VillaClipModel, VillaMappingConfig, VillaMappingModel, VillaVisionModel
from modeling_villa.losses_villa import clip_contrastive_loss


def tiny(**changes):
    return VillaClipModel(VillaClipConfig(**{**VLM, **changes})).eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    ids = torch.tensor([[0, 7, 8, 9, 3], [0, 5, 3, 1, 1], [0, 6, 6, 3, 1]])
    boxes = torch.tensor([[[0, 0, 16, 16], [8, 4, 32, 32]], [[0, 0, 32, 32], [0, 0, 0, 0]], [[2, 2, 9, 30]] * 2])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 1).long(),
        "pixel_values": torch.randn(3, 3, 32, 32),
        "boxes": boxes.float(),
        "region_mask": mask,
    }


@pytest.fixture
def tokenizer():
    words = [*SPECIAL, "a", "photo", "of", "the", "red", "blue", "round", "thing", "in", "it"]
    return make_tokenizer(words, 8)


@torch.no_grad()
def test_features_are_normalised_and_give_the_logits(batch):
    model, mask = tiny(temperature=0.2), batch["region_mask"]
    images = model.get_image_features(batch["pixel_values"])
    regions = model.get_region_features(batch["pixel_values"], batch["boxes"], mask)
    texts = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    assert (images.shape, regions.shape, texts.shape) == ((3, 32), (3, 2, 32), (3, 32))
    for features in (images, texts, regions[mask]):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))
    assert (regions[~mask] == 0).all()
    output = model(**batch)
    torch.testing.assert_close(output.logits_per_image, images @ texts.T / 0.2)
    torch.testing.assert_close(output.logits_per_text, texts @ images.T / 0.2)
    torch.testing.assert_close(output.logits_per_region, torch.einsum("brd,td->brt", regions, texts) / 0.2)
    torch.testing.assert_close((output.image_embeds, output.text_embeds), (images, texts))
    torch.testing.assert_close(output.region_embeds, regions)
    assert output.loss is None


@torch.no_grad()
def test_texts_do_not_see_padding_and_may_differ_in_number_from_images(batch):
    model = tiny()
    alone = model.get_text_features(torch.tensor([[0, 5, 3]]), torch.ones(1, 3, dtype=torch.long))
    texts = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(texts[1:2], alone)
    output = model(batch["input_ids"], batch["attention_mask"], batch["pixel_values"][:2])
    assert output.logits_per_image.shape == (2, 3) and output.logits_per_text.shape == (3, 2)
    assert output.logits_per_region is None and output.region_embeds is None


def test_loss_is_the_contrastive_loss_and_reaches_every_parameter(batch):
    model = tiny().train()
    output = model(**batch, return_loss=True)
    scale = model.logit_scale.exp()
    torch.testing.assert_close(output.loss, clip_contrastive_loss(output.image_embeds, output.text_embeds, scale))
    output.loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_logit_scale_is_the_inverse_temperature():
    assert tiny().logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert tiny(temperature=0.5).logit_scale.item() == pytest.approx(math.log(2))


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"device_map": "cpu"}], ids=["plain", "device_map"])
def test_round_trip_is_bit_equal(tmp_path, batch, how):
    model = tiny(temperature=0.3)
    model.logit_scale.fill_(1.25)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, **how).eval()
    assert type(again) is VillaClipModel
    assert again.config.temperature == 0.3 and again.config.vision_config.backbone_kwargs == VISION["backbone_kwargs"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    expected, found = model(**batch, return_loss=True), again(**batch, return_loss=True)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@torch.no_grad()
def test_prompts_are_averaged_per_attribute(tokenizer):
    model = tiny()
    prompts = [["a photo of the red thing", "red"], ["blue"], ["round", "a round thing", "it"]]
    expected = []
    for sentences in prompts:
        total = torch.zeros(32)
        for sentence in sentences:
            tokens = tokenizer(sentence, return_tensors="pt")
            embeds = model.text_model(tokens["input_ids"], tokens["attention_mask"]).text_embeds[0]
            total += embeds / embeds.norm()
        expected.append(total / total.norm())
    torch.testing.assert_close(model.embed_prompts(prompts, tokenizer), torch.stack(expected))
    assert model.embed_prompts([["a photo of the red blue round thing in it"]], tokenizer).shape == (1, 32)


def test_missing_inputs_and_towers_of_different_widths(batch):
    model = tiny()
    for missing in ("input_ids", "pixel_values"):
        with pytest.raises(ValueError, match="needs input_ids and pixel_values; for one of them use get_"):
            model(**{**batch, missing: None})
    with pytest.raises(ValueError, match=r"vision_config.projection_dim is 32, text_config.projection_dim is 16"):
        VillaClipConfig(vision_config=VISION, text_config={**TEXT, "projection_dim": 16})
    with pytest.raises(ValueError, match="temperature must be positive, got -1"):
        VillaClipConfig(vision_config=VISION, text_config=TEXT, temperature=-1.0)


@pytest.mark.parametrize(
    ("backbone", "kwargs"),
    [
        ("resnet18", VISION["backbone_kwargs"]),
        ("convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
        ("resnet50_clip", {"width_factor": 0.125, "stem_chs": 64, "stem_type": "deep"}),
    ],
)
def test_initial_weights_of_timm_survive(backbone, kwargs):
    config = VillaClipConfig(
        vision_config={**VISION, "backbone": backbone, "backbone_kwargs": kwargs}, text_config=TEXT
    )
    torch.manual_seed(1)
    expected = timm.create_model(backbone, num_classes=32, **kwargs).state_dict()
    for build in (
        lambda: VillaVisionModel(config.vision_config).backbone,
        lambda: VillaClipModel(config).vision_model.backbone,
        lambda: VillaMappingModel(VillaMappingConfig(vlm_config=config)).vlm.vision_model.backbone,
    ):
        torch.manual_seed(1)
        found = build().state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_initial_parameters_are_sane():
    model = tiny()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.numel() == 1:
            continue
        spread = parameter.std().item()
        constant = parameter.flatten()[0].item()
        assert 1e-3 < spread < 1 or (spread == 0 and constant in (0, 1)), name
    weights = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    assert all(dict(model.named_parameters())[name].std() > 0 for name in weights)


@torch.no_grad()
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_bfloat16(how, batch):
    model = tiny()
    expected = model(**batch, return_loss=True)
    if how == "cast":
        model, batch = model.bfloat16(), {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = model(**batch, return_loss=True)
    mask = batch["region_mask"]
    for key in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(found[key].float(), expected[key], atol=0.05, rtol=0)
    torch.testing.assert_close(found.region_embeds[mask].float(), expected.region_embeds[mask], atol=0.05, rtol=0)
    torch.testing.assert_close(found.loss.float(), expected.loss, atol=0.5, rtol=0)


@torch.no_grad()
def test_embeddings_loaded_in_half_precision(tmp_path, batch):
    model = tiny()
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    images = half.get_image_features(batch["pixel_values"].bfloat16()).float()
    torch.testing.assert_close(
        normalize(images, dim=-1), model.get_image_features(batch["pixel_values"]), atol=0.05, rtol=0
    )
