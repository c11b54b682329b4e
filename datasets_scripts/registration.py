"""Makes the builders of this package loadable by name: `load_dataset("docmnist")`.

`datasets` runs no dataset scripts any more and offers no plug-in point, so the one function that turns a name
into a builder module is wrapped, in the two modules that call it.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.inspect
import datasets.load
from datasets.load import DatasetModule

# Dataset name -> the modules that make it, the one with the builder class first. All of them count for the
# cache.
BUILDERS: dict[str, tuple[str, ...]] = {
    "docmnist": (
        "datasets_scripts.docmnist",
        "datasets_scripts.docmnist_rendering",
        "datasets_scripts.digits",
        "datasets_scripts.schema",
    ),
}

_MARK = "_knows_datasets_scripts"


def register() -> None:
    """Wraps `dataset_module_factory` where `datasets` calls it. Calling this again changes nothing.

    It also works for a `load_dataset` that was imported earlier, because that function looks the factory up
    when it runs.

    Raises:
        ImportError: this version of `datasets` has no `dataset_module_factory` where we expect it.
    """
    for module in (datasets.load, datasets.inspect):
        factory = getattr(module, "dataset_module_factory", None)
        if factory is None:
            raise ImportError(
                f"{module.__name__} of datasets {datasets.__version__} has no dataset_module_factory; "
                "datasets_scripts needs a version of datasets that has it (tried with 5.2)"
            )
        if not hasattr(factory, _MARK):
            module.dataset_module_factory = _wrap(factory)


def source_hash(modules: tuple[str, ...]) -> str:
    """The sha256 over the bytes of the files of `modules`: an edited generator makes a new cache."""
    digest = hashlib.sha256()
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ImportError(f"no source file for module {name}")
        content = Path(spec.origin).read_bytes()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _wrap(factory: Callable[..., DatasetModule]) -> Callable[..., DatasetModule]:
    @functools.wraps(factory)
    def dataset_module_factory(path: str, *args: Any, **kwargs: Any) -> DatasetModule:
        modules = BUILDERS.get(path)
        if modules is None:
            return factory(path, *args, **kwargs)
        return DatasetModule(modules[0], source_hash(modules), {"dataset_name": path})

    setattr(dataset_module_factory, _MARK, True)
    return dataset_module_factory
