"""A text tower from any encoder of transformers: mean pooling and a projection, for SBERT's and ConVIRT's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_villa import VillaTextConfig


@dataclass
class VillaTextOutput(ModelOutput):
    """
    Args:
        text_embeds: (T, d) embeddings of texts, not normalised.
        last_hidden_state: (T, L, C) the encoder's tokens.
    """

    text_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None


class VillaTextModel(PreTrainedModel):
    """Encoder, pooling, projection; called as CLIP's text tower is.

    With mean pooling and without projection it is a Sentence-BERT (Reimers and Gurevych, 2019, section 3); with an
    MLP it is the text tower of ConVIRT (Zhang et al., 2020, section 2.2).
    """

    config_class = VillaTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    # The encoder chooses for itself: not every one has it.
    _supports_sdpa = True

    def __init__(self, config: VillaTextConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        pooler = getattr(self.encoder, "pooler", None)
        if config.pooling == "pooler" and pooler is None:
            raise ValueError(f'{type(self.encoder).__name__} has no pooler: pooling must be "mean".')
        if config.pooling == "mean" and pooler is not None:
            self.encoder.pooler = None  # parameters without gradients stop distributed training
        width, hidden, dim = config.encoder_config.hidden_size, config.projector_width, config.projection_dim or 0
        self.projection: nn.Module = nn.Identity()
        if config.projection and not hidden:
            self.projection = nn.Linear(width, dim)
        elif config.projection:
            self.projection = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The encoder initialises itself."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> VillaTextOutput:
        """
        Args:
            input_ids: (T, L) token ids.
            attention_mask: (T, L), 1 for tokens, 0 for padding; None if every token is real.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        tokens = output.last_hidden_state
        if self.config.pooling == "pooler":
            pooled = output.pooler_output
        else:
            weights = attention_mask[..., None].to(tokens.dtype)
            pooled = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
        return VillaTextOutput(text_embeds=self.projection(pooled), last_hidden_state=tokens)
