"""`load_dataset` knows our builders, whatever was imported first, and everything else still goes its old way."""

import importlib
import subprocess
import sys
from pathlib import Path

import datasets
import datasets.inspect
import datasets.load
import pytest
from datasets import get_dataset_config_names, get_dataset_split_names, load_dataset, load_dataset_builder

import datasets_scripts
from datasets_scripts import registration

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"digits": "optdigits", "attribute_budget": 400, "validation_budget": 100, "test_budget": 100}


def test_datasets_still_has_the_function_that_is_wrapped():
    """Fails on an upgrade of datasets that moves or renames what registration.py relies on."""
    for module in (datasets.load, datasets.inspect):
        assert hasattr(module.dataset_module_factory, registration._MARK)
        assert module.dataset_module_factory.__wrapped__.__name__ == "dataset_module_factory"
        assert not hasattr(module.dataset_module_factory.__wrapped__, registration._MARK)
    fields = datasets.load.DatasetModule.__dataclass_fields__
    assert list(fields)[:3] == ["module_path", "hash", "builder_kwargs"]


def test_missing_factory_is_an_error_that_names_the_version(monkeypatch):
    monkeypatch.delattr(datasets.inspect, "dataset_module_factory")
    with pytest.raises(ImportError, match=datasets.__version__):
        registration.register()


def test_registering_twice_changes_nothing():
    before = datasets.load.dataset_module_factory, datasets.inspect.dataset_module_factory
    registration.register()
    importlib.reload(datasets_scripts)
    assert before == (datasets.load.dataset_module_factory, datasets.inspect.dataset_module_factory)


def test_other_names_reach_the_original(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("a,b\n1,2\n3,4\n")
    rows = load_dataset("csv", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["b"][:] == [2, 4]


def test_load_dataset_imported_before_the_package(tmp_path):
    code = (
        "from datasets import load_dataset, get_dataset_split_names\n"
        "import datasets_scripts\n"
        f"data = load_dataset('docmnist', split='test', cache_dir={str(tmp_path)!r}, **{SMALL!r})\n"
        "assert len(data) > 0\n"
        "assert get_dataset_split_names('docmnist') == ['train', 'validation', 'test']\n"
    )
    # From an empty folder: nothing there may be needed, or be mistaken for data.
    empty = tmp_path / "empty"
    empty.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env={"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_a_folder_of_the_same_name_is_not_mistaken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docmnist").mkdir()
    (tmp_path / "docmnist" / "rows.csv").write_text("a\n1\n")
    builder = load_dataset_builder("docmnist", cache_dir=str(tmp_path / "cache"), **SMALL)
    assert "regions" in builder.info.features


def test_config_and_split_names():
    names = get_dataset_config_names("docmnist")
    assert names == [f"complexity_{c}" for c in (5.0, 9.1, 15.2, 21.2, 29.4)]
    assert get_dataset_split_names("docmnist", "complexity_9.1") == ["train", "validation", "test"]
    assert datasets.get_dataset_default_config_name("docmnist") == "complexity_29.4"


def test_unknown_keyword_is_named(tmp_path):
    with pytest.raises(ValueError, match="colour_count"):
        load_dataset("docmnist", colour_count=3, cache_dir=str(tmp_path))


def test_an_edited_generator_makes_a_new_cache(tmp_path, monkeypatch):
    for name in ("one_made_up", "two_made_up"):
        (tmp_path / f"{name}.py").write_text("# a # b\n")
    monkeypatch.syspath_prepend(tmp_path)
    modules = ("one_made_up", "two_made_up")
    before = registration.source_hash(modules)
    assert registration.source_hash(modules) == before
    (tmp_path / "two_made_up.py").write_text("# a # c\n")
    assert registration.source_hash(modules) != before


def test_every_file_of_the_generator_counts():
    for modules in registration.BUILDERS.values():
        for name in modules:
            lines = Path(importlib.import_module(name).__file__).read_text().splitlines()
            used = {line.split()[1] for line in lines if line.startswith("from .") and not line.startswith("from . ")}
            assert {f"datasets_scripts{module}" for module in used} <= set(modules)
