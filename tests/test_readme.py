"""README: its Python snippets run, in order, on a finished run, and what it names is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from training_helpers import ENVIRONMENT, finished_run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


def test_snippets_run(finished, tmp_path):
    # Those of the Hub are run by test_hub.
    snippets = re.findall(r"```python\n(.*?)```", README.split("## On the Hub")[0], re.DOTALL)
    assert len(snippets) == 2
    code = "\n".join(snippets).replace("runs/quickstart/", f"{finished[1]}/")
    assert str(finished[1]) in code
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    regions = [line for line in lines if re.fullmatch(r"\[[\d., ]+\] \w+ -?\d\.\d\d", line)]
    assert len(regions) >= 3, done.stdout


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:training|eval|benchmarks|docs|results)/[\w/.-]+\.\w+", README)))
)
def test_files_that_it_names_are_there(path):
    assert (ROOT / path).is_file()


def test_make_targets_that_it_names_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^    make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
