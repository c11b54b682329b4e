"""All of ViLLA from one YAML: Stages 0, 1 and 2, the ceiling, the evaluation, a table and pictures.

    accelerate launch training/pipeline.py --config training/configs/quickstart.yaml

Stages that are finished are skipped and one that was cut off goes on from its last checkpoint, so that the same
command, given again after a kill, completes the run. Options after the config override it in every stage that has them.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import embed_regions
import map_regions
import stage0
import stage1
import stage2
from arguments import StageArguments, read_arguments
from card import CardFacts
from datasets_scripts.loading import load_split
from hub import push_model
from modeling_villa import VillaMappingConfig
from stage import start

EVAL = Path(__file__).resolve().parent.parent / "eval"
ARGUMENTS: dict[str, type[StageArguments]] = {
    stage0.STAGE: stage0.Stage0Arguments,
    embed_regions.STAGE: embed_regions.EmbedRegionsArguments,
    stage1.STAGE: stage1.Stage1Arguments,
    map_regions.STAGE: map_regions.MapRegionsArguments,
    stage2.STAGE: stage2.Stage2Arguments,
}
ROWS = {"clip_ft_img": "CLIP-FT-Img (Stage 0)", "villa": "ViLLA (Stage 2)", "ceiling": "Ceiling (true pairs)"}
COLUMNS = {
    "text_to_region/precision@25": "P@25",
    "text_to_region/precision@100": "P@100",
    "text_to_region/r_precision": "R-Prec",
    "region_to_text/r_precision": "R-Prec",
}


def read_all(argv: Sequence[str]) -> dict[str, Any]:
    """Each stage's arguments; an option goes to every stage that knows it.

    Raises:
        ValueError: no stage knows an option, or a stage would not write under the run's folder.
    """
    options = split_options(argv)
    known = {stage: {entry.name for entry in fields(cls)} for stage, cls in ARGUMENTS.items()}
    everywhere = {"config"}.union(*known.values())
    if "output_dir" in dict(options):
        raise ValueError("--output_dir is of one stage; the pipeline takes --run_dir.")
    if unknown := [
        name for name, _ in options if name.removeprefix("no_") not in everywhere and name not in everywhere
    ]:
        raise ValueError(f"No stage has the options {unknown}; see training/stage0.py --help and its siblings.")
    read = {}
    for stage, cls in ARGUMENTS.items():
        own = known[stage] | {"config"}
        words = [word for name, chunk in options if name in own or name.removeprefix("no_") in own for word in chunk]
        read[stage] = read_arguments(cls, stage, words)
        if read[stage].output_dir is not None:
            raise ValueError(f"Section {stage!r} sets output_dir; in the pipeline every stage writes under run_dir.")
    return read


def usage() -> str:
    """What `--help` prints: every option and the stages that take it."""
    stages_of: dict[str, list[str]] = {}
    entries = {}
    for stage, cls in ARGUMENTS.items():
        for entry in fields(cls):
            stages_of.setdefault(entry.name, []).append(stage)
            entries[entry.name] = entry
    lines = [str(__doc__)]
    for name, stages in stages_of.items():
        where = "all" if len(stages) == len(ARGUMENTS) else ", ".join(stages)
        lines.append(f"  --{name} ({where}): {entries[name].metadata['help']}")
    return "\n".join([*lines, ""])


def split_options(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Command-line words -> (option's name, its words)."""
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            options.append((word[2:].split("=")[0], [word]))
        elif options:
            options[-1][1].append(word)
        else:
            raise ValueError(f"Expected an option that begins with --, got {word!r}.")
    return options


def evaluate(args: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Run the evaluations and pictures in their own processes; returns all metrics."""
    stage2_args = args["stage2"]
    common = ["--dataset", stage2_args.dataset, "--dataset_kwargs", stage2_args.dataset_kwargs]
    common += ["--seed", str(stage2_args.seed), "--strict", str(stage2_args.strict)]
    folders = {"clip_ft_img": "stage0", "villa": "stage2", "ceiling": "ceiling/stage2"}
    rule = args["map_regions"]
    mapping = [
        "--mapping_model",
        str(run_dir / "stage1" / "model"),
        "--epsilon",
        str(rule.epsilon),
        "--mode",
        rule.mode,
    ]
    mapping += ["--exclusive_groups", str(rule.exclusive_groups)]
    models = [f"{row}={run_dir / folder / 'model'}" for row, folder in folders.items()]
    vlm = ["--vlm", str(run_dir / "stage0" / "model")]
    script("retrieval.py", "--models", *models, *common, "--output", str(run_dir / "retrieval.json"))
    script("mapping.py", *mapping, *vlm, *common, "--output", str(run_dir / "mapping.json"))
    script("figures.py", "--run_dir", str(run_dir), *mapping, *common)
    found = [json.loads((run_dir / name).read_text()) for name in ("retrieval.json", "mapping.json")]
    runs = {"retrieval": found[0].pop("run"), "mapping": found[1].pop("run")}
    return {**found[0], **found[1], "run": runs}


def script(name: str, *words: str) -> None:
    """Run a script of eval/; it never shares a process with training."""
    subprocess.run([sys.executable, str(EVAL / name), *words], check=True)


def push_with_results(args: dict[str, Any], run_dir: Path, metrics: dict[str, Any]) -> None:
    """Send each stage's model once more, its card with the figures and the picture."""
    names = VillaMappingConfig.from_pretrained(run_dir / "stage1" / "model").attributes
    models = {
        "stage0": rows_of(metrics, "clip_ft_img/"),
        "stage1": {key: metrics[key] for key in metrics if key.startswith("mapping/")},
        "stage2": rows_of(metrics, "villa/"),
    }
    corpus = args["stage2"]
    validation = load_split(
        corpus.dataset, json.loads(corpus.dataset_kwargs), "validation", corpus.strict, corpus.num_proc
    )
    for stage, figures in models.items():
        if not args[stage].push_to_hub:
            continue
        facts = CardFacts(
            args[stage],
            stage,
            args[stage].hub_model_id,
            metrics=figures,
            commands=[metrics["run"]["mapping" if stage == "stage1" else "retrieval"]["command"]],
            attributes=names,
            example=validation[0]["image"],
            picture=run_dir / "regions.png",
        )
        push_model(run_dir / stage / "model", facts)


def rows_of(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """One model's metrics, without its name before them."""
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


def table(metrics: dict[str, Any]) -> str:
    """The rows of the paper's tables 3 and 5, for a terminal."""
    lines = [
        "",
        f"{'':24s}{'text -> region':^24s}{'region -> text':>16s}",
        f"{'':24s}" + "".join(f"{title:>8s}" for title in list(COLUMNS.values())[:3]) + f"{'R-Prec':>16s}",
    ]
    for row, title in ROWS.items():
        values = [metrics[f"{row}/{key}"] for key in COLUMNS]
        lines.append(f"{title:24s}" + "".join(f"{value:8.1f}" for value in values[:3]) + f"{values[3]:16.1f}")
    lines += ["", f"{'mapping of attributes':24s}{'precision':>10s}{'recall':>8s}{'F1':>8s}"]
    for row, title in {"random/": "Random", "vlm_zs/": "VLM-ZS (Stage 0)", "": "ViLLA (Stage 1)"}.items():
        values = [metrics[f"{row}mapping/{key}"] for key in ("precision", "recall", "f1")]
        lines.append(f"{title:24s}{values[0]:10.1f}{values[1]:8.1f}{values[2]:8.1f}")
    return "\n".join([*lines, "", ""])


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then evaluate and show."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(usage())
        return
    began = time.time()
    args = read_all(argv)
    run_dir = Path(args["stage2"].run_dir)
    stage0.run(args["stage0"])
    if args["stage1"].encoder == "frozen":
        embed_regions.run(args["embed_regions"])
    stage1.run(args["stage1"])
    map_regions.run(args["map_regions"])
    stage2.run(args["stage2"])
    ceiling = {"supervision": "labels", "output_dir": str(run_dir / "ceiling" / "stage2"), "push_to_hub": False}
    stage2.run(replace(args["stage2"], **ceiling))
    if start().is_main_process:
        metrics = evaluate(args, run_dir)
        (run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        if args["stage2"].push_to_hub:
            push_with_results(args, run_dir, metrics)
        sys.stdout.write(table(metrics))
        sys.stdout.write(f"{run_dir}: metrics.json, curves.png, regions.png; {time.time() - began:.0f} s\n")
    start().wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1:])
