"""What the tests of training and evaluation share: a tiny configuration, and processes of their own to run it in.

The scripts import their siblings, so their folders are put on the path here; a test module imports this one first.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "eval"))

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState

import artifacts
import embed_regions
import loop
import map_regions
import stage0
import stage1
import stage2
from arguments import read_arguments

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "stage0": (stage0, stage0.Stage0Arguments),
    "embed_regions": (embed_regions, embed_regions.EmbedRegionsArguments),
    "stage1": (stage1, stage1.Stage1Arguments),
    "map_regions": (map_regions, map_regions.MapRegionsArguments),
    "stage2": (stage2, stage2.Stage2Arguments),
}
# Tests run on the CPU, one thread, no network, whatever the machine has.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def tiny_config(folder, **changes):
    """The values of a run under `folder`/run of 60 small images that takes seconds; sections are merged."""
    values = {
        "run_dir": str(folder / "run"),
        "dataset": "docmnist",
        "dataset_kwargs": {
            "complexity": 5.0,
            "attribute_budget": 300,
            "validation_budget": 60,
            "test_budget": 60,
            "digits": "optdigits",
            "cache_dir": str(folder / "cache"),
        },
        "batch_size": 8,
        "max_steps": 7,
        "save_steps": 3,
        "stage0": {
            "backbone": "resnet18",
            # The dropout makes every update random, so that a resumed run must find the same random numbers.
            "backbone_kwargs": {"layers": [1, 1], "channels": [8, 16], "norm_layer": "groupnorm1", "drop_rate": 0.1},
            "region_stage": 0,
            "roi_size": 4,
            "image_size": 84,
            "projection_dim": 16,
            "text_width": 32,
            "text_layers": 1,
        },
        "stage1": {"encoder": "full"},
        "map_regions": {"epsilon": 0.5},
        "stage2": {"image_tower": "mapping_model"},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return values


def write_config(folder, **changes):
    """`tiny.yaml` in `folder`; returns its path."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(folder, **changes)))
    return path


def stage_arguments(stage, config, *words):
    """The stage's arguments from a YAML and command-line words."""
    return read_arguments(STAGES[stage][1], stage, ["--config", str(config), *map(str, words)])


def run_stage(stage, config, *words):
    """Run one stage in this process; returns its artifact's folder."""
    return STAGES[stage][0].run(stage_arguments(stage, config, *words))


def run_stages(config, *stages):
    """Run stages one after the other in this process."""
    for stage in stages:
        run_stage(stage, config)


_FINISHED = {}


def finished_run(tmp_path_factory):
    """(config, run folder) of a run of all stages, made once per test process; nobody writes into it."""
    if not _FINISHED:
        folder = tmp_path_factory.mktemp("finished")
        config = write_config(folder)
        in_child(run_stages, config, *STAGES)
        _FINISHED["run"] = config, folder / "run"
    return _FINISHED["run"]


def copy_of_run(run_dir, folder, *stages):
    """A run folder that holds the artifacts of some stages of another run and nothing else."""
    copy = folder / "run"
    for stage in stages:
        shutil.copytree(run_dir / stage, copy / stage)
    return copy


def reset_accelerate():
    """Accelerate keeps its state per process; tests begin without."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def files_of(folder):
    """Relative path -> bytes of every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_log(output_dir):
    """The entries of a stage's log.jsonl."""
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


class Child:
    """A function that runs in a process of its own, forked from a server that has imported everything already."""

    def __init__(self, function, *args, environment=None):
        start_server()
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, {**ENVIRONMENT, **(environment or {})}, function, args)
        self.process = context.Process(target=_call, args=arguments)
        self.process.start()
        theirs.close()

    def kill(self):
        """SIGKILL, which nothing can catch."""
        self.process.kill()
        self.process.join()

    def finish(self, timeout=120):
        """What the function returned.

        Raises:
            ChildError: it raised, was killed, or did not end in time.
        """
        try:
            if not self.connection.poll(timeout):
                self.kill()
                raise ChildError("TimeoutError", f"no end after {timeout} s")
            kind, value = self.connection.recv()
        except EOFError:
            self.process.join()
            raise ChildError("Died", f"exit code {self.process.exitcode}") from None
        self.process.join()
        if kind == "raised":
            raise ChildError(*value)
        return value


class ChildError(Exception):
    """The type's name and the message of what went wrong in a child."""

    def __init__(self, kind, message):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


def in_child(function, *args):
    """Call a function in a process of its own and return what it returns."""
    return Child(function, *args).finish()


def in_two_processes(function, *args):
    """Call a function in two processes that form one gloo group; returns both results, in rank order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    children = [
        Child(function, *args, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)
    ]
    return [child.finish() for child in children]


def start_server():
    """Start the server that children are forked from, if it does not run yet; it imports this module first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_helpers"])
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "PYTHONPATH": path}.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def _call(connection, environment, function, args):
    os.environ.update(environment)
    # The child's own children, such as a DataLoader's workers, then see that it was killed, and end.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)
    try:
        result = ("returned", function(*args))
    except BaseException as error:
        result = ("raised", (type(error).__name__, str(error)))
    connection.send(result)


DEADLY = ("save_file", "torch.save", "rename", "renamed", "rmtree", "fsync")


def run_and_die(stage, config, where, count, *words):
    """Run a stage that is killed at the `count`-th call of `where`; files are half written, folders half removed.

    `where` is one of DEADLY: in the middle of writing weights or optimizer, just before or after a folder is renamed
    into its place, in the middle of removing a folder, before a file is flushed. Returns if it never comes to that.
    """
    left = [count]

    def due():
        left[0] -= 1
        return left[0] == 0

    def writing(write):
        def deadly(what, path, *args, **kwargs):
            write(what, path, *args, **kwargs)
            if due():
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        return deadly

    def rename(path, target):
        if where == "rename" and due():
            die()
        os.rename(path, target)
        if where == "renamed" and due():
            die()

    def rmtree(folder, **options):
        if Path(folder).exists() and due():
            for path in sorted(Path(folder).rglob("*"))[::2]:
                if path.is_file():
                    path.unlink()
            die()
        remove(folder, **options)

    def fsync(file):
        if due():
            die()

    remove = shutil.rmtree
    if where == "save_file":
        loop.save_file = writing(loop.save_file)
    elif where == "torch.save":
        torch.save = writing(torch.save)
    elif where in ("rename", "renamed"):
        Path.rename = rename
    elif where == "rmtree":
        artifacts.shutil.rmtree = rmtree
    elif where == "fsync":
        artifacts.os.fsync = fsync
    else:
        raise ValueError(f"where must be one of {DEADLY}, got {where!r}")
    return str(run_stage(stage, config, *words))


def die():
    """As `kill -9` from outside."""
    os.kill(os.getpid(), signal.SIGKILL)
