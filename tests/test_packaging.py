"""What the wheel holds, who imports whom, and what may stand in no file."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("modeling_villa", "datasets_scripts")
SCRIPTS = ("training", "eval", "benchmarks")
# numpy and pillow come with transformers and torchvision.
REMOTE_CODE_MAY_IMPORT = {"torch", "torchvision", "transformers", "timm", "numpy", "PIL"}
# Put together from pieces, or this file would find itself.
PATHS = [f"/{name}/" for name in ("work", "root", "home", "Users")]
FORBIDDEN_TEXT = [*PATHS, "index" + "-url", "find" + "-links"]


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree, skip_guarded=False):
    """(level, module or None, names) of every import; without those in a try block if `skip_guarded`."""
    found = []
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module, tuple(alias.name for alias in node.names)))
        elif not (skip_guarded and isinstance(node, ast.Try)):
            pending += ast.iter_child_nodes(node)
    return found


def imported_roots(path):
    return {module.split(".")[0] for level, module, _ in imports(parse(path)) if level == 0}


def by_path(folders, without=()):
    paths = [path for folder in folders for path in sources(folder) if not path.name.startswith(without)]
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    """The names inside a wheel that is built, without network, from a copy of the project."""
    copy = tmp_path_factory.mktemp("wheel") / "project"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "results", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "out", copy]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (copy / "out").glob("*.whl")
    assert wheel.name.startswith("modeling_villa-")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_holds_the_two_packages_and_nothing_else(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    metadata = {top for top in tops if top.endswith(".dist-info")}
    assert len(metadata) == 1
    assert tops - metadata == set(PACKAGES)


def test_wheel_holds_every_module_and_the_licence(wheel_names):
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in sources(package)}
    assert modules == {name for name in wheel_names if name.endswith(".py")}
    assert any(name.endswith("/licenses/LICENSE") for name in wheel_names)


@by_path(PACKAGES)
def test_packages_import_nothing_of_ours_outside_themselves(path):
    others = {*PACKAGES, *SCRIPTS, "tests"} - {path.relative_to(ROOT).parts[0]}
    others |= {script.stem for folder in SCRIPTS for script in sources(folder)} - sys.stdlib_module_names
    assert not imported_roots(path) & others


@by_path(["modeling_villa"])
def test_model_files_stay_flat_and_import_siblings_by_name(path):
    assert path.parent == ROOT / "modeling_villa"
    for level, module, names in imports(parse(path)):
        if level:
            assert level == 1 and module and "." not in module, f"write `from .file import Name`: {names}"
            assert (path.parent / f"{module}.py").is_file()
            assert "*" not in names
            assert module != "metrics_villa" or path.name == "__init__.py"
        else:
            assert module.split(".")[0] != "modeling_villa", "write `from .file import Name`"


@by_path(["modeling_villa"], without="convert_")  # run by hand, never pushed
def test_model_files_import_what_remote_code_may(path):
    found = {module.split(".")[0] for level, module, _ in imports(parse(path), skip_guarded=True) if level == 0}
    assert found <= REMOTE_CODE_MAY_IMPORT | sys.stdlib_module_names


@by_path(SCRIPTS)
def test_scripts_import_siblings_and_never_another_folder(path):
    own = path.relative_to(ROOT).parts[0]
    siblings = {sibling.stem for sibling in sources(own)}
    others = {other.stem for folder in SCRIPTS if folder != own for other in sources(folder)}
    forbidden = {*SCRIPTS, "tests"} | (others - siblings - sys.stdlib_module_names)
    assert not imported_roots(path) & forbidden
    assert "sys.path" not in path.read_text(encoding="utf-8")


@by_path([*PACKAGES, *SCRIPTS, "tests"])
def test_nothing_unsafe_is_loaded(path):
    assert not imported_roots(path) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call):
            continue
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert arguments.get("allow_pickle", "False") == "False", f"line {node.lineno}"
        if ast.unparse(node.func) == "torch.load":
            assert arguments.get("weights_only") == "True", f"line {node.lineno}"


def test_no_machine_path_or_package_index_in_any_file():
    # Tracked files, and new ones that git does not ignore.
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            text = content.decode("utf-8")
            found += [f"{name}: {pattern}" for pattern in FORBIDDEN_TEXT if pattern in text]
    assert not found
