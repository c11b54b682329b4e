"""Single transfers of training/hub.py between this process and a stand-in Hub, and what may go wrong in each."""

import json
import logging
import shutil
import socket
import threading
import time

import datasets
import pytest
from huggingface_hub import HfApi, close_session, constants, get_session
from local_hub import LocalHub
from training_helpers import copy_of_run, files_of, finished_run, stage_arguments, write_config

import embed_regions
import hub as transfers
import stage1
from artifacts import META_FILE, fingerprint_of_model, write_meta
from card import CardFacts
from datasets_scripts.schema import attribute_names
from loop import identity
from stage import load_splits

# The client itself uses a deprecated argument of its HTTP library for LFS objects.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "org/villa-docmnist"
META = {"stage": "stage1", "seed": 0, "dataset": "docmnist"}


def use(url, token, monkeypatch, tmp_path):
    """Let this process's huggingface_hub and datasets use another Hub, with an empty cache and no pauses."""
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hf"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {
        "HF_ENDPOINT": url,
        "HF_DATASETS_CACHE": tmp_path / "datasets",
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for made_once in (transfers._make_repository, transfers._make_branch):
        made_once.cache_clear()
    close_session()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LocalHub() as hub:
        use(hub.url, hub.token, monkeypatch, tmp_path)
        yield hub
    close_session()


@pytest.fixture
def silent(monkeypatch, tmp_path):
    """A Hub that takes every connection and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        use(f"http://127.0.0.1:{server.getsockname()[1]}", "hf_x", monkeypatch, tmp_path)
        monkeypatch.setattr(transfers, "SILENCE", 0.2)
        yield
    close_session()


@pytest.fixture
def args(tmp_path):
    return arguments(tmp_path)


def arguments(folder, *words, stage="stage1"):
    push = ("--push_to_hub", "true", "--hub_model_id", REPO)
    return stage_arguments(stage, write_config(folder), *push, *words)


def checkpoint(output_dir, step, folder=None):
    """A checkpoint as the training loop leaves it, with a log; returns its folder."""
    newest = (folder or output_dir / "checkpoints") / f"step-{step:08d}"
    newest.mkdir(parents=True)
    (newest / "model.safetensors").write_bytes(b"weights of %d" % step)
    (newest / "progress.json").write_text(json.dumps({"progress": {"step": step}, "with": {"seed": 0}}))
    (newest.parent / "log.jsonl").write_text(f"log of {step}")
    return newest


def send(args, folder):
    return transfers._persist("sending", transfers._upload(args, REPO, args.stage, folder, "checkpoints/"))


def on_branch(hub, branch="stage1"):
    """The steps of the checkpoints on a branch."""
    return {path.split("/")[1] for path in hub.files(REPO, branch) if path.startswith("checkpoints/step-")}


def model(folder, stage="stage1", **more):
    """A finished model's folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"of": stage}))
    (folder / "model.safetensors").write_bytes(f"weights of {stage}".encode())
    write_meta(folder, {**META, "stage": stage, **more})
    return folder


def push(args, tmp_path):
    facts = CardFacts(args, args.stage, REPO)
    transfers.push_model(model(tmp_path / f"pushed-{args.stage}" / "model", args.stage), facts)


def is_at(hub, revision, stage):
    return json.loads(hub.files(REPO, revision)["config.json"]) == {"of": stage}


# What a branch holds


def test_a_new_stages_branch_holds_nothing_of_the_stage_before(hub, tmp_path):
    push(arguments(tmp_path, stage="stage0"), tmp_path)
    assert is_at(hub, "main", "stage0")
    assert transfers.open_branch(arguments(tmp_path), "stage1")
    assert set(hub.files(REPO, "stage1")) == {".gitattributes", "README.md"}


@pytest.mark.parametrize("every", [3, 4, 5])
def test_everything_arrives_where_every_few_requests_fail(hub, args, tmp_path, every):
    hub.fail_every = every
    checkpoint(tmp_path / "run", 2)
    assert send(args, tmp_path / "run" / "checkpoints") and on_branch(hub) == {"step-00000002"}
    push(args, tmp_path)
    assert is_at(hub, "main", "stage1") and is_at(hub, "stage1-final", "stage1") and not on_branch(hub)


def test_a_commit_that_went_through_without_an_answer_is_no_failure(hub, args, tmp_path, monkeypatch):
    checkpoint(tmp_path / "run", 2)
    send(args, tmp_path / "run" / "checkpoints")
    client, lost = get_session(), []
    post = client.post

    def lose_the_first_answer(url, **options):
        response = post(url, **options)
        if "/commit/" in url and not lost:
            lost.append(url)
            raise ConnectionResetError
        return response

    monkeypatch.setattr(client, "post", lose_the_first_answer)
    push(args, tmp_path)  # removes the checkpoint
    assert lost and not on_branch(hub)
    assert is_at(hub, "stage1-final", "stage1") and is_at(hub, "main", "stage1")


def asks_for_main(method, path):
    return method in ("GET", "HEAD") and ("/resolve/" in path or path.endswith("/revision/main"))


def test_main_is_left_alone_where_it_can_not_be_asked_for_its_stage(hub, tmp_path, caplog):
    earlier = arguments(tmp_path, stage="stage0")
    push(arguments(tmp_path), tmp_path)
    hub.fail_every = asks_for_main
    push(earlier, tmp_path)
    assert is_at(hub, "stage0-final", "stage0") and is_at(hub, "main", "stage1")
    assert f"asking {REPO}@main for its stage was given up" in caplog.text
    hub.fail_every = None
    shutil.rmtree(tmp_path / "pushed-stage0")
    push(earlier, tmp_path)
    assert is_at(hub, "main", "stage1")


# Checkpoints of another machine


def test_the_branchs_checkpoint_is_fetched_if_it_is_newer_than_the_one_here(hub, args, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    here, there = tmp_path / "here", tmp_path / "there"
    checkpoint(here, 2)
    checkpoint(there, 4)
    send(args, there / "checkpoints")
    transfers.fetch_checkpoint(args, "stage1", here, {"seed": 1})
    assert not (here / "checkpoints" / "step-00000004").exists()
    assert f"step-00000004 of {REPO}@stage1 is not fetched: seed was 0, is now 1" in caplog.text
    transfers.fetch_checkpoint(args, "stage1", here, {"seed": 0})
    assert files_of(here / "checkpoints" / "step-00000004") == files_of(there / "checkpoints" / "step-00000004")
    assert (here / "log.jsonl").read_text() == "log of 4"
    assert f"fetched step-00000004 of {REPO}@stage1; the newest here was step-00000002" in caplog.text


@pytest.mark.parametrize("step", [4, 6])
def test_a_newer_checkpoint_here_is_not_replaced(hub, args, tmp_path, step):
    here, there = tmp_path / "here", tmp_path / "there"
    checkpoint(here, step)
    before = files_of(here)
    checkpoint(there, 4)
    send(args, there / "checkpoints")
    hub.requests.clear()
    transfers.fetch_checkpoint(args, "stage1", here, {"seed": 0})
    assert files_of(here) == before
    assert len(hub.requests) == 1  # the names of what is there


def test_a_later_checkpoint_on_the_branch_is_replaced_only_by_a_run_that_starts_anew(hub, args, tmp_path):
    for step in (2, 4):
        checkpoint(tmp_path / str(step), step)
    assert send(args, tmp_path / "4" / "checkpoints")
    assert not send(args, tmp_path / "2" / "checkpoints") and on_branch(hub) == {"step-00000004"}
    assert send(arguments(tmp_path, "--no_resume"), tmp_path / "2" / "checkpoints")
    assert on_branch(hub) == {"step-00000002"}


def test_a_branch_that_can_not_be_asked_stops_only_a_run_that_has_no_checkpoint(hub, args, tmp_path):
    assert transfers.open_branch(args, "stage1")
    hub.fail_every = 1
    with pytest.raises(ConnectionError, match=f"{REPO}@stage1 may hold a checkpoint"):
        transfers.fetch_checkpoint(args, "stage1", tmp_path / "here", {"seed": 0})
    checkpoint(tmp_path / "here", 2)
    transfers.fetch_checkpoint(args, "stage1", tmp_path / "here", {"seed": 0})


# Finished models of another machine


def test_a_finished_model_is_fetched_without_what_is_the_hubs(hub, args, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    push(args, tmp_path)
    checkpoint(tmp_path / "run", 2)
    send(args, tmp_path / "run" / "checkpoints")  # the branch goes on, the tag stays
    transfers.fetch_model(args, tmp_path / "there" / "model", META)
    assert files_of(tmp_path / "there" / "model") == files_of(tmp_path / "pushed-stage1" / "model")
    assert f"fetched the finished model of {REPO}@stage1-final" in caplog.text


def test_a_finished_model_of_other_things_is_not_fetched(hub, args, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    push(args, tmp_path)
    transfers.fetch_model(args, tmp_path / "there" / "model", {**META, "seed": 1})
    assert not (tmp_path / "there").exists()
    assert f"{REPO}@stage1-final was made otherwise and is not fetched: seed was 0, is now 1" in caplog.text


def test_nothing_is_fetched_over_a_model_here_or_for_a_run_that_starts_anew(hub, args, tmp_path):
    push(args, tmp_path)
    here = model(tmp_path / "here" / "model")
    hub.requests.clear()
    transfers.fetch_model(args, here, META)
    transfers.fetch_model(arguments(tmp_path, "--no_resume"), tmp_path / "there" / "model", META)
    assert not hub.requests


def test_a_hub_without_the_model_is_asked_once_and_nothing_said(hub, args, tmp_path, caplog):
    transfers.fetch_model(args, tmp_path / "there" / "model", META)
    transfers.open_branch(args, "stage1")
    transfers.fetch_model(args, tmp_path / "there" / "model", META)
    transfers.fetch_model(arguments(tmp_path, "--hub_model_id", "org/a..b"), tmp_path / "there" / "model", META)
    assert not (tmp_path / "there").exists() and not caplog.records
    assert [path for _, path in hub.requests if path.endswith("/revision/stage1-final")] == [
        f"/api/models/{REPO}/revision/stage1-final"
    ] * 2


# A Hub that says nothing


@pytest.mark.parametrize("what", ["open_branch", "fetch_model", "_listing", "list_repo_files"])
def test_a_hub_that_takes_connections_and_says_nothing_is_given_up(silent, args, tmp_path, what):
    def ask():
        try:
            if what == "open_branch":
                answers.append(transfers.open_branch(args, "stage1"))
            elif what == "fetch_model":
                answers.append(transfers.fetch_model(args, tmp_path / "model", META))
            elif what == "_listing":
                transfers._listing(REPO, "main")
            else:
                HfApi().list_repo_files(REPO)  # sets "no limit" of its own
        except transfers.FAILURES:
            answers.append(None)

    answers = []
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and not any(answers) and len(answers) == 1


# Folders of this machine


def test_nothing_of_a_checkpoint_names_a_folder_of_this_machine(tmp_path):
    options = {"digits": str(tmp_path / "digits"), "cache_dir": str(tmp_path / "cache"), "complexity": 5.0}
    (tmp_path / "corpus").mkdir()
    words = ("--dataset", tmp_path / "corpus", "--dataset_kwargs", json.dumps(options))
    compared = identity(arguments(tmp_path, *words))
    assert str(tmp_path) not in json.dumps(compared)
    assert compared["dataset"] == "corpus"
    assert json.loads(compared["dataset_kwargs"]) == {"digits": "digits", "cache_dir": "cache", "complexity": 5.0}


# Region store and pairs


def test_a_region_store_on_a_branch_is_what_stage_1_trains_from(hub, tmp_path, tmp_path_factory, fresh_accelerate):
    config, origin = finished_run(tmp_path_factory)
    copy = copy_of_run(origin, tmp_path, "stage0", "embed_regions")
    words = ("--run_dir", copy, "--push_artifacts", "true", "--hub_model_id", REPO)
    embed_regions.run(stage_arguments("embed_regions", config, *words))
    store = f"{REPO}-regions"
    assert hub.is_private(store, "dataset")
    api = HfApi()
    api.create_branch(store, branch="first", repo_type="dataset")
    api.delete_file(META_FILE, store, repo_type="dataset")
    with pytest.raises(ValueError, match=f"{store} is no folder here and no dataset on the Hub"):
        transfers.open_artifact(store, "embed_regions")
    splits, vlm = load_splits(stage_arguments("stage1", config)), copy / "stage0" / "model"
    theirs, ours = (stage1.read_store(name, vlm, splits) for name in (f"{store}@first", copy / "embed_regions"))
    assert fingerprint_of_model(vlm, "stage0") == transfers.open_artifact(f"{store}@first", "embed_regions")[1]["model"]
    collate = stage1.StoreCollator(len(attribute_names(splits["train"])))
    for split, rows in splits.items():
        assert len(theirs[split]) == len(ours[split]) == len(rows)
        left, right = (collate([store[split][i] for i in range(len(rows))]) for store in (theirs, ours))
        assert left["image_id"] == right["image_id"] == list(rows["image_id"])
        for name in ("region_embeds", "region_mask", "labels"):
            assert left[name].dtype == right[name].dtype and left[name].equal(right[name])


def test_what_is_no_dataset_on_the_hub_is_named(hub):
    with pytest.raises(ValueError, match="org/nothing@first is no folder here and no dataset on the Hub"):
        transfers.open_artifact("org/nothing@first", "embed_regions")
