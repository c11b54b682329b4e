"""ConVIRT checkpoints in the public layouts, written here from the paper: the same embeddings and logits."""

import logging
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import shake
from torch import nn
from torch.nn.functional import normalize
from torchvision.models import resnet50
from tower_folders import TEXTS, encoder_folder
from transformers import AutoModel, AutoProcessor

from modeling_villa.convert_convirt import LAYOUTS, Arguments, convert, main

DIM = 48


class ConVirt(nn.Module):
    """The paper's model (section 2.2): two encoders, on each of which sits linear, ReLU, linear."""

    def __init__(self, encoder, pooling):
        super().__init__()
        self.image = nn.Sequential(*list(resnet50().children())[:-1])  # by place, as the public code has it
        self.text, self.pooling = encoder, pooling
        self.image_first, self.image_last = nn.Linear(2048, 64), nn.Linear(64, DIM)
        self.text_first, self.text_last = nn.Linear(32, 40), nn.Linear(40, DIM)

    def forward(self, pixels, input_ids, attention_mask):
        images = self.image_last(self.image_first(self.image(pixels).flatten(1)).relu())
        output = self.text(input_ids=input_ids, attention_mask=attention_mask)
        if self.pooling == "mean":
            states = output.last_hidden_state
            pooled = torch.stack([states[i, : int(m.sum())].mean(0) for i, m in enumerate(attention_mask)])
        else:
            pooled = output.pooler_output
        return images, self.text_last(self.text_first(pooled).relu())


NAMES = {
    "ConVIRT-pytorch": {
        "image.": "res_features.",
        "image_first.": "res_l1.",
        "image_last.": "res_l2.",
        "text.": "bert_model.",
        "text_first.": "bert_l1.",
        "text_last.": "bert_l2.",
    },
    "ViLMedic": {
        "image.": "visual.cnn.",
        "image_first.": "vis_proj.0.",
        "image_last.": "vis_proj.2.",
        "text.": "linguistic.encoder.",
        "text_first.": "lin_proj.0.",
        "text_last.": "lin_proj.2.",
    },
}


def in_layout(model, layout):
    """A checkpoint as that code base writes it."""
    state = {}
    for name, tensor in model.state_dict().items():
        start = name.split(".")[0] + "."
        state[NAMES[layout][start] + name.removeprefix(start)] = tensor
    return state


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    return encoder_folder(tmp_path / "bert", "bert")


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_and_logits_are_the_same(tmp_path, monkeypatch, bert, layout):
    original = shake_layers(ConVirt(bert, LAYOUTS[layout].pooling))
    state = in_layout(original, layout)
    if layout == "ViLMedic":
        torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "convirt.pth")
        checkpoint = tmp_path / "convirt.pth"
    else:
        state["bert_model.embeddings.position_ids"] = torch.arange(20)[None]  # of older files
        checkpoint = tmp_path / "convirt.safetensors"
        save_file(state, checkpoint)
    words = ["--checkpoint", checkpoint, "--text", tmp_path / "bert", "--output", tmp_path / "villa"]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, words), "--image_size", "64", "--temperature", "0.2"])
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    main()
    model = AutoModel.from_pretrained(tmp_path / "villa").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "villa")
    tokens, pixels = processor(text=TEXTS), torch.randn(2, 3, 64, 64)
    images, texts = original(pixels, **tokens)
    output = model(**tokens, pixel_values=pixels)
    torch.testing.assert_close(model.vision_model(pixels).image_embeds, images, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.text_model(**tokens).text_embeds, texts, atol=1e-4, rtol=1e-4)
    logits = normalize(images, dim=-1) @ normalize(texts, dim=-1).T / 0.2
    torch.testing.assert_close(output.logits_per_image, logits, atol=1e-4, rtol=0)
    assert logits.std() > 1e-3 and model.config.projection_dim == DIM
    assert model.vision_model.region_head == "stages"
    assert processor.image_processor.size == {"height": 64, "width": 64}
    assert processor.tokenizer.model_max_length == 20
    assert str(tmp_path) not in (tmp_path / "villa" / "config.json").read_text()  # no folder of this machine


def shake_layers(model):
    """The ResNet's and MLPs' weights; BERT's are so already."""
    for part in (model.image, model.image_first, model.image_last, model.text_first, model.text_last):
        for module in part.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.8, 1.2)
            elif isinstance(module, nn.Linear):
                shake(module)
    return model.eval()


def test_tensors_that_do_not_fit_are_all_named(tmp_path, bert):
    state = in_layout(ConVirt(bert, "mean"), "ConVIRT-pytorch")
    del state["res_features.0.weight"], state["bert_l1.bias"]
    state["res_features.3.weight"], state["other"] = torch.zeros(1), torch.zeros(1)
    state["bert_model.embeddings.word_embeddings.weight"] = torch.zeros(41, 32)
    save_file(state, tmp_path / "convirt.safetensors")
    arguments = Arguments(str(tmp_path / "convirt.safetensors"), str(tmp_path / "bert"), str(tmp_path / "villa"))
    with pytest.raises(ValueError) as error:
        convert(arguments)
    for part in (
        "missing: vision_model.backbone.conv1.weight, text_model.projection.0.bias;",
        "left over: ",
        "vision_model.backbone.3.weight",
        "other",
        "shape: text_model.encoder.embeddings.word_embeddings.weight (41, 32) instead of (40, 32)",
    ):
        assert part in str(error.value)
    arguments.pooling = "pooler"  # now BERT's pooler has to be there, and is
    with pytest.raises(ValueError) as error:
        convert(arguments)
    assert "pooler" not in str(error.value)
    assert not (tmp_path / "villa").exists()


def test_what_cannot_be_converted(tmp_path, bert):
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no known ConVIRT.*ViLMedic: vis_proj.2.weight, lin_proj.2.weight; found"):
        convert(Arguments(str(tmp_path / "other.safetensors"), str(tmp_path / "bert"), str(tmp_path / "villa")))
    with pytest.raises(ValueError, match=r"checkpoint: there is no file .*absent.pth"):
        convert(Arguments(str(tmp_path / "absent.pth"), str(tmp_path / "bert"), str(tmp_path / "villa")))
    with pytest.raises(ValueError, match="exists already"):
        convert(Arguments("a", "b", str(tmp_path)))
