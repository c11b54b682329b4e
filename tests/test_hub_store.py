"""What the stand-in Hub holds, asked by huggingface_hub: files, LFS objects, commits, branches and tags."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from hub_helpers import REPO, WEIGHTS, add, methods
from hub_store import LFS_BYTES, Repository
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard, get_session, hf_hub_url
from huggingface_hub.errors import BadRequestError, EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from safetensors.torch import save

# The client itself uses a deprecated argument of its HTTP library for LFS objects.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# Files


def test_uploads_come_back_bit_equal_and_large_files_travel_by_way_of_the_storage(hub, api, repo, tmp_path):
    assert (methods(hub, "/storage/"), methods(hub, "/info/lfs/")) == (["PUT"], ["POST", "POST"])
    for name, content in {"config.json": b"{}", "model.safetensors": WEIGHTS}.items():
        path = Path(api.hf_hub_download(REPO, name, cache_dir=tmp_path))
        assert path.read_bytes() == content == hub.files(REPO)[name]
        assert path.parent.name == repo
    assert methods(hub, "/storage/") == ["PUT", "GET"]
    config, weights = api.get_paths_info(REPO, ["config.json", "model.safetensors", "missing"])
    assert (config.lfs, config.size) == (None, 2)
    assert (weights.lfs.size, weights.size) == (len(WEIGHTS), len(WEIGHTS))


def test_a_download_from_the_storage_needs_no_token_and_can_be_a_range(hub, api, repo):
    location = api.get_hf_file_metadata(url=hf_hub_url(REPO, "model.safetensors", endpoint=hub.url)).location
    assert urlsplit(location).hostname != urlsplit(hub.url).hostname
    part = get_session().get(location, headers={"Range": "bytes=8-15"})
    assert (part.status_code, part.content) == (206, WEIGHTS[8:16])
    rest = get_session().get(location, headers={"Range": "bytes=8-"})
    assert (rest.content, rest.headers["Content-Range"]) == (WEIGHTS[8:], f"bytes 8-{len(WEIGHTS) - 1}/{len(WEIGHTS)}")
    assert get_session().get(location.split("?")[0]).status_code == 403
    assert get_session().put(location, content=b"other").status_code == 403


def test_an_object_that_is_not_what_was_announced_is_refused(hub, repo):
    announced = {"oid": "0" * 64, "size": 3}
    words = {"headers": {"Authorization": f"Bearer {hub.token}"}}
    batch = f"{hub.url}/{REPO}.git/info/lfs/objects/batch"
    actions = get_session().post(batch, json={"objects": [announced]}, **words).json()["objects"][0]["actions"]
    assert get_session().put(actions["upload"]["href"], content=b"abc").status_code == 400
    assert get_session().post(actions["verify"]["href"], json=announced, **words).status_code == 404


@pytest.mark.parametrize(
    "path, content, lfs",
    [
        ("notes.txt", b"text", False),
        ("letters.txt", "\u00e9".encode() * 600, False),
        ("model.safetensors", b"text", True),
        ("weights.bin", b"text", True),
        ("data/train.parquet", b"text", True),
        ("a.png", b"text", True),
        ("noise.dat", b"\0\1", True),
        ("limit.txt", b"a" * LFS_BYTES, False),
        ("large.txt", b"a" * (LFS_BYTES + 1), True),
    ],
)
@pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file")
def test_the_hub_decides_which_files_are_lfs_objects(hub, api, path, content, lfs):
    api.create_repo(REPO)
    add(api, **{path: content})
    assert (api.get_paths_info(REPO, path)[0].lfs is not None) == lfs
    assert hub.files(REPO)[path] == content


def test_folders_are_listed_and_deleted(hub, api, repo):
    add(api, **{"logs/a.txt": b"a", "logs/deep/b.txt": b"b", "logs.txt": b"c"})
    top = {entry.path: type(entry).__name__ for entry in api.list_repo_tree(REPO)}
    assert top == {
        ".gitattributes": "RepoFile",
        "config.json": "RepoFile",
        "model.safetensors": "RepoFile",
        "logs": "RepoFolder",
        "logs.txt": "RepoFile",
    }
    assert [entry.path for entry in api.list_repo_tree(REPO, "logs/deep")] == ["logs/deep/b.txt"]
    assert set(api.list_repo_files(REPO)) == set(hub.files(REPO))
    assert api.file_exists(REPO, "logs/a.txt") and not api.file_exists(REPO, "logs/c.txt")
    api.delete_folder("logs", REPO)
    api.delete_file("config.json", REPO)
    assert set(hub.files(REPO)) == {".gitattributes", "model.safetensors", "logs.txt"}
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "logs"))


# Commits, branches, tags


def test_branches_and_tags_keep_their_files(hub, api, repo, tmp_path):
    api.create_branch(REPO, branch="stage1")
    first = add(api, revision="stage1", **{"config.json": b'{"stage": 1}'})
    api.create_tag(REPO, tag="stage1-step3", revision="stage1")
    second = add(api, revision="stage1", **{"config.json": b'{"stage": 1, "step": 6}'})
    assert hub.branches(REPO) == {"main": repo, "stage1": second} and hub.tags(REPO) == {"stage1-step3": first}
    texts = {"main": "{}", "stage1": '{"stage": 1, "step": 6}', "stage1-step3": '{"stage": 1}', first: '{"stage": 1}'}
    for revision, text in texts.items():
        assert hub.files(REPO, revision)["config.json"].decode() == text
        assert Path(api.hf_hub_download(REPO, "config.json", revision=revision, cache_dir=tmp_path)).read_text() == text
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == hub.branches(REPO)
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("stage1-step3", first)]
    assert api.model_info(REPO, revision="stage1").sha == second
    titles = [(commit.commit_id, commit.title) for commit in api.list_repo_commits(REPO, revision="stage1")]
    assert titles[:3] == [
        (second, "Add config.json"),
        (first, "Add config.json"),
        (repo, "Add config.json, model.safetensors"),
    ]
    assert titles[3][1] == "initial commit" and len(titles) == 4


def test_branches_and_tags_are_made_and_removed_once(hub, api, repo):
    api.create_branch(REPO, branch="runs/a", revision=repo)
    api.create_branch(REPO, branch="runs/a", exist_ok=True)
    api.create_tag(REPO, tag="v1")
    api.create_tag(REPO, tag="v1", exist_ok=True)
    for again in (lambda: api.create_branch(REPO, branch="runs/a"), lambda: api.create_tag(REPO, tag="v1")):
        with pytest.raises(HfHubHTTPError) as refused:
            again()
        assert refused.value.response.status_code == 409
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(REPO, branch="b", revision="missing")
    api.delete_branch(REPO, branch="runs/a")
    api.delete_tag(REPO, tag="v1")
    assert (hub.branches(REPO), hub.tags(REPO)) == ({"main": repo}, {})
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(REPO, tag="v1")
    with pytest.raises(BadRequestError):
        api.delete_branch(REPO, branch="main")


def test_a_commit_happens_as_a_whole_or_not_at_all(hub, api, repo):
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("missing.txt")]
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, operations, commit_message="Half of it works")
    late = {"commit_message": "Too late", "parent_commit": api.list_repo_commits(REPO)[-1].commit_id}
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit(REPO, [CommitOperationAdd("new.txt", b"new")], **late)
    assert refused.value.response.status_code == 412
    never_uploaded = CommitOperationAdd("other.safetensors", save({"weight": torch.ones(3)}))
    never_uploaded._upload_mode, never_uploaded._is_uploaded, never_uploaded._should_ignore = "lfs", True, False
    with pytest.raises(BadRequestError, match="never uploaded"):
        api.create_commit(REPO, [CommitOperationAdd("new.txt", b"new"), never_uploaded], commit_message="No object")
    with pytest.raises(RevisionNotFoundError):
        add(api, revision="missing", **{"new.txt": b"new"})
    assert hub.branches(REPO) == {"main": repo} and "new.txt" not in hub.files(REPO)


def test_commits_at_the_same_time_all_count(hub, api, repo, monkeypatch):
    apply = Repository._apply
    monkeypatch.setattr(Repository, "_apply", lambda *words: (time.sleep(0.01), apply(*words)))
    with ThreadPoolExecutor(8) as pool:
        commits = list(pool.map(lambda i: add(api, **{f"{i}.txt": b"a"}), range(16)))
    assert set(hub.files(REPO)) >= {f"{i}.txt" for i in range(16)}
    history = [commit.commit_id for commit in api.list_repo_commits(REPO)]
    assert set(history[:16]) == set(commits) and history[16] == repo


def test_files_that_are_there_are_neither_sent_nor_committed_again(hub, api, repo):
    hub.requests.clear()
    assert add(api, **{"config.json": b"{}", "model.safetensors": WEIGHTS}) == repo
    assert (methods(hub, "/storage/"), methods(hub, "/commit/")) == ([], [])
    add(api, **{"copy.safetensors": WEIGHTS})
    assert (methods(hub, "/storage/"), methods(hub, "/commit/")) == ([], ["POST"])


def test_snapshots_follow_a_branch_and_download_once(hub, api, repo, tmp_path):
    api.create_branch(REPO, branch="stage1")
    commit = add(api, revision="stage1", **{"logs/a.txt": b"a"})
    folder = Path(api.snapshot_download(REPO, revision="stage1", cache_dir=tmp_path))
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert (found, folder.name) == (hub.files(REPO, "stage1"), commit)
    hub.requests.clear()
    assert Path(api.snapshot_download(REPO, revision=commit, cache_dir=tmp_path)) == folder
    assert "GET" not in methods(hub, "/resolve/") + methods(hub, "/storage/")
    main = Path(api.snapshot_download(REPO, cache_dir=tmp_path, allow_patterns="*.json"))
    assert [path.name for path in main.iterdir()] == ["config.json"]


def test_a_folder_and_a_card_are_pushed(hub, api, repo, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    api.upload_folder(repo_id=REPO, folder_path=tmp_path, path_in_repo="run")
    assert hub.files(REPO)["run/sub/a.txt"] == b"a" and hub.files(REPO)["run/b.bin"] == bytes(range(256))
    card = ModelCard("---\nlicense: apache-2.0\n---\n# A model\n")
    api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=REPO)
    assert ("POST", "/api/validate-yaml") in hub.requests and hub.files(REPO)["README.md"] == str(card).encode()
