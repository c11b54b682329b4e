"""What all tests share: the --runslow switch and the way to the real data beside the project."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
