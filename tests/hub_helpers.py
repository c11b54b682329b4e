"""What the tests of the stand-in Hub share beside their fixtures in conftest.py."""

import torch
from huggingface_hub import CommitOperationAdd
from safetensors.torch import save

REPO = "org/model"
WEIGHTS = save({"weight": torch.arange(64.0)})


def add(api, revision=None, repo_id=REPO, **files):
    """One commit; returns its id."""
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo_id, operations, commit_message="Add " + ", ".join(files), revision=revision).oid


def methods(hub, word):
    """The methods of the requests whose path has this word in it."""
    return [method for method, path in hub.requests if word in path]
