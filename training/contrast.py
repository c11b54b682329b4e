"""The contrastive loss of Stages 0 and 2 with its options, over the batches of all processes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from arguments import TrainingArguments
from gather import gather_with_gradient
from modeling_villa.losses_villa import IDENTICAL_TEXTS, clip_contrastive_loss, contrastive_targets


@dataclass
class ContrastArguments(TrainingArguments):
    """What a stage with a contrastive loss needs besides."""

    label_smoothing: float = field(
        default=0.0, metadata={"help": "share of the target that all texts get alike; PyramidCLIP: 0.2"}
    )
    identical_texts: str = field(
        default="negatives",
        metadata={
            "help": "what a text is that equals one's own: negatives (the paper), ignored or positives",
            "choices": IDENTICAL_TEXTS,
        },
    )

    learn_temperature: bool = field(default=False, metadata={"help": "train tau too"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}.")


def contrastive_loss(
    visual: Tensor, texts: Tensor, text_ids: Tensor, logit_scale: Tensor, args: ContrastArguments
) -> Tensor:
    """Row i of `visual` against row i of `texts`, bidirectionally, every other row of any process a negative.

    Args:
        visual: (N, d) embeddings of images or regions, of any length; N may differ between processes.
        texts: (N, d), the same of their texts.
        text_ids: (N,) of `ids_of_texts`.
        logit_scale: 1 / tau.
    """
    visual, texts = (gather_with_gradient(normalize(embeds, dim=-1)) for embeds in (visual, texts))
    pairs = contrastive_targets(gather_with_gradient(text_ids), args.identical_texts)
    return clip_contrastive_loss(visual, texts, logit_scale, *pairs, args.label_smoothing)


def ids_of_texts(sentences: Sequence[str], weights: Tensor) -> Tensor:
    """Numbers of texts that are weighted means of sentences: equal, on any process, for equal ones.

    Args:
        sentences: S distinct sentences.
        weights: (N, S), float.

    Returns:
        (N,), integer.
    """
    keys = ([[sentences[column], row[column].item()] for column in row.nonzero()[:, 0]] for row in weights)
    digests = [hashlib.sha256(json.dumps(sorted(key)).encode()).digest() for key in keys]
    return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests], dtype=torch.long)
