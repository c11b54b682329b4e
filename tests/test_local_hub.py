"""The stand-in Hub as a server: who may use it, faults to order, and processes of their own as its clients."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from hub_helpers import REPO, WEIGHTS, add, methods
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save
from tiny_models import VLM

# The client itself uses a deprecated argument of its HTTP library for LFS objects.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).resolve().parent.parent
# What the client's connection says; it is no HfHubHTTPError, and which of them it is depends on the moment.
GONE = r"disconnected|reset|closed|refused|Broken pipe"

# Repositories and who may use them


def test_repositories_of_one_name_and_several_kinds_are_apart(hub, api):
    assert api.create_repo(REPO).repo_id == REPO
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.create_repo(REPO, repo_type="dataset", private=True).repo_type == "dataset"
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo(REPO)
    assert refused.value.response.status_code == 409
    assert (hub.is_private(REPO), hub.is_private(REPO, "dataset")) == (False, True)
    assert (api.model_info(REPO).private, api.dataset_info(REPO).private) == (False, True)
    assert api.create_repo("alone").repo_id == "tester/alone" and api.whoami()["name"] == "tester"
    api.delete_repo(REPO)
    assert (api.repo_exists(REPO), api.repo_exists(REPO, repo_type="dataset")) == (False, True)


@pytest.mark.parametrize("token", ["token", "read_token", None])
def test_what_is_missing_has_its_own_error(hub, repo, token, tmp_path):
    api = HfApi(endpoint=hub.url, token=token is not None and getattr(hub, token))
    errors = {
        ("org/missing", "config.json", "main"): RepositoryNotFoundError,
        ("missing", "config.json", "main"): RepositoryNotFoundError,
        (REPO, "config.json", "missing"): RevisionNotFoundError,
        (REPO, "missing.json", "main"): EntryNotFoundError,
    }
    for (repo_id, name, revision), error in errors.items():
        with pytest.raises(error) as raised:
            api.hf_hub_download(repo_id, name, revision=revision, cache_dir=tmp_path)
        unknown_to_a_stranger = error is RepositoryNotFoundError and token is None
        assert raised.value.response.status_code == (401 if unknown_to_a_stranger else 404)
        # The client's cache remembers by it that this commit has no such file.
        assert raised.value.response.headers.get("X-Repo-Commit") == (repo if error is EntryNotFoundError else None)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/missing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="missing")


@pytest.mark.parametrize(
    "write",
    [
        lambda api: api.create_repo("org/new"),
        lambda api: add(api, **{"new.txt": b"new"}),
        lambda api: add(api, **{"new.bin": b"new"}),
        lambda api: api.create_branch(REPO, branch="new"),
        lambda api: api.create_tag(REPO, tag="new"),
        lambda api: api.delete_file("config.json", REPO),
        lambda api: api.delete_repo(REPO),
    ],
)
def test_a_read_token_reads_and_does_not_write(hub, repo, write, tmp_path):
    reader, stranger = HfApi(endpoint=hub.url, token=hub.read_token), HfApi(endpoint=hub.url, token=False)
    for user, status in {reader: 403, stranger: 401}.items():
        with pytest.raises(HfHubHTTPError) as refused:
            write(user)
        assert (type(refused.value), refused.value.response.status_code) == (HfHubHTTPError, status)
    assert list(hub.repositories) == [("models", REPO)]
    assert (hub.branches(REPO), hub.tags(REPO)) == ({"main": repo}, {})
    assert Path(reader.hf_hub_download(REPO, "config.json", cache_dir=tmp_path)).read_bytes() == b"{}"


def test_a_private_repository_is_unknown_to_strangers(hub, api, tmp_path):
    api.create_repo(REPO, private=True)
    add(api, **{"model.safetensors": WEIGHTS})
    with pytest.raises(RepositoryNotFoundError) as refused:
        HfApi(endpoint=hub.url, token=False).hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    assert hub.is_private(REPO) and refused.value.response.status_code == 401
    reader = HfApi(endpoint=hub.url, token=hub.read_token)
    assert Path(reader.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)).read_bytes() == WEIGHTS
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.url, token="hf_wrong").model_info(REPO)


def test_a_request_that_it_does_not_know_is_refused_with_its_path(hub, api, repo):
    with pytest.raises(HfHubHTTPError, match="no answer to GET /api/models") as refused:
        list(api.list_models())
    assert refused.value.response.status_code == 501
    with pytest.raises(HfHubHTTPError, match="no pull requests"):
        api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=REPO, create_pr=True)


# Faults


def test_every_nth_request_fails_and_the_client_tries_some_of_them_again(hub, api):
    api.create_repo(REPO)
    hub.requests.clear()
    hub.fail_every = 4
    # preupload, batch, PUT, verify (503), verify, commit
    add(api, **{"model.safetensors": WEIGHTS})
    assert [path.rpartition("/")[2] for _, path in hub.requests][3:5] == ["verify", "verify"]
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS
    hub.requests.clear()
    hub.fail_every, hub.fail_status = 2, 500
    before = hub.branches(REPO)
    with pytest.raises(HfHubHTTPError) as failed:
        add(api, **{"config.json": b"{}"})
    assert failed.value.response.status_code == 500 and hub.branches(REPO) == before
    assert hub.requests[-1] == ("POST", f"/api/models/{REPO}/commit/main")
    hub.fail_every = None
    add(api, **{"config.json": b"{}"})
    assert hub.files(REPO)["config.json"] == b"{}"


def test_each_request_waits_and_the_others_do_not_wait_for_it(hub, api, repo, tmp_path):
    hub.delay = 0.3
    hub.requests.clear()
    start = time.monotonic()
    add(api, **{"config.json": b"[]"})
    assert time.monotonic() - start >= 0.3 * len(hub.requests) == 0.6
    hub.delay = 0.6
    with ThreadPoolExecutor(10) as pool:
        start = time.monotonic()
        list(pool.map(lambda _: api.whoami(), range(10)))
        assert time.monotonic() - start < 0.6 * 10
    with pytest.raises(Exception, match="timed out"):
        api.get_hf_file_metadata(url=hf_hub_url(REPO, "config.json", endpoint=hub.url), timeout=0.1)


def test_a_cut_upload_is_sent_again(hub, api):
    api.create_repo(REPO)
    hub.die_in = 1
    add(api, **{"model.safetensors": WEIGHTS})
    assert methods(hub, "/storage/") == ["PUT", "PUT"]
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS and hub.die_in is None


def test_a_cut_commit_leaves_nothing_and_the_object_is_not_sent_again(hub, api, repo):
    other = save({"weight": torch.ones(5)})
    hub.requests.clear()
    hub.die_in = 2
    with pytest.raises(Exception, match=GONE):
        add(api, **{"other.safetensors": other})
    assert methods(hub, "/commit/") == ["POST"]
    assert hub.branches(REPO) == {"main": repo} and "other.safetensors" not in hub.files(REPO)
    add(api, **{"other.safetensors": other})
    assert methods(hub, "/storage/") == ["PUT"] and hub.files(REPO)["other.safetensors"] == other


def test_chosen_uploads_are_cut_until_it_is_told_otherwise(hub, api, repo):
    api.create_branch(REPO, branch="stage1")
    hub.die_in = lambda method, path: path.endswith("/commit/stage1")
    for _ in range(2):
        with pytest.raises(Exception, match=GONE):
            add(api, revision="stage1", **{"a.txt": b"a"})
    add(api, **{"a.txt": b"a"})
    assert hub.branches(REPO)["stage1"] == repo != hub.branches(REPO)["main"]


def test_a_cut_upload_ends_in_its_middle_without_an_answer(hub, repo):
    hub.die_in = 1
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=20)
    connection.putrequest("POST", f"/api/models/{REPO}/commit/main")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"a" * 400)
    connection.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        connection.sock.recv(1)
    connection.sock.settimeout(20)
    connection.send(b"a" * 300)
    with pytest.raises(ConnectionError):
        connection.getresponse()


def test_a_hub_that_is_gone_answers_nobody(hub, api, repo, tmp_path, monkeypatch):
    path = Path(api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path))
    hub.__exit__()
    with pytest.raises(Exception, match=GONE):
        api.model_info(REPO)
    assert Path(api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path)) == path
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(LocalEntryNotFoundError):
        api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)


# Processes of their own


def run(script, hub, cache, *words, **environment):
    """Run a script that uses the Hub; returns the JSON that it prints last."""
    environment = {**os.environ, **hub.environment(cache), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, cwd=cache, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MODEL_SCRIPT = """
import json, sys
import torch
from transformers import AutoModel
from modeling_villa import VillaClipConfig, VillaClipModel

model = VillaClipModel(VillaClipConfig(**json.loads(sys.argv[1]))).eval()
model.save_pretrained("saved")
model.push_to_hub("org/villa", revision="stage1")
model.push_to_hub("org/villa", revision="stage1")
loaded = VillaClipModel.from_pretrained("org/villa", revision="stage1").eval()
by_name = AutoModel.from_pretrained("org/villa", revision="stage1").eval()
batch = {"input_ids": torch.tensor([[0, 7, 8, 3]]), "pixel_values": torch.randn(1, 3, 32, 32)}
with torch.no_grad():
    expected = model(**batch).logits_per_image
    equal = [torch.equal(other(**batch).logits_per_image, expected) for other in (loaded, by_name)]
weights, others = model.state_dict(), loaded.state_dict()
equal.append(weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights))
errors = []
for words in ({"revision": "main"}, {"revision": "missing"}):
    try:
        VillaClipModel.from_pretrained("org/villa", **words)
    except OSError as error:
        errors.append(str(error))
print(json.dumps([equal, errors]))
"""


def test_a_model_is_pushed_to_a_branch_and_loaded_from_it_bit_equal(hub, tmp_path):
    equal, errors = run(MODEL_SCRIPT, hub, tmp_path, json.dumps(VLM))
    assert equal == [True, True, True]
    assert "does not appear to have a file" in errors[0] and "not a valid git identifier" in errors[1]
    files = hub.files("org/villa", "stage1")
    assert files["model.safetensors"] == (tmp_path / "saved" / "model.safetensors").read_bytes()
    assert list(hub.files("org/villa")) == [".gitattributes"]
    assert methods(hub, "/commit/") == ["POST"] and methods(hub, "/storage/") == ["PUT", "GET"]


DATASET_SCRIPT = """
import json, sys
import datasets
from datasets import Dataset, DatasetDict, get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetNotFoundError

# datasets would look for its viewer at a host name made from the Hub's, by asking the network.
datasets.config.USE_PARQUET_EXPORT = False


def made(factor):
    return DatasetDict({
        "train": Dataset.from_dict({"x": [factor * i for i in range(6)]}),
        "test": Dataset.from_dict({"x": [factor]}),
    })


# A default can be named in the first push or not at all: datasets 5.2 ends in a KeyError where it is named later.
made(10).push_to_hub("org/numbers", "tens", set_default=True, private=True)
made(2).push_to_hub("org/numbers", "even")
made(1).push_to_hub("org/numbers", "even", revision="draft")
result = {
    "names": get_dataset_config_names("org/numbers"),
    "even": load_dataset("org/numbers", "even")["train"]["x"][:],
    "tens": load_dataset("org/numbers", "tens", split="train")["x"][:],
    "default": load_dataset("org/numbers", split="test")["x"][:],
    "draft": load_dataset("org/numbers", "even", revision="draft", split="train")["x"][:],
    "streamed": [row["x"] for row in load_dataset("org/numbers", "tens", split="train", streaming=True)],
}
try:
    load_dataset("org/missing")
except DatasetNotFoundError:
    result["missing"] = True
print(json.dumps(result))
"""


def test_a_dataset_with_two_configs_is_pushed_and_loaded(hub, tmp_path):
    result = run(DATASET_SCRIPT, hub, tmp_path)
    assert sorted(result["names"]) == ["even", "tens"] and result["missing"]
    assert result["even"] == [0, 2, 4, 6, 8, 10] and result["default"] == [10]
    assert result["tens"] == result["streamed"] == [0, 10, 20, 30, 40, 50] and result["draft"] == list(range(6))
    files = hub.files("org/numbers", repo_type="dataset")
    assert set(files) == {".gitattributes", "README.md"} | {
        f"{config}/{split}-00000-of-00001.parquet" for config in ("even", "tens") for split in ("train", "test")
    }
    assert hub.is_private("org/numbers", "dataset") and set(hub.branches("org/numbers", "dataset")) == {"main", "draft"}


def test_a_process_without_a_token_is_a_stranger(hub, api, tmp_path):
    api.create_repo(REPO, private=True)
    script = "import json; from huggingface_hub import repo_exists; print(json.dumps(repo_exists('org/model')))"
    assert run(script, hub, tmp_path) is True
    assert run(script, hub, tmp_path, **hub.environment(tmp_path, token=hub.read_token)) is True
    assert run(script, hub, tmp_path, **hub.environment(tmp_path, token="")) is False


def test_it_serves_by_hand_until_it_is_interrupted():
    command = [sys.executable, Path(__file__).with_name("local_hub.py"), "--delay", "0.2"]
    # As a shell starts it in the background: with the interrupt ignored.
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **ignored) as process:
        try:
            exports = {}
            while (line := process.stdout.readline()).startswith("export "):
                name, _, value = line.removeprefix("export ").strip().partition("=")
                exports[name] = value
            assert Path(exports["HF_HOME"]).is_dir() and exports["HF_HUB_OFFLINE"] == "0"
            connection = http.client.HTTPConnection(urlsplit(exports["HF_ENDPOINT"]).netloc, timeout=20)
            start = time.monotonic()
            connection.request("GET", "/api/whoami-v2", headers={"Authorization": f"Bearer {exports['HF_TOKEN']}"})
            assert json.load(connection.getresponse())["name"] == "tester" and time.monotonic() - start >= 0.2
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    assert not Path(exports["HF_HOME"]).exists()
