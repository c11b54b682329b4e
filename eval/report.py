"""What evaluations do alike: read a split, score its regions, write `metrics.json`."""

import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from datasets_scripts.loading import Collator, load_split, region_labels
from datasets_scripts.schema import attribute_names
from modeling_villa import VillaProcessor

LIBRARIES = ("modeling-villa", "torch", "torchvision", "transformers", "datasets", "accelerate", "timm")


@dataclass
class EvaluationArguments:
    """What every evaluation needs."""

    dataset: str = field(default="docmnist", metadata={"help": "name for load_dataset, or a save_to_disk folder"})
    dataset_kwargs: str = field(default="{}", metadata={"help": "JSON: further arguments of load_dataset"})
    split: str = field(default="test", metadata={"help": "split that is evaluated"})
    strict: bool = field(default=False, metadata={"help": "stop at a corrupt image instead of skipping it"})
    output: str = field(default="metrics.json", metadata={"help": "file that the metrics are written to"})
    batch_size: int = field(default=64, metadata={"help": "images at a time"})
    seed: int = field(default=0, metadata={"help": "of what is random in the evaluation"})

    def load(self) -> Dataset:
        """The checked split.

        Raises:
            ValueError: it lacks the true pairs that every metric needs.
        """
        dataset = load_split(self.dataset, json.loads(self.dataset_kwargs), self.split, self.strict)
        if "region_attributes" not in dataset.column_names:
            raise ValueError(f"{self.dataset} has no column 'region_attributes', the true pairs: nothing to measure.")
        return dataset


def read_arguments(cls: Any) -> Any:
    """An evaluation's arguments, from the command line."""
    return HfArgumentParser(cls, allow_abbrev=False).parse_args_into_dataclasses()[0]


def load_model(cls: Any, path: str) -> Any:
    """A model from a folder or the Hub, on this machine's device, for evaluation."""
    return cls.from_pretrained(path).to(device()).eval()


def batches(dataset: Dataset, processor: VillaProcessor, batch_size: int, device: torch.device) -> Any:
    """Batches of a split on the device, with `true_labels` (B, R, A) bool, the true pairs."""
    size = len(attribute_names(dataset))
    loader: Any = DataLoader(dataset, batch_size=batch_size, collate_fn=Collator(processor, size))
    for batch in tqdm(loader, desc="evaluating", mininterval=5):
        batch["true_labels"] = region_labels(batch["region_attributes"], batch["boxes"].shape[1], size)
        yield {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def device() -> torch.device:
    """The accelerator of this machine, or its CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def commit() -> str | None:
    """The commit of this checkout, with `+` where files differ from it; None outside of git."""
    if not shutil.which("git"):
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or None


def provenance(args: Any, start: float) -> dict[str, Any]:
    """What is needed to make a result again: arguments, commit, command, versions; and how long it took."""
    versions = {library: version(library) for library in LIBRARIES}
    return {
        **asdict(args),
        "commit": commit(),
        "command": shlex.join(["python", f"eval/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **versions},
        "seconds": round(time.time() - start, 1),
    }


def write_aside(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    aside.replace(path)


def write_metrics(args: EvaluationArguments, metrics: dict[str, float], start: float) -> None:
    """Write the metrics, flat, and under `run` what is needed to make them again."""
    rounded = {key: round(value, 2) for key, value in metrics.items()}
    write_aside(Path(args.output), json.dumps({**rounded, "run": provenance(args, start)}, indent=2) + "\n")
    for key, value in metrics.items():
        sys.stdout.write(f"{key:50s} {value:6.2f}\n")
