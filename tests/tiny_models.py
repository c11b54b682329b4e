"""The smallest models that the tests build: both towers in one place, a tokenizer, and folders with all of it."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling_villa import (
    VillaClipConfig,
    VillaClipModel,
    VillaImageProcessor,
    VillaMappingConfig,
    VillaMappingModel,
    VillaProcessor,
)

VISION = {
    "backbone": "resnet18",
    "backbone_kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 32]},
    "roi_size": 4,
    "projection_dim": 32,
    "image_size": 32,
}
# CLIP's text tower pools in another way where the end token is 2.
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
VLM = {"vision_config": VISION, "text_config": TEXT}
SPECIAL = ["<start>", "<pad>", "<unk>", "<end>"]  # at the ids of TEXT
WORDS = [*SPECIAL, "This", "is", "a", "photo", "of", ".", "red", "blue", "green", "car"]
ATTRIBUTES = ["red", "blue", "dark red", "round", "large"]
GROUPS = {"colour": ["red", "blue", "dark red"]}


def make_tokenizer(words, max_length, **more):
    """A tokenizer of these words, SPECIAL among them; `more` goes to PreTrainedTokenizerFast."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(word, words.index(word)) for word in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", model_max_length=max_length, **more)


def make_processor(words=WORDS):
    """What belongs to a model of VLM."""
    tokenizer = make_tokenizer(words, 16, model_input_names=["input_ids", "attention_mask"])
    return VillaProcessor(VillaImageProcessor(size={"height": 32, "width": 32}), tokenizer)


def save_clip(folder):
    """A one-to-one model with its processor, always the same; returns the folder as a string."""
    torch.manual_seed(0)
    VillaClipModel(VillaClipConfig(**VLM)).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


def save_mapping(folder):
    """The same for a mapping model of ATTRIBUTES in GROUPS."""
    torch.manual_seed(0)
    config = VillaMappingConfig(vlm_config=VLM, attributes=ATTRIBUTES, attribute_groups=GROUPS)
    model = VillaMappingModel(config)
    model.set_attribute_embeds(ATTRIBUTES, torch.randn(len(ATTRIBUTES), 32))
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


def shake(model):
    """No weight as it was initialised: zeros and ones hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return model.eval()
