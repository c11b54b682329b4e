"""The text tower around an encoder: pooling, projection, saving, loading, and inside VillaClipModel."""

import pytest
import torch
from tiny_models import VISION, shake
from torch.nn.functional import normalize
from tower_folders import ENCODER, ENCODERS, TEXTS, encoder_folder
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, DistilBertConfig

from modeling_villa import VillaClipConfig, VillaClipModel, VillaMappingConfig, VillaTextConfig, VillaTextModel


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def text_config(kind="bert", **changes):
    return VillaTextConfig(encoder_config={"model_type": kind, **ENCODER}, **changes)


def inputs():
    ids = torch.tensor([[3, 7, 8, 9, 2], [3, 5, 2, 0, 0]])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_without_projection_it_is_a_sentence_bert(tmp_path, kind):
    encoder = encoder_folder(tmp_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = VillaTextModel(VillaTextConfig(encoder_config=encoder.config, projection=False)).eval()
    model.encoder.load_state_dict(encoder.state_dict(), strict=False)
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    found = normalize(model(**tokens).text_embeds, dim=-1)
    for i, text in enumerate(TEXTS):  # each alone: no padding, no mask
        states = encoder(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        mean = sum(states) / len(states)
        torch.testing.assert_close(found[i], mean / mean.norm(), atol=1e-5, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-3


@torch.no_grad()
def test_projections_and_pooler():
    linear, mlp = (shake(VillaTextModel(text_config(projection_dim=12, projector_width=w))) for w in (0, 20))
    for model in (linear, mlp):
        states, mask = model(**inputs()).last_hidden_state, inputs()["attention_mask"]
        pooled = torch.stack([states[i, : int(mask[i].sum())].mean(0) for i in range(2)])
        expected = model.projection(pooled) if model is linear else mlp.projection[2](mlp.projection[0](pooled).relu())
        torch.testing.assert_close(model(**inputs()).text_embeds, expected)
        assert expected.shape == (2, 12) and model.encoder.pooler is None
    assert mlp.projection[0].out_features == 20
    model = shake(VillaTextModel(text_config(pooling="pooler", projection=False)))
    expected = model.encoder(**inputs()).pooler_output
    torch.testing.assert_close(model(**inputs()).text_embeds, expected)
    alone = model(input_ids=inputs()["input_ids"][:1]).text_embeds  # no mask: every token is real
    torch.testing.assert_close(alone, expected[:1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_round_trip_alone_and_inside_a_clip(tmp_path, kind):
    tower = shake(VillaTextModel(text_config(kind, projection_dim=12)))
    tower.save_pretrained(tmp_path / "tower")
    again = AutoModel.from_pretrained(tmp_path / "tower").eval()
    assert type(again) is VillaTextModel
    assert torch.equal(again(**inputs()).text_embeds, tower(**inputs()).text_embeds)

    text = {"model_type": "villa_text", "encoder_config": {"model_type": kind, **ENCODER}}
    model = shake(VillaClipModel(VillaClipConfig(vision_config=VISION, text_config=text)))
    assert type(model.text_model) is VillaTextModel and model.config.text_config.projection_dim == 32
    model.save_pretrained(tmp_path / "clip")
    assert (tmp_path / "clip" / "text_villa.py").is_file()
    again = AutoModel.from_pretrained(tmp_path / "clip").eval()
    pixels = torch.randn(2, 3, 32, 32)
    expected, found = (m(**inputs(), pixel_values=pixels).logits_per_text for m in (model, again))
    assert torch.equal(found, expected)
    assert again.config.text_config.to_diff_dict()["encoder_config"]["model_type"] == kind
    nested = VillaMappingConfig(vlm_config=model.config)
    nested.save_pretrained(tmp_path / "mapping")
    found = AutoConfig.from_pretrained(tmp_path / "mapping").vlm_config.text_config
    assert type(found) is VillaTextConfig and type(found.encoder_config) is ENCODERS[kind]


def test_loss_reaches_every_parameter():
    text = {"model_type": "villa_text", "encoder_config": {"model_type": "bert", **ENCODER}, "projector_width": 16}
    model = VillaClipModel(VillaClipConfig(vision_config=VISION, text_config=text)).train()
    model(**inputs(), pixel_values=torch.randn(2, 3, 32, 32), return_loss=True).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_initial_projection_keeps_the_scale():
    model = VillaTextModel(text_config(projection_dim=16, projector_width=24))
    for layer in (model.projection[0], model.projection[2]):
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.2)
        assert (layer.bias == 0).all()


def test_length_that_the_positions_allow():
    assert text_config("bert").max_text_length == 20
    assert text_config("mpnet").max_text_length == text_config("roberta").max_text_length == 18
    for kind in ("mpnet", "roberta"):  # one token more, and the positions are over
        model = VillaTextModel(text_config(kind))
        model(input_ids=torch.full((1, 18), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 19), 5))


def test_config_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r'pooling must be "mean" or "pooler", got \'max\''):
        text_config(pooling="max")
    with pytest.raises(ValueError, match=r"Without projection .* as wide as the encoder, 32; got projection_dim 16"):
        text_config(projection=False, projection_dim=16)
    with pytest.raises(ValueError, match=r"projection_dim must be at least 1 and projector_width not negative, got 0"):
        text_config(projection_dim=0)
    with pytest.raises(ValueError, match=r"vision_config.projection_dim is 32, text_config.projection_dim is 16"):
        VillaClipConfig(vision_config=VISION, text_config=text_config(projection_dim=16))
    encoder = DistilBertConfig(vocab_size=40, dim=32, n_layers=1, n_heads=4, hidden_dim=64)
    with pytest.raises(ValueError, match=r'DistilBertModel has no pooler: pooling must be "mean"'):
        VillaTextModel(VillaTextConfig(encoder_config=encoder, pooling="pooler"))
    assert type(VillaTextConfig().encoder_config) is BertConfig
