"""Killed at any moment, a stage goes on and ends with the same bytes as the one that was not killed."""

import random
import time
from pathlib import Path

import pytest
from training_helpers import (
    DEADLY,
    STAGES,
    Child,
    ChildError,
    copy_of_run,
    files_of,
    finished_run,
    in_child,
    read_log,
    run_and_die,
    run_stage,
    write_config,
)

BEFORE = {
    "stage0": (),
    "embed_regions": ("stage0",),
    "stage1": ("stage0",),
    "map_regions": ("stage0", "stage1"),
    "stage2": ("stage0", "stage1", "map_regions"),
}
TRAINED = ("stage0", "stage1", "stage2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.fixture
def killed(finished, tmp_path):
    """(config, its words, run folder) of a run that has what a stage needs and shares the finished one's corpus."""

    def prepare(stage):
        config, run_dir = finished
        copy = copy_of_run(run_dir, tmp_path, *BEFORE[stage])
        return config, ("--run_dir", copy), copy

    return prepare


def artifact_of(stage, run_dir):
    folder = run_dir / stage / "model" if stage in TRAINED else run_dir / stage
    # datasets keeps caches beside a store that some test reads and filters; they are not the store's.
    kept = {name: content for name, content in files_of(folder).items() if not Path(name).name.startswith("cache-")}
    files = {name: content for name, content in kept.items() if not name.endswith("state.json")}
    assert files
    return files


def kill_once_logged(stage, config, words, run_dir, lines, delay):
    """Start a stage, wait until its log has so many lines and a moment more, and kill it.

    Returns whether it was still running.
    """
    child = Child(run_stage, stage, config, *words)
    log = run_dir / stage / "log.jsonl"
    deadline = time.monotonic() + 60
    while child.process.is_alive() and time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            time.sleep(delay)
            break
        time.sleep(0.0005)
    alive = child.process.is_alive()
    child.kill()
    return alive


@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_random_moments(finished, killed, stage, seed):
    config, words, run_dir = killed(stage)
    # Of the test alone: what is random about the run itself comes from its seed.
    chance = random.Random(f"{stage} {seed}")
    kills = 0
    for lines in sorted(chance.choices(range(1, 7), k=3)):
        kills += kill_once_logged(stage, config, words, run_dir, lines, chance.uniform(0, 0.03))
    assert kills, "no kill came in time"
    in_child(run_stage, stage, config, *words)
    assert artifact_of(stage, run_dir) == artifact_of(stage, finished[1])
    assert read_log(run_dir / stage) == read_log(finished[1] / stage)


@pytest.mark.parametrize("where", DEADLY)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_killed_while_writing(finished, killed, stage, where):
    config, words, run_dir = killed(stage)
    words = (*words, "--keep_last", 1)
    deaths = 0
    for count in (1, 2, 3):
        try:
            in_child(run_and_die, stage, config, where, count, *words)
        except ChildError as error:
            assert error.message == "exit code -9", error
            deaths += 1
    assert deaths
    in_child(run_stage, stage, config, *words)
    expected, found = artifact_of(stage, finished[1]), artifact_of(stage, run_dir)
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert len([path for path in (run_dir / stage / "checkpoints").iterdir() if path.name[0] != "."]) == 1


@pytest.mark.parametrize("stage", ["embed_regions", "map_regions"])
@pytest.mark.parametrize("where", ["rename", "renamed", "fsync"])
def test_a_store_is_whole_or_absent(finished, killed, stage, where):
    config, words, run_dir = killed(stage)
    with pytest.raises(ChildError, match="exit code -9"):
        in_child(run_and_die, stage, config, where, 1, *words)
    assert (run_dir / stage).exists() == (where == "renamed")
    in_child(run_stage, stage, config, *words)
    assert artifact_of(stage, run_dir) == artifact_of(stage, finished[1])


def test_killed_while_the_old_run_is_removed(finished, killed):
    """`--no_resume` over a finished run with other arguments, killed half-way, then given again."""
    config, words, run_dir = killed("stage1")
    in_child(run_stage, "stage1", config, *words, "--seed", 1)
    for count in (1, 2):
        with pytest.raises(ChildError, match="exit code -9"):
            in_child(run_and_die, "stage1", config, "rmtree", count, *words, "--no_resume")
    in_child(run_stage, "stage1", config, *words, "--no_resume")
    assert artifact_of("stage1", run_dir) == artifact_of("stage1", finished[1])


def test_early_stopping_and_accumulation_survive_kills(tmp_path, finished):
    config = write_config(tmp_path, max_steps=None, num_epochs=4, gradient_accumulation_steps=2)
    words = ("--early_stopping_patience", 1, "--dataset_kwargs", stage_dataset(finished))
    in_child(run_stage, "stage0", config, *words, "--output_dir", tmp_path / "whole")
    for lines in (2, 5, 8):
        kill_once_logged("stage0", config, words, tmp_path / "run", lines, 0.0)
    in_child(run_stage, "stage0", config, *words)
    whole = files_of(tmp_path / "whole" / "model")
    assert files_of(tmp_path / "run" / "stage0" / "model") == whole
    assert read_log(tmp_path / "run" / "stage0") == read_log(tmp_path / "whole")


def stage_dataset(finished):
    """The finished run's corpus, so that it is not drawn again."""
    import json

    import yaml

    return json.dumps(yaml.safe_load(finished[0].read_text())["dataset_kwargs"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_left_alone(finished, stage):
    config, run_dir = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    in_child(run_stage, stage, config)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()} == before


def test_the_seed_decides_the_weights(finished, killed):
    config, words, run_dir = killed("stage1")
    in_child(run_stage, "stage1", config, *words, "--seed", 1)
    assert (
        artifact_of("stage1", run_dir)["model.safetensors"] != artifact_of("stage1", finished[1])["model.safetensors"]
    )
