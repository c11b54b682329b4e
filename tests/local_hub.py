"""A stand-in for the Hugging Face Hub, in memory and on this machine only: what tests push to and load from.

    with LocalHub() as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("org/model")
        subprocess.run(script, env={**os.environ, **hub.environment(cache_folder)})

huggingface_hub reads its address, token and folders when it is imported, so anything that asks no HfApi of its own
(transformers, datasets) runs in a process of its own, with `environment`. It speaks the protocol of huggingface_hub
without Xet: repositories, branches, tags, commits, LFS objects, downloads; no pull requests, no search, no YAML check.
What it holds is in hub_store.py, what it answers in hub_api.py.

By hand: `python tests/local_hub.py --port 8765 --delay 1.0` prints the variables to export and serves until Ctrl-C.
"""

import argparse
import contextlib
import secrets
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from socketserver import ThreadingTCPServer

from hub_api import Handler
from hub_store import Store

LOOPBACK = ("127.0.0.1", "localhost")


class LocalHub(Store):
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
        super().__init__()
        self.token, self.read_token = "hf_" + secrets.token_hex(8), "hf_" + secrets.token_hex(8)
        self.requests, self.delay, self.fail_status = [], delay, 503
        self.fail_every, self.die_in = None, None
        self.lock, self.signed, self.open = threading.RLock(), {}, set()
        self.server = _Server((host, port), Handler)
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


class _Server(ThreadingTCPServer):
    # Not http.server's own class: that one asks the network for this machine's name.
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        # A client that has left is one of the things that tests do.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


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
