"""The HTTP of the stand-in Hub: each request that huggingface_hub sends, and its answer out of the Hub's store."""

import base64
import json
import re
import socket
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlsplit

from hub_store import Refusal, Repository, is_lfs

_ROUTES = []
_API = r"/api/(models|datasets|spaces)/([^/]+/[^/]+|[^/]+)"
_PAGE = r"/(datasets/|spaces/|)([^/]+/[^/]+|[^/]+)"


def _route(methods, path):
    """Let a method of the handler answer these requests; the groups of `path` become its arguments."""

    def register(function):
        _ROUTES.append((methods.split(), re.compile(path), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One connection to a LocalHub, of one request after the other."""

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
        info = {"id": name, "author": name.split("/")[0], "sha": commit.id, "private": repository.private}
        info |= {"createdAt": repository.created, "lastModified": commit.date, "gated": False, "disabled": False}
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
        authors = [{"user": "tester"}]
        return [
            {"id": one.id, "title": one.title, "message": one.description, "date": one.date, "authors": authors}
            for one in self._repository(kind, name).at(revision).history()
        ]

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
            repository.add_branch(branch, self.json.get("startingPoint", "main"))
        else:
            repository.remove_branch(branch)
        return {}

    @_route("POST DELETE", _API + "/tag/([^/]+)")
    def tag(self, kind, name, revision):
        """For POST the address names what is tagged, for DELETE the tag."""
        repository = self._repository(kind, name, write=True)
        if self.command == "POST":
            repository.add_tag(self.json["tag"], revision)
        else:
            repository.remove_tag(revision)
        return {}

    @_route("POST", _API + "/preupload/([^/]+)")
    def preupload(self, kind, name, revision):
        files = self._repository(kind, name, write=True).at(revision).files
        answers = []
        for asked in self.json["files"]:
            path, size, sample = asked["path"], asked["size"], base64.b64decode(asked["sample"])
            mode = "lfs" if is_lfs(path, size, sample) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
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
        repository.add_object(sha256, self.body)
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
