"""Text -> region and region -> text retrieval with a VLM: the rows of the paper's table 3.

    python eval/retrieval.py --models clip_ft_img=runs/x/stage0/model villa=runs/x/stage2/model \
        --dataset docmnist --dataset_kwargs '{"complexity": 29.4}' --output runs/x/retrieval.json

Queries are the vocabulary's prompt templates, averaged per attribute; candidates are the split's regions.
"""

import time
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch import Tensor

from datasets_scripts.schema import attribute_names, attribute_prompts
from modeling_villa import VillaClipModel, VillaProcessor
from modeling_villa.metrics_villa import region_to_text_retrieval, text_to_region_retrieval
from report import EvaluationArguments, batches, load_model, read_arguments, write_metrics


@dataclass
class RetrievalArguments(EvaluationArguments):
    """Which models, on which split."""

    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "VillaClipModels, each FOLDER_OR_HUB_ID or NAME=FOLDER_OR_HUB_ID; NAME/ goes before its keys"
        },
    )


@torch.no_grad()
def score_regions(
    model: VillaClipModel, processor: VillaProcessor, dataset: Dataset, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Cosines of all N regions of a split with the A attributes' queries, and which of them are true.

    Returns:
        (N, A) float and (N, A) bool, on the CPU.
    """
    prompts = attribute_prompts(dataset)
    queries = model.embed_prompts([prompts[name] for name in attribute_names(dataset)], processor.tokenizer)
    scores, relevance = [], []
    for batch in batches(dataset, processor, batch_size, model.device):
        mask = batch["region_mask"]
        embeds = model.get_region_features(batch["pixel_values"], batch["boxes"], mask)
        scores.append((embeds[mask] @ queries.t()).float().cpu())
        relevance.append(batch["true_labels"][mask].cpu())
    return torch.cat(scores), torch.cat(relevance)


def retrieval_metrics(scores: Tensor, relevance: Tensor) -> dict[str, float]:
    """Flat keys, values 0 to 100."""
    directions = {
        "text_to_region": text_to_region_retrieval(scores, relevance),
        "region_to_text": region_to_text_retrieval(scores, relevance),
    }
    return {f"{name}/{key}": value for name, values in directions.items() for key, value in values.items()}


def main(args: RetrievalArguments) -> dict[str, float]:
    """Evaluate each model and write the metrics."""
    start = time.time()
    if not args.models:
        raise ValueError("--models names no model; give at least one folder or Hub id.")
    dataset = args.load()
    metrics: dict[str, float] = {}
    for entry in args.models:
        name, _, path = entry.rpartition("=")
        model, processor = load_model(VillaClipModel, path), VillaProcessor.from_pretrained(path)
        model.check_processor(processor)
        scores, relevance = score_regions(model, processor, dataset, args.batch_size)
        prefix = f"{name}/" if name else ""
        metrics |= {prefix + key: value for key, value in retrieval_metrics(scores, relevance).items()}
    write_metrics(args, metrics, start)
    return metrics


if __name__ == "__main__":
    main(read_arguments(RetrievalArguments))
