"""Arguments of the stages: one YAML, then the command line, and what is refused."""

import json

import pytest
from training_helpers import ROOT, STAGES, stage_arguments, tiny_config, write_config

from arguments import StageArguments, TrainingArguments, as_words, read_arguments, read_config
from pipeline import main as pipeline_main
from pipeline import read_all, split_options

CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))


def yaml_file(folder, text):
    path = folder / "x.yaml"
    path.write_text(text)
    return str(path)


def read(folder, text, *words, stage="stage0"):
    return stage_arguments(stage, yaml_file(folder, text), *words)


def test_section_wins_over_top_and_command_line_over_both(tmp_path):
    text = "batch_size: 3\nseed: 1\nnum_epochs: 2\nstage0: {batch_size: 4, num_epochs: 5}\nstage1: {batch_size: 9}\n"
    args = read(tmp_path, text, "--num_epochs", 0.5)
    assert (args.batch_size, args.seed, args.num_epochs, args.weight_decay) == (4, 1, 0.5, 0.01)
    assert read(tmp_path, text, stage="stage1").batch_size == 9
    assert read(tmp_path, text, stage="embed_regions").batch_size == 3


def test_the_later_of_several_configs_wins(tmp_path):
    (tmp_path / "over.yaml").write_text("seed: 2\nstage0: {num_epochs: 7}\n")
    text = "seed: 1\nstage0: {batch_size: 4, num_epochs: 5, weight_decay: 0.5}\n"
    args = read(tmp_path, text, "--config", tmp_path / "over.yaml", "--weight_decay", 0.1)
    assert (args.seed, args.batch_size, args.num_epochs, args.weight_decay) == (2, 4, 7.0, 0.1)
    (tmp_path / "over.yaml").write_text("stage0: {num_epoch: 7}\n")
    with pytest.raises(ValueError, match=r"over\.yaml: section 'stage0' has unknown fields \['num_epoch'\]"):
        read(tmp_path, text, f"--config={tmp_path / 'over.yaml'}")


def test_values_have_their_types(tmp_path):
    text = """
learning_rate: 1e-3
max_steps: null
num_workers: 2
strict: yes
dataset_kwargs: {complexity: 5.0, attributes: ["7", red]}
stage0: {backbone_kwargs: {layers: [1, 1]}, text: frozen, learn_temperature: false, region_stage: -2, vlm: null}
"""
    args = read(tmp_path, text)
    assert args.learning_rate == 1e-3 and isinstance(args.learning_rate, float)  # YAML itself reads a string here
    assert args.max_steps is None and args.vlm is None
    assert args.strict is True and args.text == "frozen" and args.learn_temperature is False
    assert args.region_stage == -2 and args.num_workers == 2
    assert json.loads(args.dataset_kwargs) == {"complexity": 5.0, "attributes": ["7", "red"]}
    assert json.loads(args.backbone_kwargs) == {"layers": [1, 1]}


def test_null_in_a_section_takes_back_what_stands_at_the_top(tmp_path):
    assert read(tmp_path, "max_steps: 5\nstage0: {max_steps: null}\n").max_steps is None


def test_mappings_become_json_and_null_is_left_out():
    assert as_words("x", None) == []
    assert as_words("x", {"a": 1}) == ["--x", '{"a": 1}']


@pytest.mark.parametrize(("words", "expected"), [([], True), (["--no_resume"], False), (["--resume", "false"], False)])
def test_resume_is_on_unless_switched_off(tmp_path, words, expected):
    assert read(tmp_path, "seed: 0\n", *words).resume is expected


def test_config_with_an_equals_sign(tmp_path):
    path = yaml_file(tmp_path, "seed: 4\n")
    assert read_arguments(STAGES["stage0"][1], "stage0", [f"--config={path}"]).seed == 4


def test_without_a_config_the_defaults_hold():
    args = read_arguments(STAGES["stage1"][1], "stage1", ["--seed", "3"])
    assert (args.seed, args.encoder, args.batch_size) == (3, "frozen", 64)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize: 3\n", [r"unknown fields \['batchsize'\] at the top", "batch_size"]),
        ("encoder: full\n", ["unknown fields", "encoder"]),  # a field of one stage belongs into its section
        ("stage3: {}\n", ["stage3", "'stage"]),
        ("stage0: {backbon: x}\n", ["section 'stage0' has unknown fields", "'backbon'", "'backbone'"]),
        ("stage0: 3\n", ["section 'stage0' must be a mapping", "3"]),
        ("- 1\n", ["expected a mapping", "list"]),
        ("", ["expected a mapping", "NoneType"]),
    ],
)
def test_a_bad_config_is_named(tmp_path, text, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        read(tmp_path, text)
    for word in words[1:]:
        assert word in str(caught.value)


def test_a_missing_config_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml: there is no such file.*training/configs"):
        read_config("nowhere.yaml")


@pytest.mark.parametrize("word", ["--learnin_rate", "--learning"])
def test_an_unknown_or_shortened_option_is_refused(tmp_path, word):
    with pytest.raises(ValueError, match=f"not used.*'{word}', '1'"):
        read(tmp_path, "seed: 0\n", word, "1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_epochs", -1),
        ("num_epochs", float("nan")),
        ("batch_size", 0),
        ("gradient_accumulation_steps", -1),
        ("save_steps", 0),
        ("keep_last", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("max_grad_norm", -1.0),
        ("warmup_ratio", 1.0),
        ("warmup_ratio", -0.1),
        ("early_stopping_patience", -1),
        ("weight_decay", -0.1),
        ("max_steps", 0),
        ("num_workers", -1),
        ("dataset_kwargs", "{"),
        ("dataset_kwargs", "[1]"),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        TrainingArguments(**{field: value})
    if field not in ("early_stopping_patience", "weight_decay"):
        assert str(value) in str(caught.value)


def test_what_is_at_the_edge_of_a_range_is_taken():
    TrainingArguments(warmup_ratio=0.0, weight_decay=0.0, early_stopping_patience=0, max_steps=1, num_epochs=0.01)
    assert str(StageArguments(run_dir="a").folder("stage0")) == "a/stage0"


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
@pytest.mark.parametrize("stage", STAGES)
def test_committed_configs_are_read_by_every_stage(stage, path):
    args = stage_arguments(stage, path)
    assert args.run_dir == f"runs/{path.stem}"
    assert json.loads(args.dataset_kwargs)["complexity"] > 2


def test_there_are_committed_configs():
    assert {"quickstart", "docmnist_small", "docmnist_rn50"} <= {path.stem for path in CONFIGS}


def test_pipeline_gives_an_option_to_every_stage_that_has_it(tmp_path):
    config = str(write_config(tmp_path))
    read = read_all(["--config", config, "--epsilon", "0.25", "--seed=7", "--no_resume", "--batch_size", "5"])
    assert list(read) == list(STAGES)
    assert {args.seed for args in read.values()} == {7}
    assert {args.batch_size for args in read.values()} == {5}
    assert not any(args.resume for args in read.values())
    assert read["map_regions"].epsilon == 0.25
    assert read["stage1"].encoder == "full"
    assert json.loads(read["stage0"].backbone_kwargs) == tiny_config(tmp_path)["stage0"]["backbone_kwargs"]


def test_pipeline_tells_which_stage_takes_which_option(capsys):
    pipeline_main(["--help"])
    printed = capsys.readouterr().out
    assert "--seed (all): of weights, order and augmentation" in printed
    assert "--epsilon (map_regions): " in printed and "--num_epochs (stage0, stage1, stage2): " in printed


def test_pipeline_refuses_a_folder_of_one_stage(tmp_path):
    config = str(write_config(tmp_path, stage1={"output_dir": "elsewhere"}))
    with pytest.raises(ValueError, match="'stage1' sets output_dir"):
        read_all(["--config", config])


def test_pipeline_refuses_an_option_that_no_stage_has(tmp_path):
    with pytest.raises(ValueError, match=r"No stage has the options \['epsilonn', 'no_such'\]"):
        read_all(["--config", str(write_config(tmp_path)), "--epsilonn", "0.25", "--no_such"])
    with pytest.raises(ValueError, match="begins with --, got 'word'"):
        split_options(["word", "--seed", "1"])
    assert split_options(["--a", "-2", "b", "--c=1"]) == [("a", ["--a", "-2", "b"]), ("c", ["--c=1"])]
