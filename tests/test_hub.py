"""Training with --push_to_hub against a stand-in Hub: branches, tags, cards, datasets, resuming, and faults."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from datasets import load_dataset, load_from_disk
from huggingface_hub import DatasetCard, ModelCard
from local_hub import LocalHub
from PIL import Image
from training_helpers import (
    ENVIRONMENT,
    ROOT,
    copy_of_run,
    files_of,
    finished_run,
    read_log,
    stage_arguments,
    write_config,
)

import datasets_scripts  # noqa: F401  (registers docmnist)
from datasets_scripts.schema import attribute_groups, attribute_prompts

REPO, DOCMNIST = "org/villa-docmnist", "org/docmnist"
PUSH = ("--push_to_hub", "true", "--hub_model_id", REPO)
STAGE1 = ("--save_steps", 2, "--max_steps", 6)
CODE = {
    *("configuration_villa.py", "vision_villa.py", "losses_villa.py", "modeling_villa_clip.py", "processing_villa.py"),
    *("pipeline_villa.py", "proposals_villa.py", "assignment_villa.py", "handler.py"),
    *("text_villa.py", "towers_villa.py"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.fixture
def hub():
    with LocalHub() as hub:
        yield hub


def started(hub, folder, *words, token=None):
    """A script as a user starts it, with the stand-in as its Hub."""
    environment = {**os.environ, **ENVIRONMENT, **hub.environment(folder / "hf", token), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(hub, folder, *words, token=None, code=0):
    """Run a script to its end; returns what it printed."""
    process = started(hub, folder, *words, token=token)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == code, printed
    return printed


def stage1(config, run_dir, *words):
    return ("training/stage1.py", "--config", config, "--run_dir", run_dir, *STAGE1, *words)


def weights(run_dir):
    return (run_dir / "stage1" / "model" / "model.safetensors").read_bytes()


# A whole pipeline


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """(hub, run folder, what was printed) of a pipeline that pushes everything."""
    folder = tmp_path_factory.mktemp("pushed")
    config = write_config(folder, max_steps=4, save_steps=2)
    with LocalHub() as hub:
        printed = run(hub, folder, "training/pipeline.py", "--config", config, *PUSH, "--push_artifacts", "true")
        words = ("--complexities", 5.0, 29.4, "--attribute_budget", 300, "--digits", "optdigits")
        printed += run(hub, folder, "-m", "datasets_scripts.push_docmnist", "--repo_id", DOCMNIST, *words)
        yield hub, folder / "run", printed


def test_each_stage_has_a_branch_and_a_tag_and_main_holds_the_last(pushed):
    hub, run_dir, _ = pushed
    assert set(hub.branches(REPO)) == {"main", "stage0", "stage1", "stage2"}
    for stage in ("stage0", "stage1", "stage2"):
        files = hub.files(REPO, stage)
        assert files == hub.files(REPO, f"{stage}-final")
        assert files["model.safetensors"] == (run_dir / stage / "model" / "model.safetensors").read_bytes()
        assert not [path for path in files if path.startswith("checkpoints")]
    main = hub.files(REPO)
    assert main["model.safetensors"] == hub.files(REPO, "stage2")["model.safetensors"]
    assert hub.is_private(REPO)


def test_only_the_files_that_are_needed_are_there(pushed):
    hub, _, _ = pushed
    for stage, more in (("stage0", set()), ("stage1", {"modeling_villa_mapping.py"}), ("stage2", set())):
        files = set(hub.files(REPO, stage))
        assert {name for name in files if name.endswith(".py")} == CODE | more
        assert files - CODE - more == {
            *(".gitattributes", "README.md", "config.json", "model.safetensors", "processor_config.json"),
            *("tokenizer.json", "tokenizer_config.json", "villa_artifact.json", "regions.png"),
            *(".eval_results/villa.yaml", "example.png"),
        }


def test_no_token_is_written_anywhere(pushed):
    hub, run_dir, printed = pushed
    secrets = [hub.token, hub.read_token]
    everything = [printed.encode(), *files_of(run_dir).values()]
    for (kind, repo_id), repository in hub.repositories.items():
        for branch in repository.branches:
            everything += hub.files(repo_id, branch, kind.removesuffix("s")).values()
    assert len(everything) > 50
    assert not [secret for secret in secrets for content in everything if secret.encode() in content]


def test_no_folder_of_this_machine_is_on_the_hub(pushed):
    hub, run_dir, _ = pushed
    for stage in hub.branches(REPO):
        for path, content in hub.files(REPO, stage).items():
            assert str(run_dir.parent).encode() not in content, f"{path} of {stage}"


def test_the_card_says_what_it_is_and_what_it_reaches(pushed):
    hub, run_dir, _ = pushed
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for stage, prefix, name in (("stage1", "", "mapping/f1"), ("stage2", "villa/", "text_to_region/r_precision")):
        value = metrics[prefix + name]
        card = ModelCard(hub.files(REPO, stage)["README.md"].decode())
        assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
        assert stage in card.data.tags and card.data.pipeline_tag.startswith("zero-shot-")
        (result,) = [result for result in card.data.eval_results if result.metric_name == name]
        assert result.metric_value == value and result.dataset_split == "test"
        text = card.text
        assert f"| `{name}` | {value:.2f} |" in text
        assert f"python eval/{'mapping' if stage == 'stage1' else 'retrieval'}.py" in text
        assert "(regions.png)" in text and "trust_remote_code=True" in text and "## Limits" in text
        assert "{{" not in text and "{%" not in text
        entries = yaml.safe_load(hub.files(REPO, stage)[".eval_results/villa.yaml"])
        assert value in [entry["value"] for entry in entries] and entries[0]["dataset"]["id"] == "org/docmnist"


def test_pairs_are_a_dataset_and_stage2_reads_them_and_its_models_from_the_hub(pushed, tmp_path):
    hub, run_dir, _ = pushed
    assert hub.is_private(f"{REPO}-pairs", "dataset")
    config = run_dir.parent / "tiny.yaml"
    words = ("--vlm", f"{REPO}@stage0", "--mapping_model", f"{REPO}@stage1", "--pairs", f"{REPO}-pairs")
    run(hub, tmp_path, "training/stage2.py", "--config", config, "--run_dir", tmp_path / "other", *words)
    mine, theirs = (
        (folder / "stage2" / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "other", run_dir)
    )
    assert mine == theirs


LOAD = """
import sys
sys.modules["modeling_villa"] = sys.modules["datasets_scripts"] = None  # as if the package were not installed
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

repo_id, out = sys.argv[1:]
image = Image.effect_mandelbrot((84, 84), (-2, -1.5, 1, 1.5), 50).convert("RGB")
boxes = [[0, 0, 28, 28], [28, 28, 84, 84]]
results = {}
for stage in ("stage1", "stage2"):
    options = {"revision": stage, "trust_remote_code": True}
    model, processor = AutoModel.from_pretrained(repo_id, **options), AutoProcessor.from_pretrained(repo_id, **options)
    inputs = processor(images=image, boxes=boxes)
    with torch.no_grad():
        results[stage] = model(**inputs).scores if stage == "stage1" else model.get_region_features(**inputs)
options["revision"] = "stage2"
labels = ["a red digit", "a circle"]
results["classes"] = pipeline("zero-shot-image-classification", repo_id, **options)(image, candidate_labels=labels)
results["objects"] = pipeline("zero-shot-object-detection", repo_id, **options)(
    image, candidate_labels=labels, boxes=boxes, threshold=0.0
)
options["revision"] = "stage1"
results["regions"] = pipeline("region-attribute-mapping", repo_id, **options)(image, boxes=boxes)
torch.save(results, out)
"""


def test_remote_code_gives_the_same_to_the_bit_without_the_package(pushed, tmp_path):
    hub, _, _ = pushed
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    run(hub, tmp_path, script, REPO, tmp_path / "remote.pt")
    local = "import modeling_villa\n" + LOAD.replace('sys.modules["modeling_villa"] = ', "").replace(
        '"trust_remote_code": True', '"trust_remote_code": False'
    )
    script.write_text(local)
    run(hub, tmp_path, script, REPO, tmp_path / "local.pt")
    remote, here = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("remote", "local"))
    assert torch.equal(remote["stage1"], here["stage1"]) and torch.equal(remote["stage2"], here["stage2"])
    assert remote["classes"] == here["classes"] and len(here["classes"]) == 2
    assert remote["objects"] == here["objects"] and len(here["objects"]) == 4
    assert remote["regions"] == here["regions"] and len(here["regions"]) == 2


def test_docmnist_is_a_dataset_for_people_without_the_package(pushed, tmp_path):
    hub, _, _ = pushed
    script = tmp_path / "load.py"
    script.write_text(
        "import sys\nsys.modules['datasets_scripts'] = None\n"
        "from datasets import get_dataset_config_names, load_dataset\n"
        f"names = get_dataset_config_names({DOCMNIST!r})\n"
        f"splits, small = load_dataset({DOCMNIST!r}), load_dataset({DOCMNIST!r}, 'complexity_5.0')\n"
        "splits.save_to_disk(sys.argv[1])\nprint('names', names, len(small['train']) > len(splits['train']))\n"
    )
    printed = run(hub, tmp_path, script, tmp_path / "saved")
    assert "names ['complexity_29.4', 'complexity_5.0'] True" in printed
    options = {"complexity": 29.4, "attribute_budget": 300, "digits": "optdigits", "cache_dir": str(tmp_path)}
    built, loaded = load_dataset("docmnist", **options), load_from_disk(tmp_path / "saved")
    for split in ("train", "validation", "test"):
        assert built[split].features == loaded[split].features
        assert built[split][:3] == loaded[split][:3] and len(built[split]) == len(loaded[split])
    assert attribute_groups(loaded["train"])["colour"] and attribute_prompts(loaded["train"])["red"]
    card = DatasetCard(hub.files(DOCMNIST, repo_type="dataset")["README.md"].decode())
    assert {config["config_name"] for config in card.data.configs} == {"complexity_5.0", "complexity_29.4"}
    assert card.data.license == "mit" and '"org/docmnist", "complexity_29.4"' in card.text
    assert hub.is_private(DOCMNIST, "dataset")


def test_the_readme_runs_against_the_stand_in(pushed, tmp_path):
    hub, _, _ = pushed
    section = (ROOT / "README.md").read_text().split("## On the Hub")[1].split("\n## ")[0]
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    script = tmp_path / "readme.py"
    for absent in ("sys.modules['modeling_villa'] = sys.modules['datasets_scripts'] = None", "import modeling_villa"):
        code = snippet if "sys" in absent else snippet.replace('"trust_remote_code": True', "")
        code = code if "sys" in absent else code.replace(", trust_remote_code=True", "").replace(", }", "}")
        script.write_text(f"import os, sys\n{absent}\nos.chdir({str(tmp_path)!r})\n{code}")
        printed = run(hub, tmp_path, script)
        assert "'xmin': 0" in printed and "'score': " in printed
        with Image.open(tmp_path / "page.png") as page:
            assert page.size == (84, 84)


# Resuming


def test_another_machine_goes_on_from_the_branch(hub, finished, tmp_path):
    config, origin = finished
    here, there = (copy_of_run(origin, tmp_path / name, "stage0") for name in ("here", "there"))
    hub.delay = 0.05
    process = started(hub, tmp_path, *stage1(config, here, *PUSH, "--max_steps", 400))
    deadline = time.monotonic() + 120
    while "checkpoints" not in str(hub.files(REPO, "stage1").keys() if "stage1" in known_branches(hub) else ""):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [path for path in hub.files(REPO, "stage1") if path.endswith("progress.json")]
    assert len(kept) == 1
    pushed = b"".join(hub.files(REPO, "stage1").values())
    assert str(config.parent).encode() not in pushed and str(tmp_path).encode() not in pushed
    refused = run(hub, tmp_path, *stage1(config, there, *PUSH), code=1)
    assert f"fetched {kept[0].split('/')[1]} of {REPO}@stage1" in refused and "max_steps was 400, is now 6" in refused
    assert "resumed from" in run(hub, tmp_path, *stage1(config, there, *PUSH, "--max_steps", 400))
    alone = copy_of_run(origin, tmp_path / "alone", "stage0")
    run(hub, tmp_path, *stage1(config, alone, "--max_steps", 400))
    assert weights(there) == weights(alone)
    assert read_log(there / "stage1") == read_log(alone / "stage1")


def test_another_machine_fetches_a_finished_stage_from_the_branch(hub, finished, tmp_path):
    config, origin = finished
    here, there = (copy_of_run(origin, tmp_path / name, "stage0") for name in ("here", "there"))
    run(hub, tmp_path, *stage1(config, here, *PUSH))
    options = yaml.safe_load(config.read_text())["dataset_kwargs"]
    elsewhere = json.dumps({**options, "cache_dir": str(tmp_path / "cache")})
    printed = run(hub, tmp_path, *stage1(config, there, *PUSH, "--dataset_kwargs", elsewhere))
    assert f"fetched the finished model of {REPO}@stage1-final" in printed and "skipped" in printed
    assert weights(there) == weights(here) and not (there / "stage1" / "checkpoints").exists()


def known_branches(hub):
    try:
        return hub.branches(REPO)
    except KeyError:
        return {}


def test_an_adapter_is_pushed_and_loads_in_one_call(hub, finished, tmp_path):
    config, origin = finished
    copy = copy_of_run(origin, tmp_path, "stage0")
    run(hub, tmp_path, *stage1(config, copy, *PUSH, "--encoder", "lora"))
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, torch, modeling_villa\nfrom transformers import AutoModel\n"
        "inputs = {'pixel_values': torch.ones(1, 3, 84, 84), 'boxes': torch.tensor([[[0.0, 0, 28, 28]]])}\n"
        "scores = [AutoModel.from_pretrained(name).eval()(**inputs).scores for name in sys.argv[1:]]\n"
        "print('difference', (scores[0] - scores[1]).abs().max().item())\n"
    )
    printed = run(hub, tmp_path, script, f"{REPO}-stage1-lora", REPO)
    assert float(printed.split("difference")[1]) < 1e-6
    assert hub.is_private(f"{REPO}-stage1-lora")


# What goes wrong


def test_a_hub_that_fails_every_third_request_gets_everything_in_the_end(hub, finished, tmp_path):
    config, origin = finished
    hub.fail_every = 3
    copy = copy_of_run(origin, tmp_path, "stage0")
    run(hub, tmp_path, *stage1(config, copy, *PUSH))
    assert hub.files(REPO)["model.safetensors"] == hub.files(REPO, "stage1-final")["model.safetensors"] == weights(copy)


def test_a_hub_that_dies_in_mid_upload_does_not_kill_the_run(hub, finished, tmp_path):
    config, origin = finished
    hub.die_in = lambda method, path: "/commit/" in path
    copy = copy_of_run(origin, tmp_path, "stage0")
    printed = run(hub, tmp_path, *stage1(config, copy, *PUSH))
    assert "trying again" in printed and "was given up; nothing is lost here" in printed
    assert "model.safetensors" not in hub.files(REPO)
    hub.die_in = 1  # the model's weights, once
    printed = run(hub, tmp_path, *stage1(config, copy, *PUSH))
    assert "skipped" in printed and hub.files(REPO)["model.safetensors"] == weights(copy)


def test_a_hub_that_is_away_does_not_kill_the_run(finished, tmp_path):
    config, origin = finished
    with LocalHub() as hub:
        pass
    copy = copy_of_run(origin, tmp_path, "stage0")
    printed = run(hub, tmp_path, *stage1(config, copy, *PUSH))
    assert "can't be reached now" in printed and weights(copy)


@pytest.mark.parametrize("kind", ["read", "none", "wrong"])
def test_a_token_that_may_not_write_is_named_before_any_training(hub, finished, tmp_path, kind):
    config, origin = finished
    token = {"read": hub.read_token, "none": "", "wrong": "hf_wrong"}[kind]
    copy = copy_of_run(origin, tmp_path, "stage0")
    printed = run(hub, tmp_path, *stage1(config, copy, *PUSH), token=token, code=1)
    assert f"--push_to_hub: the token may not write to {REPO}" in printed and "hf auth login" in printed
    assert not list((copy / "stage1").glob("checkpoints/*")) and (not token or token not in printed)


def test_what_is_not_on_the_hub_is_named(hub, finished, tmp_path):
    config, origin = finished
    copy = copy_of_run(origin, tmp_path, "stage0")
    printed = run(hub, tmp_path, *stage1(config, copy, "--vlm", "org/nothing"), code=1)
    assert "org/nothing is no folder here and no model on the Hub: RepositoryNotFoundError" in printed
    run(hub, tmp_path, *stage1(config, copy, *PUSH))
    printed = run(hub, tmp_path, *stage1(config, copy, "--vlm", f"{REPO}@nowhere"), code=1)
    assert f"{REPO}@nowhere is no folder here and no model on the Hub: RevisionNotFoundError" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--push_to_hub", "true"), "need --hub_model_id org/name"),
        (("--push_artifacts", "true"), "need --hub_model_id org/name"),
        (("--push_to_hub", "true", "--hub_model_id", "villa"), "need --hub_model_id org/name"),
        (("--dataset_kwargs", '{"token": "hf_x"}'), "must hold no token"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        stage_arguments("stage1", write_config(tmp_path), *words)


def test_a_slow_hub_holds_no_update_up(hub, tmp_path):
    hub.delay = 1.0
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path[:0] = [{str(ROOT / 'training')!r}]\n"
        "from pathlib import Path\nimport hub\nfrom stage1 import Stage1Arguments\n"
        "folder = Path(sys.argv[1])\nnewest = folder / 'checkpoints' / 'step-00000001'\n"
        "newest.mkdir(parents=True)\n(newest / 'model.safetensors').write_bytes(bytes(10_000_000))\n"
        "(folder / 'log.jsonl').write_text('')\n"
        f"args = Stage1Arguments(push_to_hub=True, hub_model_id={REPO!r})\n"
        "hub.open_branch(args, 'stage1')\nuploads = hub.Uploads(args, 'stage1', folder)\n"
        "waited = []\nfor step in range(2, 12):\n"
        "    newest = newest.rename(newest.with_name(f'step-{step:08d}'))\n"
        "    began = time.monotonic()\n    uploads.checkpoint(newest)\n    waited.append(time.monotonic() - began)\n"
        "    time.sleep(0.3)\nuploads.close()\nprint('longest wait', max(waited))\n"
    )
    printed = run(hub, tmp_path, script, tmp_path / "run")
    assert float(printed.split("longest wait")[1]) < 1  # every single request takes longer
    kept = [path for path in hub.files(REPO, "stage1") if path.startswith("checkpoints/step-")]
    assert len(kept) == 1
