"""The scripts of tables 3 and 5 and of figure 3: what they train, skip and go on with, and what they write."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image
from training_helpers import ENVIRONMENT, ROOT, copy_of_run, finished_run, write_config
from transformers import HfArgumentParser

import complexity_sweep
import table3
import table5
from tables import METHODS, Runs, TableArguments, markdown, merged, summarise

STAGES = ("stage0", "embed_regions", "stage1", "map_regions", "stage2")


def script(name, *words):
    """Run a script of eval/ as a user would; the finished process."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, f"eval/{name}.py", *map(str, words)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(config, run folder, folder of the results) of table 3 over a run whose Stages 0 and 1 were there."""
    config, run_dir = finished_run(tmp_path_factory)
    folder = tmp_path_factory.mktemp("table")
    copy = copy_of_run(run_dir, folder, "stage0", "stage1", "map_regions", "stage2")
    words = ("--config", config, "--run_dir", copy, "--methods", "clip_zs", "clip_ft_img", "clip_zs_map", "villa")
    done = script("table3", *words, "--output", folder / "results" / "table3")
    assert done.returncode == 0, done.stdout + done.stderr
    return config, copy, folder / "results"


def test_a_method_is_a_config_of_stages_that_training_reads():
    assert {path.stem for path in METHODS.glob("*.yaml")} == {*table3.TITLES, "mapping"}
    for path in METHODS.glob("*.yaml"):
        assert path.read_text().startswith("# ")
        stages = list(yaml.safe_load(path.read_text()))
        assert stages == [stage for stage in STAGES if stage in stages]


def test_stages_that_methods_share_are_trained_once_and_the_others_apart(table):
    _, run_dir, results = table
    written = json.loads((results / "table3.json").read_text())
    trained = {str(run_dir / name) for name in ("clip_zs/stage0", "clip_zs_map/map_regions", "clip_zs_map/stage2")}
    seconds = written["run"]["seconds_of_stages"]
    assert {folder for folder, value in seconds.items() if value} == trained
    assert set(seconds) - trained == {str(run_dir / name) for name in ("stage0", "stage1", "map_regions", "stage2")}
    meta = json.loads((run_dir / "clip_zs_map" / "stage2" / "model" / "villa_artifact.json").read_text())
    assert (meta["vision"], meta["image_tower"]) == ("full", "vlm")
    assert json.loads((run_dir / "clip_zs" / "stage0" / "model" / "villa_artifact.json").read_text())["num_epochs"] == 0


def test_the_table_holds_what_the_evaluation_found(table):
    _, run_dir, results = table
    written = json.loads((results / "table3.json").read_text())
    found = json.loads((run_dir / "table3_retrieval.json").read_text())
    rows = {"CLIP-ZS": "clip_zs", "CLIP-FT-Img": "clip_ft_img", "CLIP-ZS-Map": "clip_zs_map", "ViLLA": "villa"}
    lines = (results / "table3.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {row}" for row in rows]
    for line, (row, method) in zip(lines[2:], rows.items(), strict=True):
        values = {key: found[f"{method}/{key}"] for key in table3.COLUMNS}
        assert written[row] == [values]
        assert line.split(" | ")[1:] == [
            *(f"{value:.1f}" for value in list(values.values())[:3]),
            f"{list(values.values())[3]:.1f} |",
        ]
    assert len({tuple(row.values()) for rows in list(written.values())[:4] for row in rows}) == 4
    run = written["run"]
    assert run["command"].startswith("python eval/table3.py --config ") and run["seeds"] == [0]
    assert "torch" in run["versions"] and run["seconds"] > 0
    with Image.open(results / "table3.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_table_5_and_the_sweep_find_the_same_run(table, tmp_path):
    config, run_dir, _ = table
    done = script("table5", "--config", config, "--run_dir", run_dir, "--output", tmp_path / "table5")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "table5.json").read_text())
    assert not any(written["run"]["seconds_of_stages"].values())
    found = json.loads((run_dir / "table5_mapping.json").read_text())
    for prefix, row in table5.ROWS.items():
        assert written[row] == [{key: found[prefix + key] for key in table5.COLUMNS}]
    assert found["run"]["epsilon"] == 0.5
    lines = (tmp_path / "table5.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "| table5",
        "|---|---|---|---|",
        *("| random", "| VLM-ZS", "| ViLLA"),
    ]


def test_what_was_cut_off_is_gone_on_with_and_seeds_are_apart(table, tmp_path):
    config, run_dir, _ = table
    copy = tmp_path / "sweep" / "c5.0"
    shutil.copytree(run_dir / "stage0", copy / "stage0")
    shutil.rmtree(copy / "stage0" / "model")  # killed just before the end: its checkpoints are there
    words = ("--config", config, "--run_dir", tmp_path / "sweep", "--methods", "clip_ft_img", "--complexities", 5)
    done = script("complexity_sweep", *words, "--seeds", 0, 7, "--output", tmp_path / "sweep")
    assert done.returncode == 0, done.stderr
    assert (copy / "stage0" / "model" / "model.safetensors").read_bytes() == (
        run_dir / "stage0" / "model" / "model.safetensors"
    ).read_bytes()
    assert len((copy / "seed7" / "stage0" / "log.jsonl").read_text().splitlines()) >= 7
    (row,) = (tmp_path / "sweep.md").read_text().splitlines()[2:]
    assert row.startswith("| CLIP-FT-Img, c = 5.0 | ") and row.count("±") == 2
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert len(written["CLIP-FT-Img, c = 5.0"]) == 2
    assert set(written["run"]["seconds_of_stages"]) == {str(copy / "stage0"), str(copy / "seed7" / "stage0")}
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.format == "PNG"


def test_mean_and_deviation():
    found = {"a": [{"x": 1.0}, {"x": 2.0}, {"x": 6.0}], "b": [{"x": 3.0}]}
    summary = summarise(found)
    assert summary["a"]["x"] == pytest.approx([3.0, 7**0.5]) and summary["b"]["x"] == [3.0]
    assert markdown(summary, {"x": "X"}, "t") == "| t | X |\n|---|---|\n| a | 3.0 ± 2.6 |\n| b | 3.0 |\n"


def test_later_configs_win_section_by_section(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\ndataset_kwargs: {complexity: 5.0, seed: 3}\nstage1: {encoder: full}\n")
    (tmp_path / "b.yaml").write_text("dataset_kwargs: {complexity: 9.1}\nstage1: {num_heads: 2}\nstage2:\n")
    values = merged([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    assert values == {
        "seed": 1,
        "dataset_kwargs": {"complexity": 9.1},
        "stage1": {"encoder": "full", "num_heads": 2},
        "stage2": None,
    }
    args = TableArguments(config=[str(tmp_path / "a.yaml")], run_dir=str(tmp_path), seeds=[4, 5])
    assert merged([str(tmp_path / "b.yaml"), str(tmp_path / "a.yaml")])["stage1"] == {"num_heads": 2, "encoder": "full"}
    runs = Runs(args, "c2", complexity=2.0)
    assert json.loads(runs.corpus["dataset_kwargs"]) == {"complexity": 2.0, "seed": 3}
    # The config's own seed, 1, stands where training/pipeline.py puts it, whichever the table asks for.
    assert (runs.folder(1), runs.folder(5)) == (tmp_path / "c2", tmp_path / "c2" / "seed5")


def test_a_section_without_fields_leaves_the_run_s_own(tmp_path):
    (tmp_path / "a.yaml").write_text("stage1: {encoder: lora}\n")
    assert merged([str(tmp_path / "a.yaml"), str(METHODS / "villa.yaml")])["stage1"] == {"encoder": "lora"}


def test_what_comes_after_a_changed_stage_is_the_method_s_own_and_reads_it(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("stage0:\nembed_regions:\nstage1: {num_heads: 2}\nmap_regions:\nstage2:\n")
    monkeypatch.setattr("tables.METHODS", tmp_path)
    (tmp_path / "run.yaml").write_text(f"run_dir: {tmp_path}\nstage1: {{encoder: frozen}}\nstage2: {{vlm: clip}}\n")
    runs = Runs(TableArguments(config=[str(tmp_path / "run.yaml")]))
    commands = {}
    monkeypatch.setattr(runs, "_run", lambda stage, words, folder: commands.__setitem__(stage, (words, folder)))
    mine = tmp_path / "mine"
    assert runs.train("mine", 0) == {
        **{stage: tmp_path / stage for stage in ("stage0", "embed_regions")},
        **{stage: mine / stage for stage in ("stage1", "map_regions", "stage2")},
    }
    words = {
        stage: dict(word[2:].split("=", 1) for word in words if "config" not in word)
        for stage, (words, _) in commands.items()
    }
    assert words["stage1"]["region_store"] == str(tmp_path / "embed_regions")
    assert words["map_regions"]["mapping_model"] == words["stage2"]["mapping_model"] == str(mine / "stage1" / "model")
    assert words["stage2"]["pairs"] == str(mine / "map_regions") and "vlm" not in words["stage2"]
    assert words["map_regions"]["vlm"] == str(tmp_path / "stage0" / "model")
    assert words["stage2"]["output_dir"] == str(mine / "stage2")
    assert [f"--config={tmp_path / 'mine.yaml'}" in words for words, _ in commands.values()] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_configs_may_be_given_one_by_one_or_together():
    words = ["--config", "a.yaml", "--config", "b.yaml", "c.yaml", "--seeds", "3", "4"]
    (args,) = HfArgumentParser(TableArguments, allow_abbrev=False).parse_args_into_dataclasses(words)
    assert (args.config, args.seeds) == (["a.yaml", "b.yaml", "c.yaml"], [3, 4])


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"There is no method 'clip'; there are ceiling, clip_ft_img, .*villa"):
        table3.Table3Arguments(config=["x.yaml"], methods=["villa", "clip"])
    with pytest.raises(ValueError, match=r"--config nowhere\.yaml: there is no such file"):
        table5.main(TableArguments(config=["nowhere.yaml"]))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="expected a mapping, got list"):
        merged([str(tmp_path / "list.yaml")])
    with pytest.raises(ValueError, match="--config names no YAML"):
        TableArguments()
    with pytest.raises(ValueError, match="methods must be distinct names"):
        table3.Table3Arguments(config=["x.yaml"], methods=["villa", "villa"])
    for options in ("{", "[1]"):
        with pytest.raises(ValueError, match=rf"dataset_kwargs must be a JSON object, got '{re.escape(options)}'"):
            TableArguments(config=["x.yaml"], dataset_kwargs=options)
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match=r"seeds must be distinct numbers, at least one; got \["):
            TableArguments(config=["x"], seeds=seeds)
    with pytest.raises(ValueError, match="complexities must be distinct"):
        complexity_sweep.SweepArguments(config=["x"], complexities=[5.0, 5.0])
    wrong = write_config(tmp_path, stage0={"backbone": "no_such_backbone"})
    with pytest.raises(RuntimeError, match="stage0 failed, see above; the same command, given again, goes on"):
        table5.main(TableArguments(config=[str(wrong)], run_dir=str(tmp_path / "wrong")))
