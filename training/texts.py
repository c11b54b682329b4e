"""Texts for training: a tokenizer made from the corpus, and which sentences describe which region."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from modeling_villa import VillaClipModel

SPECIAL_TOKENS = ("<pad>", "<unk>", "<start>", "<end>")


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE tokenizer of a corpus, with a start and an end token as CLIP's text tower wants.

    Args:
        vocab_size: tokens at most.
        max_length: tokens to which a text is cut, start and end included.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    start, end = tokenizer.token_to_id("<start>"), tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    pad, unknown, start_token, end_token = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        bos_token=start_token,
        eos_token=end_token,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


class RegionTexts:
    """Which sentences describe a region, given its attributes.

    With `source="sentences"` (the paper's code) an attribute is described by the sentence of the image's own text
    that states it, and by its prompts where there is none; with `source="prompts"` by its prompts. A region's
    embedding is the mean over its attributes of the mean over their sentences.

    Args:
        prompts: per attribute its prompt sentences.
        source: "sentences" or "prompts".
    """

    def __init__(self, prompts: Sequence[Sequence[str]], source: str) -> None:
        if source not in ("sentences", "prompts"):
            raise ValueError(f'region_text must be "sentences" or "prompts", got {source!r}.')
        self.prompts = prompts
        self.source = source

    def of_attribute(self, example: dict[str, Any], attribute: int) -> Sequence[str]:
        """The sentences that describe one attribute in one image."""
        if self.source == "sentences" and attribute in example["attributes"]:
            sentence = example["attribute_sentences"][example["attributes"].index(attribute)]
            if sentence >= 0:
                return [example["sentences"][sentence]]
        return self.prompts[attribute]

    def __call__(
        self, examples: list[dict[str, Any]], pairs: list[list[list[int]]]
    ) -> tuple[list[str], Tensor, Tensor]:
        """Texts of the regions of a batch.

        Args:
            examples: B examples of the schema.
            pairs: per image and region its attributes.

        Returns:
            The S distinct sentences of the batch; (N, S) weights that average them to the texts of the N
            regions with at least one attribute; (N, 2) those regions' image and region index.
        """
        rows: list[dict[int, float]] = []
        where: list[tuple[int, int]] = []
        numbers: dict[str, int] = {}
        for image, (example, regions) in enumerate(zip(examples, pairs, strict=True)):
            for region, attributes in enumerate(regions):
                if not attributes:
                    continue
                weights: dict[int, float] = {}
                for attribute in attributes:
                    sentences = self.of_attribute(example, attribute)
                    for sentence in sentences:
                        number = numbers.setdefault(sentence, len(numbers))
                        weights[number] = weights.get(number, 0.0) + 1 / (len(attributes) * len(sentences))
                rows.append(weights)
                where.append((image, region))
        matrix = torch.zeros(len(rows), len(numbers))
        for row, weights in zip(matrix, rows, strict=True):
            row[list(weights)] = torch.tensor(list(weights.values()))
        return list(numbers), matrix, torch.tensor(where, dtype=torch.long).view(-1, 2)


class FrozenTexts:
    """Embeddings of a frozen text tower, each distinct text embedded once.

    Args:
        model: the VLM.
        tokenizer: its tokenizer.
        texts: all texts that will be asked for; repeats cost nothing.
    """

    def __init__(self, model: VillaClipModel, tokenizer: Any, texts: Iterable[str], batch_size: int = 256) -> None:
        distinct = sorted(set(texts))
        self.rows = {text: row for row, text in enumerate(distinct)}
        chunks = []
        with torch.no_grad():
            for start in range(0, len(distinct), batch_size):
                tokens = tokenize(tokenizer, distinct[start : start + batch_size]).to(model.device)
                chunks.append(model.get_text_features(**tokens))
        self.embeds = torch.cat(chunks)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(T, d) normalised embeddings."""
        return self.embeds[[self.rows[text] for text in texts]]


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Token ids and attention mask, (T, L) each, cut to what the text tower takes."""
    return tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
