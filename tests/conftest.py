"""What all tests share: the --runslow switch, the way to the real data beside the project, tiny models, a Hub."""

import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.register_assert_rewrite("pipeline_helpers")


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--runslow"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.fixture
def fresh_accelerate():
    """Accelerate's state, kept once per process, is forgotten before and after the test."""
    from training_helpers import reset_accelerate

    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="session")
def shared_data():
    """The folder with real data: VILLA_SHARED_DATA, or ../shared/data seen from the project's root."""
    folder = Path(os.environ.get("VILLA_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set VILLA_SHARED_DATA to the folder that has it")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """The folder of a tiny one-to-one model with its processor; nobody writes into it."""
    from tiny_models import save_clip

    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def mapping_folder(tmp_path_factory):
    """The folder of a tiny mapping model with its processor; nobody writes into it."""
    from tiny_models import save_mapping

    return save_mapping(tmp_path_factory.mktemp("mapping"))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder and the URL at which a server of this process shows it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(monkeypatch):
    """A Hub, and the client of this process ready for it: online, without Xet, no connection kept from before."""
    from huggingface_hub import close_session, constants
    from local_hub import LocalHub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()
    with LocalHub() as hub:
        yield hub
    close_session()


@pytest.fixture
def api(hub):
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def repo(api):
    """One regular file and one LFS object on main of hub_helpers.REPO; its commit's id."""
    from hub_helpers import REPO, WEIGHTS, add

    api.create_repo(REPO)
    return add(api, **{"config.json": b"{}", "model.safetensors": WEIGHTS})


@pytest.fixture
def seeded():
    """The same random numbers in every test that asks for it."""
    import torch

    torch.manual_seed(0)
