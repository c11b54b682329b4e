"""Quality of the region-attribute mapping: the rows of the paper's table 5.

    python eval/mapping.py --mapping_model runs/x/stage1/model --vlm runs/x/stage0/model --epsilon 0.5 \
        --dataset docmnist --dataset_kwargs '{"complexity": 29.4}' --output runs/x/mapping.json

Three mappings of the attributes that an image's text states to its regions: `mapping/` the mapping model's,
`vlm_zs/mapping/` by the VLM's cosines of regions and prompts, assigned by the same rule, and `random/mapping/`, where
each candidate pair is kept with probability 1/2 (which is what the paper's 27.4 for DocMNIST comes from).
"""

import time
from dataclasses import dataclass, field

import torch

from datasets_scripts.schema import attribute_names, attribute_prompts
from modeling_villa import VillaClipModel, VillaMappingModel, VillaProcessor
from modeling_villa.assignment_villa import assign_attributes
from modeling_villa.metrics_villa import mapping_scores
from report import EvaluationArguments, batches, load_model, read_arguments, write_metrics


@dataclass
class MappingArguments(EvaluationArguments):
    """Which models, and the rule of the assignment."""

    mapping_model: str = field(default="", metadata={"help": "folder or Hub id of a VillaMappingModel"})
    vlm: str | None = field(default=None, metadata={"help": "folder or Hub id of a VillaClipModel, for vlm_zs"})
    epsilon: float = field(default=0.2, metadata={"help": "regions within epsilon of the best cosine are assigned"})
    mode: str = field(
        default="attributes_to_regions",
        metadata={"help": "or the inverted one", "choices": ["attributes_to_regions", "regions_to_attributes"]},
    )
    exclusive_groups: bool = field(
        default=True, metadata={"help": "a region keeps one attribute of each of the vocabulary's groups"}
    )


def check_same_inputs(processor: VillaProcessor, other: VillaProcessor) -> None:
    """The mapping model and the VLM see the same pixels and tokens.

    Raises:
        ValueError: their image processors or tokenizers differ.
    """
    images = processor.image_processor.to_dict() == other.image_processor.to_dict()
    if not images or processor.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        what = "tokenizers" if images else "image processors"
        raise ValueError(f"--mapping_model and --vlm have different {what}: compare models of one run.")


@torch.no_grad()
def main(args: MappingArguments) -> dict[str, float]:
    """Evaluate the mappings and write the metrics."""
    start = time.time()
    if not args.mapping_model:
        raise ValueError("--mapping_model names no model; give a folder or a Hub id.")
    dataset = args.load()
    names, prompts = attribute_names(dataset), attribute_prompts(dataset)
    model = load_model(VillaMappingModel, args.mapping_model)
    if model.config.attributes != names:
        raise ValueError(f"{args.mapping_model} maps {model.config.attributes}, the dataset has {names}.")
    processor = VillaProcessor.from_pretrained(args.mapping_model)
    model.vlm.check_processor(processor)
    vlm = load_model(VillaClipModel, args.vlm) if args.vlm else None
    if args.vlm:
        check_same_inputs(processor, VillaProcessor.from_pretrained(args.vlm))
    vlm_queries = torch.empty(0)
    if vlm is not None:
        vlm_queries = vlm.embed_prompts([prompts[name] for name in names], processor.tokenizer)
    groups = torch.tensor(model.config.group_ids, device=model.device) if args.exclusive_groups else None
    coin = torch.Generator().manual_seed(args.seed)
    true: list[torch.Tensor] = []
    predicted: dict[str, list[torch.Tensor]] = {"": [], "random/": [], **({"vlm_zs/": []} if vlm else {})}
    for batch in batches(dataset, processor, args.batch_size, model.device):
        inputs = batch["pixel_values"], batch["boxes"], batch["region_mask"]
        mask, labels = batch["region_mask"], batch["labels"]
        scores = {"": model(*inputs).scores}
        if vlm is not None:
            scores["vlm_zs/"] = vlm.get_region_features(*inputs) @ vlm_queries.t()
        for name, values in scores.items():
            assigned = assign_attributes(values, mask, labels, args.epsilon, args.mode, groups=groups)
            predicted[name].append(assigned[mask].cpu())
        candidates = labels[:, None].expand(-1, mask.shape[1], -1)[mask].cpu()
        predicted["random/"].append(candidates & (torch.rand(candidates.shape, generator=coin) < 0.5))
        true.append(batch["true_labels"][mask].cpu())
    metrics = {
        f"{name}mapping/{key}": value
        for name, rows in predicted.items()
        for key, value in mapping_scores(torch.cat(rows), torch.cat(true)).items()
    }
    write_metrics(args, metrics, start)
    return metrics


if __name__ == "__main__":
    main(read_arguments(MappingArguments))
