"""Model cards: the template `model_card.md`, filled with what was trained on what and what it reaches."""

import json
import os
import shlex
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    constants,
    eval_result_entries_to_yaml,
)
from PIL import Image

from arguments import StageArguments

TEMPLATE = Path(__file__).resolve().parent.parent / "model_card.md"
# Where a run lies on its machine, and what only concerns the sending, is nobody's business.
PRIVATE = {"run_dir", "output_dir", "resume", "push_to_hub", "hub_private", "push_artifacts", "num_workers", "num_proc"}
SUMMARIES = {
    "stage0": "A one-to-one vision-language model: images against whole texts (the baseline CLIP-FT-Img).",
    "stage1": "A mapping model: it scores every region of an image against every attribute of a vocabulary.",
    "stage2": "A CLIP-style model trained on pairs of regions and attributes: it embeds images, regions and texts.",
}
CLIP_SNIPPET = """from transformers import pipeline

detect = pipeline("zero-shot-object-detection", model="{repo_id}", revision="{stage}", trust_remote_code=True)
detect("page.png", candidate_labels={labels}, boxes=[[0, 0, 28, 28]])  # boxes in pixels"""
MAPPING_SNIPPET = """from transformers import pipeline

map_regions = pipeline("region-attribute-mapping", model="{repo_id}", revision="{stage}", trust_remote_code=True)
map_regions("page.png", boxes=[[0, 0, 28, 28]], attributes={labels})  # boxes in pixels"""


@dataclass
class CardFacts:
    """What a card says.

    Args:
        args: the stage's arguments.
        stage: its name.
        repo_id: org/name on the Hub.
        metrics: flat keys and values from 0 to 100, as eval/ writes them.
        commands: that gave the metrics.
        attributes: some names of the vocabulary, for the examples.
        example: an image of the corpus, for the inference widget.
        picture: file of a picture of results.
    """

    args: StageArguments
    stage: str
    repo_id: str
    metrics: dict[str, float] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    example: Image.Image | None = None
    picture: Path | None = None


def write_card(folder: Path, facts: CardFacts) -> ModelCard:
    """Write `README.md` into a folder that is about to be sent, and beside it what it shows and `.eval_results/`."""
    args: Any = facts.args
    labels = facts.attributes[:4] or ["a", "b"]
    snippet = MAPPING_SNIPPET if facts.stage == "stage1" else CLIP_SNIPPET
    if facts.picture:
        shutil.copyfile(facts.picture, folder / "regions.png")
    if facts.example:
        facts.example.save(folder / "example.png")
    if facts.metrics and not Path(args.dataset).exists():
        write_eval_results(folder, facts)
    card = ModelCard.from_template(
        card_data(facts, labels),
        template_path=str(TEMPLATE),
        model_name=facts.repo_id.split("/")[-1],
        summary=SUMMARIES[facts.stage],
        labels=getattr(args, "supervision", "") == "labels",
        picture="regions.png" if facts.picture else None,
        snippet=snippet.format(repo_id=facts.repo_id, stage=facts.stage, labels=json.dumps(labels)),
        stage=facts.stage,
        dataset=public_name(args.dataset),
        dataset_kwargs=public_options(args.dataset_kwargs),
        start=f"`{base_model(facts)}`" if base_model(facts) else "scratch, or an earlier stage of the same run",
        config=yaml.safe_dump(config_of(args), sort_keys=False).strip(),
        rows=sorted(facts.metrics.items()),
        commands=[public_command(command) for command in facts.commands],
    )
    card.save(folder / "README.md")
    return card


def card_data(facts: CardFacts, labels: list[str]) -> ModelCardData:
    """The front matter."""
    args: Any = facts.args
    task = "zero-shot-object-detection" if facts.stage == "stage1" else "zero-shot-image-classification"
    example = f"{constants.ENDPOINT}/{facts.repo_id}/resolve/main/example.png"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=public_name(args.dataset),
            dataset_name=public_name(args.dataset),
            dataset_split="test",
            metric_type=key.split("/")[-1],
            metric_name=key,
            metric_value=round(value, 2),
        )
        for key, value in sorted(facts.metrics.items())
    ]
    return ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=task,
        tags=["villa", "vision-language", "region-attribute-mapping", facts.stage],
        base_model=base_model(facts),
        datasets=[args.dataset] if "/" in args.dataset and not Path(args.dataset).exists() else None,
        metrics=sorted({key.split("/")[-1] for key in facts.metrics}) or None,
        model_name=facts.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
        widget=[{"src": example, "candidate_labels": ", ".join(labels), "example_title": "A test image"}]
        if facts.example
        else None,
    )


def write_eval_results(folder: Path, facts: CardFacts) -> None:
    """`.eval_results/villa.yaml`, from which the Hub makes leaderboards.

    docmnist, which is no repository, is named as the one that datasets_scripts/push_docmnist.py makes beside the model.
    """
    dataset = facts.args.dataset
    entries = [
        EvalResultEntry(
            dataset_id=dataset if "/" in dataset else f"{facts.repo_id.split('/')[0]}/{dataset}",
            task_id=key.replace("/", "_").replace("@", "_at_"),
            value=round(value, 2),
            notes="; ".join(map(public_command, facts.commands)) or None,
        )
        for key, value in sorted(facts.metrics.items())
    ]
    (folder / ".eval_results").mkdir(exist_ok=True)
    (folder / ".eval_results" / "villa.yaml").write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries)))


def base_model(facts: CardFacts) -> str | None:
    """The model on the Hub that training started from, if that is what `--vlm` names."""
    vlm = getattr(facts.args, "vlm", None)
    return vlm.split("@")[0] if vlm and not Path(vlm).exists() and vlm.count("/") == 1 else None


def config_of(args: StageArguments) -> dict[str, Any]:
    """The arguments that a stranger can use, without this machine's folders."""
    values = {key: value for key, value in asdict(args).items() if key not in PRIVATE and value is not None}
    values["dataset"], values["dataset_kwargs"] = public_name(args.dataset), public_options(args.dataset_kwargs)
    for key in ("vlm", "mapping_model", "region_store", "pairs"):
        if key in values:
            values[key] = public_name(values[key])
    return values


def public_name(name: str) -> str:
    """A Hub id as it is; of a path its last part."""
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) else name


def public_command(command: str) -> str:
    """A command without this machine's folders: of an absolute path its last two parts."""
    words = []
    for word in shlex.split(command):
        name, equals, value = word.rpartition("=")
        if word.startswith("{"):
            words.append(public_options(word))
        else:
            words.append(name + equals + ("/".join(Path(value).parts[-2:]) if value.startswith("/") else value))
    return shlex.join(words)


def public_options(options: str) -> str:
    """The JSON of a dataset's options with folders cut to their last part."""
    return json.dumps(_public(json.loads(options)))


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value
