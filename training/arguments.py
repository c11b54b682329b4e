"""Arguments that stages share, and how they are read: one YAML for all stages, then the command line."""

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import yaml
from transformers import HfArgumentParser

SECTIONS = ("stage0", "embed_regions", "stage1", "map_regions", "stage2")


@dataclass
class StageArguments:
    """What every stage needs: where it writes and what it reads."""

    stage: ClassVar[str]

    run_dir: str = field(default="runs/run", metadata={"help": "folder of the whole run; stages find each other in it"})
    output_dir: str | None = field(default=None, metadata={"help": "folder of this stage; default RUN_DIR/STAGE"})
    seed: int = field(default=0, metadata={"help": "of weights, order and augmentation"})
    resume: bool = field(
        default=True,
        metadata={"help": "go on from the newest checkpoint; --no_resume starts this stage anew"},
    )

    dataset: str = field(default="docmnist", metadata={"help": "name for load_dataset, or a save_to_disk folder"})
    dataset_kwargs: str = field(default="{}", metadata={"help": "JSON: further arguments of load_dataset"})
    strict: bool = field(default=False, metadata={"help": "stop at a corrupt image instead of skipping it"})
    num_proc: int | None = field(default=None, metadata={"help": "processes that generate and check the dataset"})
    num_workers: int = field(default=0, metadata={"help": "processes that load batches"})

    push_to_hub: bool = field(
        default=False, metadata={"help": "send checkpoints to the branch of their stage, finished models to main too"}
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "repository on the Hub, org/name"})
    hub_private: bool = field(default=True, metadata={"help": "a repository that is made is private"})
    push_artifacts: bool = field(
        default=False, metadata={"help": "send region store and pairs to HUB_MODEL_ID-regions and -pairs as datasets"}
    )

    def __post_init__(self) -> None:
        if (self.push_to_hub or self.push_artifacts) and (self.hub_model_id or "").count("/") != 1:
            raise ValueError("--push_to_hub and --push_artifacts need --hub_model_id org/name.")
        try:
            options = json.loads(self.dataset_kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(f"dataset_kwargs must be a JSON object, got {self.dataset_kwargs!r}: {error}.") from None
        if not isinstance(options, dict):
            raise ValueError(f"dataset_kwargs must be a JSON object, got {self.dataset_kwargs!r}.")
        if "token" in options:
            raise ValueError("dataset_kwargs is written into artifacts and must hold no token; use HF_TOKEN instead.")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {self.num_workers}.")

    def folder(self, stage: str) -> Path:
        """Where another stage of this run keeps its artifact."""
        return Path(self.run_dir) / stage


@dataclass
class TrainingArguments(StageArguments):
    """What every training stage needs besides: the loop."""

    num_epochs: float = field(default=10, metadata={"help": "passes over the data; may be a fraction, or 0 for none"})
    max_steps: int | None = field(default=None, metadata={"help": "stop after so many updates instead of epochs"})
    batch_size: int = field(default=64, metadata={"help": "images per process and backward pass"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "backward passes per update"})
    learning_rate: float = field(default=1e-3, metadata={"help": "AdamW's peak learning rate"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay"})
    warmup_ratio: float = field(default=0.1, metadata={"help": "share of the updates with a rising learning rate"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16", "choices": ["no", "bf16", "fp16"]})

    save_steps: int = field(default=500, metadata={"help": "updates between checkpoints"})
    keep_last: int = field(default=2, metadata={"help": "checkpoints that are kept"})
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "epochs without a lower validation loss before stopping; the best weights win; 0: off"},
    )
    tracker: str | None = field(default=None, metadata={"help": "tensorboard, trackio, ..."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_epochs >= 0:
            raise ValueError(f"num_epochs must not be negative, got {self.num_epochs}.")
        for name in ("batch_size", "gradient_accumulation_steps", "save_steps", "keep_last"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}.")
        if self.early_stopping_patience < 0 or self.weight_decay < 0:
            raise ValueError("early_stopping_patience and weight_decay must not be negative.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}.")


Arguments = TypeVar("Arguments", bound=StageArguments)


def read_arguments(cls: type[Arguments], section: str, argv: Sequence[str] | None = None) -> Arguments:
    """Read `--config X.yaml` (what stands at its top, then its section), then the other options, which win.

    Of several `--config` the later ones win.

    Raises:
        ValueError: the file is missing or no mapping, or a field in it is unknown (with the nearest ones).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(cast(Any, cls), allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="append",
        help="YAML with fields of all stages at the top and a section per stage; of several the later ones win",
    )
    values = [word for path in _config_paths(argv) for word in from_yaml(cls, section, path)]
    (arguments, _) = parser.parse_args_into_dataclasses([*values, *argv])
    return arguments


def from_yaml(cls: type[StageArguments], section: str, path: str) -> list[str]:
    """The YAML's values for one stage, as command-line words, so that they are checked like those."""
    config = read_config(path)
    own = config.get(section) or {}
    if not isinstance(own, dict):
        raise ValueError(f"{path}: section {section!r} must be a mapping of fields, got {own!r}.")
    shared = {key: value for key, value in config.items() if key not in SECTIONS}
    known = {entry.name for entry in fields(cls)}
    if unknown := sorted(set(own) - known):
        near = difflib.get_close_matches(unknown[0], known, 3)
        raise ValueError(f"{path}: section {section!r} has unknown fields {unknown}; nearest to the first: {near}.")
    words: list[str] = []
    for key, value in {**{k: v for k, v in shared.items() if k in known}, **own}.items():
        words += as_words(key, value)
    return words


def as_words(key: str, value: Any) -> list[str]:
    """One field as command-line words: mappings become JSON, null is left out."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    return [f"--{key}", str(value)]


def read_config(path: str) -> dict[str, Any]:
    """The YAML as a dictionary.

    Raises:
        ValueError: the file is missing, is no mapping, or has a top-level entry that no stage knows.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"--config {path}: there is no such file; the configs that come along are in training/configs."
        )
    config = yaml.safe_load(Path(path).read_text())
    if not isinstance(config, dict):
        raise ValueError(f"--config {path}: expected a mapping of fields and sections, got {type(config).__name__}.")
    shared = {entry.name for entry in fields(TrainingArguments)}
    if unknown := sorted(set(config) - shared - set(SECTIONS)):
        near = difflib.get_close_matches(unknown[0], [*shared, *SECTIONS], 3)
        raise ValueError(f"--config {path}: unknown fields {unknown} at the top; nearest to the first: {near}.")
    return config


def _config_paths(argv: list[str]) -> list[str]:
    paths = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--config="):
            paths.append(word.removeprefix("--config="))
        elif word == "--config" and following:
            paths.append(following)
    return paths
