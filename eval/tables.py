"""What the tables do alike: train what is missing of each method and seed, and write Markdown, JSON and a plot."""

import json
import logging
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib import pyplot as plt

from report import provenance, write_aside

logger = logging.getLogger(__name__)
mpl.use("Agg")

TRAINING = Path(__file__).resolve().parent.parent / "training"
METHODS = TRAINING / "configs" / "methods"
Metrics = dict[str, float]
TRAINED = ("stage0", "stage1", "stage2")
# What each stage reads: option -> the stage that makes it.
INPUTS: dict[str, dict[str, str]] = {
    "stage0": {},
    "embed_regions": {"vlm": "stage0"},
    "stage1": {"vlm": "stage0", "region_store": "embed_regions"},
    "map_regions": {"vlm": "stage0", "mapping_model": "stage1"},
    "stage2": {"vlm": "stage0", "mapping_model": "stage1", "pairs": "map_regions"},
}


@dataclass
class TableArguments:
    """Which corpus, methods and seeds."""

    config: list[str] = field(
        default_factory=list,
        metadata={"help": "YAML of a run; of several the later ones win", "action": "extend"},
    )
    dataset_kwargs: str | None = field(
        default=None, metadata={"help": "JSON: further arguments of load_dataset; default the config's"}
    )
    run_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder of the runs; default the config's. In it the config's seed is training/pipeline.py's run"
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "each trains every method anew"})
    launcher: str | None = field(
        default=None,
        metadata={
            "help": "what starts a training script, such as 'accelerate launch --num_processes 8'; default Python"
        },
    )
    output: str = field(
        default="", metadata={"help": "name of the .md, .json and .png, without ending; default in run_dir"}
    )

    def __post_init__(self) -> None:
        if not self.config:
            raise ValueError("--config names no YAML of a run; those that come along are in training/configs.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be distinct numbers, at least one; got {self.seeds}.")
        try:
            found = json.loads(self.dataset_kwargs or "{}")
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"dataset_kwargs must be a JSON object, got {self.dataset_kwargs!r}.")


class Runs:
    """The runs of a table: a folder per seed, in it the stages that methods share and a folder per method.

    Args:
        args: which config.
        folder: under the run's folder, for a table of several corpora.
        **dataset_kwargs: arguments of `load_dataset` that take the place of the config's.

    Raises:
        ValueError: a config is missing or no mapping.
    """

    def __init__(self, args: TableArguments, folder: str = "", **dataset_kwargs: Any) -> None:
        self.args = args
        self.values = merged(args.config)
        options = json.loads(args.dataset_kwargs) if args.dataset_kwargs else self.values.get("dataset_kwargs", {})
        self.corpus = {
            "dataset": self.values.get("dataset", "docmnist"),
            "dataset_kwargs": json.dumps({**options, **dataset_kwargs}),
            "strict": bool(self.values.get("strict", False)),
        }
        self.root = Path(args.run_dir or self.values.get("run_dir", "runs/run")) / folder
        # Stage's folder -> how long its commands took in all, as far as they were a table's.
        self.seconds: dict[str, float | None] = {}

    def folder(self, seed: int) -> Path:
        """The config's own seed stands where training/pipeline.py puts it, so that its runs are found."""
        return self.root if seed == self.values.get("seed", 0) else self.root / f"seed{seed}"

    def train(self, method: str, seed: int) -> dict[str, Path]:
        """Run the stages of a method that are not finished; returns the folder of each.

        A stage that the method's config leaves as it is, and those before it too, is the run's own, and shared with
        other methods.

        Raises:
            ValueError: there is no such method.
            RuntimeError: a stage failed; what it said stands above.
        """
        config, run_dir = method_config(method), self.folder(seed)
        values, own = merged([*self.args.config, str(config)]), False
        folders: dict[str, Path] = {}
        for stage, changes in yaml.safe_load(config.read_text()).items():
            if stage == "embed_regions" and (values.get("stage1") or {}).get("encoder", "frozen") != "frozen":
                continue
            own = own or bool(changes)
            words = [f"--config={path}" for path in (*self.args.config, *([config] if own else []))]
            words += [f"--run_dir={run_dir}", f"--seed={seed}"]
            words += [f"--{key}={value}" for key, value in self.corpus.items()]
            for option, maker in INPUTS[stage].items():
                if maker in folders and option not in (values[stage] or {}):
                    words.append(f"--{option}={folders[maker] / ('model' if maker in TRAINED else '')}")
            folders[stage] = run_dir / method / stage if own else run_dir / stage
            words.append(f"--output_dir={folders[stage]}")
            if str(folders[stage]) not in self.seconds:
                self.seconds[str(folders[stage])] = self._run(stage, words, folders[stage])
        return folders

    def section(self, stage: str) -> dict[str, Any]:
        """What the config says of one stage."""
        return self.values.get(stage) or {}

    def _run(self, stage: str, words: list[str], folder: Path) -> float | None:
        command = [
            *shlex.split(self.args.launcher or shlex.quote(sys.executable)),
            str(TRAINING / f"{stage}.py"),
            *words,
        ]
        finished = any((folder / name / "villa_artifact.json").is_file() for name in ("", "model"))
        kept = folder / "seconds.txt"
        before = float(kept.read_text()) if kept.is_file() else None
        logger.info("%s", shlex.join(command))
        began = time.monotonic()
        try:
            if subprocess.run(command).returncode:
                raise RuntimeError(f"{stage} failed, see above; the same command, given again, goes on from there.")
        finally:
            seconds = round((before or 0) + time.monotonic() - began, 1)
            if not finished and folder.is_dir():
                kept.write_text(f"{seconds}\n")
        return before if finished else seconds


def merged(paths: Iterable[str]) -> dict[str, Any]:
    """Configs, section by section, the later ones over the earlier ones.

    Raises:
        ValueError: a file is missing or no mapping.
    """
    values: dict[str, Any] = {}
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"--config {path}: there is no such file.")
        found = yaml.safe_load(Path(path).read_text())
        if not isinstance(found, dict):
            raise ValueError(f"--config {path}: expected a mapping, got {type(found).__name__}.")
        for key, value in found.items():
            if value is None:  # a section without fields
                values.setdefault(key, None)
                continue
            both = isinstance(value, dict) and isinstance(values.get(key), dict) and key != "dataset_kwargs"
            values[key] = {**values[key], **value} if both else value
    return values


def method_config(method: str) -> Path:
    """The YAML that says how a method's stages differ from the run's.

    Raises:
        ValueError: there is no such method.
    """
    path = METHODS / f"{method}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in METHODS.glob("*.yaml")))
        raise ValueError(f"There is no method {method!r}; there are {known}. One more is one more YAML in {METHODS}.")
    return path


def summarise(found: Mapping[str, list[Metrics]]) -> dict[str, dict[str, list[float]]]:
    """Row -> metric -> mean over the seeds and, with several seeds, their standard deviation."""
    summary: dict[str, dict[str, list[float]]] = {}
    for row, per_seed in found.items():
        for key in per_seed[0]:
            values = [metrics[key] for metrics in per_seed]
            deviation = [statistics.stdev(values)] if len(values) > 1 else []
            summary.setdefault(row, {})[key] = [statistics.mean(values), *deviation]
    return summary


def markdown(summary: Mapping[str, Mapping[str, list[float]]], titles: Mapping[str, str], corner: str) -> str:
    """The table's rows under the columns' titles (metric -> title)."""
    lines = [f"| {corner} | " + " | ".join(titles.values()) + " |", "|---" * (1 + len(titles)) + "|"]
    for row, metrics in summary.items():
        cells = [" ± ".join(f"{number:.1f}" for number in metrics[key]) for key in titles]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(
    path: Path,
    text: str,
    found: Mapping[str, list[Metrics]],
    args: TableArguments,
    seconds: Mapping[str, float | None],
    start: float,
) -> None:
    """Write the Markdown and, beside it, each seed's metrics with what made them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run = {**provenance(args, start), "seconds_of_stages": dict(seconds)}
    rounded = {
        row: [{key: round(value, 2) for key, value in one.items()} for one in rows] for row, rows in found.items()
    }
    write_aside(path.with_suffix(".json"), json.dumps({**rounded, "run": run}, indent=2) + "\n")
    write_aside(path.with_suffix(".md"), text)
    sys.stdout.write(f"\n{text}\n{path}.md, .json, .png; {time.time() - start:.0f} s\n")


def publish(name: str, found: Mapping[str, list[Metrics]], titles: Mapping[str, str], runs: Runs, start: float) -> None:
    """Write a table of the paper, and draw it."""
    summary, path = summarise(found), Path(runs.args.output or runs.root / name)
    write(path, markdown(summary, titles, name), found, runs.args, runs.seconds, start)
    draw_bars(path, summary, titles, "%")


def draw_bars(
    path: Path, summary: Mapping[str, Mapping[str, list[float]]], titles: Mapping[str, str], ylabel: str
) -> None:
    """A group of bars per row, one bar per metric, the standard deviation on top."""
    figure, axis = plt.subplots(figsize=(2 + 1.3 * len(summary), 3.6), layout="constrained")
    width = 0.8 / len(titles)
    for i, (key, title) in enumerate(titles.items()):
        cells = [metrics[key] for metrics in summary.values()]
        places = [row + (i - (len(titles) - 1) / 2) * width for row in range(len(cells))]
        errors = [cell[1] if len(cell) > 1 else math.nan for cell in cells]
        axis.bar(places, [cell[0] for cell in cells], width, yerr=errors, label=title)
    axis.set(ylabel=ylabel, ylim=(0, 100))
    axis.set_xticks(range(len(summary)), list(summary))
    figure.legend(loc="outside upper center", ncols=len(titles), frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
