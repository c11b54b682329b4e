"""What the stand-in Hub holds, in memory: repositories, their commits, branches, tags and LFS objects; no network."""

import base64
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".png")
LFS_BYTES = 1_000_000


def is_lfs(path, size, sample):
    """Whether the Hub wants this file as an LFS object; `sample` is how it begins."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES or b"\0" in sample


class Refusal(Exception):
    """An answer that is an error; the client picks the class of its exception by `code`, not by the status."""

    def __init__(self, status, message, code=None, **fields):
        super().__init__(message)
        self.status, self.content = status, json.dumps({"error": message, **fields}).encode()
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@dataclass
class File:
    """One file of a commit."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_id(self):
        """Git's id of what git holds: for LFS that is the pointer."""
        return hashlib.sha1(b"blob %d\0" % len(self.stored) + self.stored).hexdigest()

    @property
    def stored(self):
        if not self.lfs:
            return self.content
        lines = "version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.content)}"
        return "\n".join([*lines, ""]).encode()

    @property
    def etag(self):
        """What the client compares and names its cache by: SHA-256 of an LFS object, else git's id."""
        return self.sha256 if self.lfs else self.blob_id

    def entry(self, path):
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.stored)}
        return entry


@dataclass
class Commit:
    """A snapshot of all files; `parent` is None in the first one."""

    id: str
    parent: "Commit | None"
    title: str
    description: str
    date: str
    files: dict

    def entries(self):
        """Path -> description of each file and folder."""
        entries = {path: file.entry(path) for path, file in sorted(self.files.items())}
        for path in self.files:
            for parent in list(Path(path).parents)[:-1]:
                oid = hashlib.sha1(f"{self.id}/{parent}".encode()).hexdigest()
                entries[str(parent)] = {"type": "directory", "path": str(parent), "size": 0, "oid": oid}
        return entries

    def history(self):
        """This commit and all before it, newest first."""
        commit = self
        while commit is not None:
            yield commit
            commit = commit.parent


class Repository:
    """Commits, the branches and tags that point to them, and the LFS objects that were uploaded, by their SHA-256."""

    def __init__(self, kind, name, private):
        self.kind, self.name, self.private = kind, name, private
        self.commits, self.branches, self.tags, self.objects = {}, {"main": None}, {}, {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self._add_commit("main", {"summary": "initial commit"}, {".gitattributes": File(attributes.encode(), False)})

    @property
    def path(self):
        """Where a browser would find it: models have no prefix."""
        return self.name if self.kind == "models" else f"{self.kind}/{self.name}"

    @property
    def created(self):
        """The date of the first commit."""
        return next(iter(self.commits.values())).date

    def at(self, revision):
        """The commit of a branch, a tag or a full commit id."""
        for names in (self.branches, self.tags):
            revision = names.get(revision, revision)
        if revision not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[revision]

    def add_branch(self, branch, revision):
        self._add_name(self.branches, branch, revision)

    def remove_branch(self, branch):
        if branch == "main":
            raise Refusal(400, "The branch main cannot be deleted")
        self._remove_name(self.branches, branch)

    def add_tag(self, tag, revision):
        self._add_name(self.tags, tag, revision)

    def remove_tag(self, tag):
        self._remove_name(self.tags, tag)

    def _add_name(self, names, name, revision):
        target = self.at(revision).id
        if name in names:
            raise Refusal(409, f"Reference already exists: {name}")
        names[name] = target

    def _remove_name(self, names, name):
        if names.pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def add_object(self, sha256, content):
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refusal(400, "The upload is not what its address says")
        self.objects[sha256] = content

    def commit(self, branch, header, operations):
        """Apply all operations or none."""
        if branch not in self.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = self.at(branch)
        if header.get("parentCommit") not in (None, head.id):
            raise Refusal(412, f"A commit has happened since: {branch} is at {head.id}")
        files = dict(head.files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        return self._add_commit(branch, header, files)

    def _apply(self, files, key, value):
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                raise Refusal(400, f"LFS object of {path} was never uploaded: {value['oid']}")
            files[path] = File(self.objects[value["oid"]], True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(folder))]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(501, f"LocalHub has no commit operation {key!r}")

    def _add_commit(self, branch, header, files):
        parent = self.commits.get(self.branches[branch])
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        oids = {path: file.blob_id for path, file in files.items()}
        text = json.dumps([self.path, len(self.commits), parent and parent.id, header, date, oids])
        commit_id = hashlib.sha1(text.encode()).hexdigest()
        commit = Commit(commit_id, parent, header["summary"], header.get("description", ""), date, files)
        self.commits[commit_id] = commit
        self.branches[branch] = commit_id
        return commit


class Store:
    """All repositories, by ("models", "datasets" or "spaces", name), and what tests ask about them."""

    def __init__(self):
        self.repositories = {}

    def repository(self, repo_id, repo_type="model"):
        """The repository; KeyError if there is none."""
        return self.repositories[f"{repo_type}s", repo_id]

    def files(self, repo_id, revision="main", repo_type="model"):
        """Path -> bytes; LFS objects with their content, not as pointers."""
        commit = self.repository(repo_id, repo_type).at(revision)
        return {path: file.content for path, file in commit.files.items()}

    def branches(self, repo_id, repo_type="model"):
        """Name -> commit id."""
        return dict(self.repository(repo_id, repo_type).branches)

    def tags(self, repo_id, repo_type="model"):
        """Name -> commit id."""
        return dict(self.repository(repo_id, repo_type).tags)

    def is_private(self, repo_id, repo_type="model"):
        return self.repository(repo_id, repo_type).private
