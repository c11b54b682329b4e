"""Folders with tiny towers and tokenizers, as timm, transformers and sentence-transformers save them."""

import json

import timm
from timm.models import save_for_hf
from tiny_models import shake
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

WORDS = ["red", "blue", "round", "thing", "a", "photo", "of", "the", "in", "it"]
TEXTS = ["a photo of the red thing", "blue", "the round thing in it of a red photo"]
ENCODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
}
ENCODERS = {"bert": BertConfig, "mpnet": MPNetConfig, "roberta": RobertaConfig}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def tokenizer(start, pad, end, size=40, **settings):
    """Words as tokens, between a start and an end token of the ids given, in a vocabulary of `size`."""
    special = {start: "<start>", pad: "<pad>", end: "<end>"}
    words = iter([*WORDS, "<unk>", *(f"unused{i}" for i in range(size))])
    vocabulary = {special.get(i) or next(words): i for i in range(size)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=special[pad], unk_token="<unk>", **settings)


def encoder_folder(folder, kind, pooling=None, modules=("Transformer", "Pooling", "Normalize")):
    """An encoder and its tokenizer; with `pooling` as sentence-transformers lays them out. Returns the encoder."""
    config = ENCODERS[kind](**ENCODER)
    encoder = shake(AutoModel.from_config(config))
    encoder.save_pretrained(folder)
    pad = config.pad_token_id
    tokenizer(start=3 if pad == 0 else 0, pad=pad, end=2).save_pretrained(folder)
    if pooling:
        listed = [{"idx": i, "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(modules)]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{name}": name == pooling for name in ("cls_token", "mean_tokens", "max_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    return encoder


def clip_folder(folder, legacy=True, activation="quick_gelu", width=24):
    """A CLIPModel with its tokenizer. `legacy`: with the placeholder ids of transformers' older CLIP files."""
    ids = (0, 2, 1) if legacy else (38, 39, 39)
    shared = {"hidden_act": activation, "projection_dim": width}
    text = {**ENCODER, **shared, **dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids, strict=True))}
    vision = {**shared, "image_size": 32, "patch_size": 16, "hidden_size": 48, "intermediate_size": 96}
    vision |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    model = shake(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)))
    model.save_pretrained(folder)
    tokenizer(38, 39, 39, model_max_length=20).save_pretrained(folder)
    return model


def timm_folder(folder, name, classes, kwargs):
    """A timm model with its configuration, as timm saves it for the Hub."""
    model = shake(timm.create_model(name, num_classes=classes, **kwargs))
    save_for_hf(model, folder, model_args=kwargs, safe_serialization=True)
    return model
