"""A stand-in for the Hugging Face Hub, in memory and on this machine only: what tests push to and load from.

    with LocalHub() as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("org/model")
        subprocess.run(script, env={**os.environ, **hub.environment(cache_folder)})

huggingface_hub reads its address, token and folders when it is imported, so anything that asks no HfApi of its own
(transformers, datasets) runs in a process of its own, with `environment`. It speaks the protocol of huggingface_hub
without Xet: repositories, branches, tags, commits, LFS objects, downloads; no pull requests, no search, no YAML check.

By hand: `python tests/local_hub.py --port 8765 --delay 1.0` prints the variables to export and serves until Ctrl-C.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".png")
LFS_BYTES = 1_000_000
LOOPBACK = ("127.0.0.1", "localhost")


class LocalHub:
    """A Hub on one port of the loopback; start it with `with`.

    Attributes:
        url: what HF_ENDPOINT and HfApi(endpoint=...) take.
        token, read_token: a token that may write, and one that may only read.
        requests: (method, path) of everything that arrived, answered or not, in order; clear it at will.
        delay: seconds that each request waits.
        fail_every: every n-th request, as `requests` counts them, is answered with `fail_status`, or each one for which
            a function of (method, path) says so; None for none.
        die_in: which upload, LFS object or commit, is cut in mid-body, without an answer and without effect: the n-th
            from now on, once, or each one for which a function of (method, path) says so; None for none.
    """

    def __init__(self, host="127.0.0.1", port=0, delay=0.0):
        self.token, self.read_token = "hf_" + secrets.token_hex(8), "hf_" + secrets.token_hex(8)
        self.requests, self.delay, self.fail_status = [], delay, 503
        self.fail_every, self.die_in = None, None
        self.lock, self.repositories, self.signed, self.open = threading.RLock(), {}, {}, set()
        self.server = _Server((host, port), _Handler)
        self.server.hub = self
        port = self.server.server_address[1]
        self.url = f"http://{host}:{port}"
        # The client drops X-Repo-Commit of a redirect that stays on one host: LFS objects live on "another".
        self.storage_url = f"http://{LOOPBACK[host == LOOPBACK[0]]}:{port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error):
        """Also ends the connections that clients keep open: afterwards nothing answers."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def environment(self, cache_folder, token=None):
        """The variables for a process that shall use this Hub; `token=""` is an anonymous user."""
        cache = Path(cache_folder)
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_DATASETS_CACHE": str(cache / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": ",".join(LOOPBACK),
            "no_proxy": ",".join(LOOPBACK),
        }

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

    def fails_now(self, method, path):
        """Whether it is this request's turn to fail."""
        if callable(self.fail_every):
            return self.fail_every(method, path)
        return self.fail_every and len(self.requests) % self.fail_every == 0

    def dies_now(self, method, path):
        """Whether this upload is the one to cut."""
        if callable(self.die_in):
            return self.die_in(method, path)
        with self.lock:
            self.die_in = self.die_in and self.die_in - 1
            dies = self.die_in == 0
            self.die_in = self.die_in or None
        return dies

    def signed_url(self, method, repository, sha256):
        """An address of an LFS object that needs no token, as a bucket gives it."""
        key = secrets.token_hex(8)
        self.signed[key] = method, repository, sha256
        return f"{self.storage_url}/storage/{sha256}?key={key}"


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


class Refusal(Exception):
    """An answer that is an error; the client picks the class of its exception by `code`, not by the status."""

    def __init__(self, status, message, code=None, **fields):
        super().__init__(message)
        self.status, self.content = status, json.dumps({"error": message, **fields}).encode()
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class Repository:
    """Commits, and the branches and tags that point to them."""

    def __init__(self, kind, name, private):
        self.kind, self.name, self.private = kind, name, private
        self.commits, self.branches, self.tags, self.objects = {}, {"main": None}, {}, {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self._add_commit("main", {"summary": "initial commit"}, {".gitattributes": File(attributes.encode(), False)})

    @property
    def path(self):
        """Where a browser would find it: models have no prefix."""
        return self.name if self.kind == "models" else f"{self.kind}/{self.name}"

    def at(self, revision):
        """The commit of a branch, a tag or a full commit id."""
        for names in (self.branches, self.tags):
            revision = names.get(revision, revision)
        if revision not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[revision]

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


class _Server(ThreadingTCPServer):
    # Not http.server's own class: that one asks the network for this machine's name.
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        # A client that has left is one of the things that tests do.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


_ROUTES = []
_API = r"/api/(models|datasets|spaces)/([^/]+/[^/]+|[^/]+)"
_PAGE = r"/(datasets/|spaces/|)([^/]+/[^/]+|[^/]+)"


def _route(methods, path):
    """Let a method of the handler answer these requests; the groups of `path` become its arguments."""

    def register(function):
        _ROUTES.append((methods.split(), re.compile(path), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    """One connection, of one request after the other."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together, or each request waits 40 ms for an acknowledgement
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.hub = self.server.hub
        self.hub.open.add(self.connection)

    def finish(self):
        self.hub.open.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        pass

    def answer(self):
        hub, url = self.hub, urlsplit(self.path)
        with hub.lock:
            hub.requests.append((self.command, unquote(url.path)))
            fails = hub.fails_now(*hub.requests[-1])
        time.sleep(hub.delay)
        size = int(self.headers.get("Content-Length") or 0)
        if (self.command == "PUT" or "/commit/" in url.path) and hub.dies_now(self.command, unquote(url.path)):
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body, self.query = self.rfile.read(size), dict(parse_qsl(url.query))
        try:
            if fails:
                raise Refusal(hub.fail_status, "It is this request's turn to fail")
            with hub.lock:
                found = self._find_answer(url.path)
        except Refusal as refusal:
            found = refusal.status, refusal.content, refusal.headers
        self._send(*(found if isinstance(found, tuple) else (200, json.dumps(found).encode(), {})))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _find_answer(self, path):
        """What the route's method returns: something for JSON, or (status, content, headers)."""
        for methods, pattern, function in _ROUTES:
            match = pattern.fullmatch(path)
            if match and self.command in methods:
                try:
                    return function(self, *(group and unquote(group) for group in match.groups()))
                except (KeyError, ValueError) as error:
                    raise Refusal(400, f"Malformed request: {error!r}") from error
        # The client does not try again after a 501.
        raise Refusal(501, f"LocalHub has no answer to {self.command} {path}")

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _download(self, content, headers):
        """The whole file, or the range that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, content, headers
        start, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        return 206, content[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}", **headers}

    @property
    def json(self):
        return json.loads(self.body)

    def _role(self):
        roles = {None: None, f"Bearer {self.hub.token}": "write", f"Bearer {self.hub.read_token}": "read"}
        authorization = self.headers.get("Authorization")
        if authorization not in roles:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return roles[authorization]

    def _require(self, *allowed):
        role = self._role()
        if role not in allowed:
            raise Refusal(401, "Log in first") if role is None else Refusal(403, "Forbidden: this needs a write token")
        return role

    def _repository(self, kind, name, write=False):
        """The repository, if this user may know of it; a private one looks like a missing one to strangers."""
        role, repository = self._role(), self.hub.repositories.get((kind.strip("/") or "models", name))
        if repository is None or (repository.private and role is None):
            raise Refusal(401 if role is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._require("write")
        return repository

    @_route("GET", "/api/whoami-v2")
    def whoami(self):
        role = self._require("write", "read")
        access = {"displayName": role, "role": role}
        return {"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token", "accessToken": access}}

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    @_route("POST", "/api/repos/create")
    def create_repo(self):
        self._require("write")
        kind, name = self._named_repo()
        fields = {"url": f"{self.hub.url}/{name if kind == 'models' else f'{kind}/{name}'}", "name": name}
        if (kind, name) in self.hub.repositories:
            # With exist_ok the client reads the address out of this refusal.
            raise Refusal(409, "You already created this repo", **fields)
        private = self.json.get("visibility") == "private" or self.json.get("private") is True
        self.hub.repositories[kind, name] = Repository(kind, name, private)
        return fields

    @_route("DELETE", "/api/repos/delete")
    def delete_repo(self):
        kind, name = self._named_repo()
        self._repository(kind, name, write=True)
        del self.hub.repositories[kind, name]
        return {}

    def _named_repo(self):
        asked = self.json
        return f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or 'tester'}/{asked['name']}"

    @_route("GET", _API + "(?:/revision/([^/]+))?")
    def repo_info(self, kind, name, revision):
        repository = self._repository(kind, name)
        commit = repository.at(revision or "main")
        siblings = [
            {"rfilename": path, "size": len(file.content), "blobId": file.blob_id}
            for path, file in sorted(commit.files.items())
        ]
        created = next(iter(repository.commits.values())).date
        info = {"id": name, "author": name.split("/")[0], "sha": commit.id, "private": repository.private}
        info |= {"createdAt": created, "lastModified": commit.date, "gated": False, "disabled": False}
        return {**info, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}

    @_route("GET", _API + "/refs")
    def refs(self, kind, name):
        repository = self._repository(kind, name)

        def listed(names, folder):
            return [{"name": key, "ref": f"refs/{folder}/{key}", "targetCommit": sha} for key, sha in names.items()]

        branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    @_route("GET", _API + "/commits/([^/]+)")
    def list_commits(self, kind, name, revision):
        commit, commits = self._repository(kind, name).at(revision), []
        while commit is not None:
            described = {"id": commit.id, "title": commit.title, "message": commit.description, "date": commit.date}
            commits.append({**described, "authors": [{"user": "tester"}]})
            commit = commit.parent
        return commits

    @_route("GET", _API + "/tree/([^/]+)(?:/(.+))?")
    def tree(self, kind, name, revision, folder):
        prefix = f"{folder}/" if folder else ""
        entries = self._repository(kind, name).at(revision).entries()
        inside = {path: entry for path, entry in entries.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        recursive = self.query.get("recursive") == "true"
        return [entry for path, entry in inside.items() if recursive or "/" not in path[len(prefix) :]]

    @_route("POST", _API + "/paths-info/([^/]+)")
    def paths_info(self, kind, name, revision):
        entries = self._repository(kind, name).at(revision).entries()
        return [entries[path] for path in parse_qs(self.body.decode())["paths"] if path in entries]

    @_route("POST DELETE", _API + "/branch/([^/]+)")
    def branch(self, kind, name, branch):
        repository = self._repository(kind, name, write=True)
        if self.command == "POST":
            target = repository.at(self.json.get("startingPoint", "main")).id
            return self._add_name(repository.branches, branch, target)
        if branch == "main":
            raise Refusal(400, "The branch main cannot be deleted")
        return self._remove_name(repository.branches, branch)

    @_route("POST DELETE", _API + "/tag/([^/]+)")
    def tag(self, kind, name, revision):
        """For POST the address names what is tagged, for DELETE the tag."""
        repository = self._repository(kind, name, write=True)
        if self.command == "POST":
            return self._add_name(repository.tags, self.json["tag"], repository.at(revision).id)
        return self._remove_name(repository.tags, revision)

    def _add_name(self, names, name, target):
        if name in names:
            raise Refusal(409, f"Reference already exists: {name}")
        names[name] = target
        return {}

    def _remove_name(self, names, name):
        if names.pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}

    @_route("POST", _API + "/preupload/([^/]+)")
    def preupload(self, kind, name, revision):
        files = self._repository(kind, name, write=True).at(revision).files
        answers = []
        for asked in self.json["files"]:
            path, size, sample = asked["path"], asked["size"], base64.b64decode(asked["sample"])
            lfs = path.endswith(LFS_SUFFIXES) or size > LFS_BYTES or b"\0" in sample
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if path in files:
                # The client leaves a file out of its commit if this is the id of what it has.
                answers[-1]["oid"] = files[path].etag
        return {"files": answers}

    @_route("POST", _API + "/commit/([^/]+)")
    def commit(self, kind, name, branch):
        repository = self._repository(kind, name, write=True)
        if "create_pr" in self.query:
            raise Refusal(501, "LocalHub has no pull requests")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        commit = repository.commit(branch, header["value"], operations)
        url = f"{self.hub.url}/{repository.path}/commit/{commit.id}"
        return {"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""}

    @_route("POST", _PAGE + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, kind, name):
        """Where to upload which objects; those that are there get no upload action."""
        repository = self._repository(kind, name, write=True)
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in self.json["objects"]]
        verify = {"href": f"{self.hub.url}/{quote(repository.path)}.git/info/lfs/verify"}
        for described in objects:
            if described["oid"] not in repository.objects:
                upload = {"href": self.hub.signed_url("PUT", repository, described["oid"])}
                described["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    @_route("POST", _PAGE + r"\.git/info/lfs/verify")
    def lfs_verify(self, kind, name):
        stored = self._repository(kind, name, write=True).objects.get(self.json["oid"])
        if stored is None or len(stored) != self.json["size"]:
            raise Refusal(404, "The LFS object was not uploaded")
        return {}

    @_route("GET PUT", "/storage/([0-9a-f]+)")
    def storage(self, sha256):
        method, repository, signed_sha256 = self.hub.signed.get(self.query.get("key"), (None, None, None))
        if (method, signed_sha256) != (self.command, sha256):
            raise Refusal(403, "The address is not signed for this")
        if method == "GET":
            return self._download(repository.objects[sha256], {"ETag": f'"{sha256}"'})
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, "The upload is not what its address says")
        repository.objects[sha256] = self.body
        return {}

    @_route("GET HEAD", _PAGE + "/resolve/([^/]+)/(.+)")
    def resolve(self, kind, name, revision, path):
        """A regular file itself; for an LFS object, the way to the storage."""
        repository = self._repository(kind, name)
        commit = repository.at(revision)
        if path not in commit.files:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers["X-Repo-Commit"] = commit.id
            raise refusal
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"'}
        if not file.lfs:
            return self._download(file.content, headers)
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": len(file.content)}
        return 302, b"", {**headers, "Location": self.hub.signed_url("GET", repository, file.sha256)}


def main():
    parser = argparse.ArgumentParser(description="Serve an empty stand-in Hub until Ctrl-C.")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that each request waits")
    parser.add_argument("--fail-every", type=int, help="every n-th request is answered with 503")
    arguments = parser.parse_args()
    # A shell that starts it in the background has Ctrl-C ignored.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory() as cache,
        LocalHub(port=arguments.port, delay=arguments.delay) as hub,
    ):
        hub.fail_every = arguments.fail_every
        for name, value in hub.environment(cache).items():
            sys.stdout.write(f"export {name}={value}\n")
        sys.stdout.write(f"# HF_TOKEN={hub.read_token} may only read\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
