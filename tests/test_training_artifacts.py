"""Artifacts are whole or absent, whatever ends the program, and say what they were made from."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError
from training_helpers import Child, ChildError, die, files_of

import artifacts
from artifacts import (
    META_FILE,
    check_made_for,
    check_same,
    fingerprint_of_model,
    fingerprint_of_strings,
    is_finished,
    read_meta,
    remove_folder,
    write_folder,
    write_meta,
)

META = {"stage": "stage1", "seed": 0}


def write_version(version):
    def write(folder):
        for name in "abcd":
            (folder / name).write_text(version)
        (folder / "inner").mkdir()
        (folder / "inner" / "e").write_text(version)
        write_meta(folder, {"version": version})

    return write


def whole(folder):
    """The version of a folder, all of whose files are there and of that version."""
    version = read_meta(folder, "x")["version"]
    contents = {name: content for name, content in files_of(folder).items() if name != META_FILE}
    assert contents == dict.fromkeys(["a", "b", "c", "d", "inner/e"], version.encode())
    return version


def test_a_folder_is_written_and_replaced(tmp_path):
    folder = tmp_path / "deep" / "artifact"
    write_folder(folder, write_version("old"))
    assert whole(folder) == "old"
    write_folder(folder, write_version("new"))
    assert whole(folder) == "new"
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    folder = tmp_path / "artifact"

    def write(aside):
        write_version("new")(aside)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write_folder(folder, write)
    assert not list(tmp_path.iterdir())
    write_folder(folder, write_version("old"))
    with pytest.raises(RuntimeError, match="broken"):
        write_folder(folder, write)
    assert whole(folder) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_what_an_earlier_kill_left_is_not_mixed_in(tmp_path):
    (tmp_path / ".artifact.partial").mkdir()
    (tmp_path / ".artifact.partial" / "stale").write_text("stale")
    (tmp_path / ".artifact.removed").mkdir()
    (tmp_path / ".artifact.removed" / "stale").write_text("stale")
    write_folder(tmp_path / "artifact", write_version("new"))
    assert whole(tmp_path / "artifact") == "new"


def replace_and_die(folder, where, count):
    """Replace a folder and be killed at the count-th call, with half of a removal done."""
    remove, left = shutil.rmtree, [count]

    def due():
        left[0] -= 1
        return left[0] == 0

    def rmtree(path, **options):
        if Path(path).exists() and due():
            for file in ("a", "c"):
                (Path(path) / file).unlink()
            die()
        remove(path, **options)

    def rename(path, target):
        if due():
            die()
        os.rename(path, target)

    if where == "rmtree":
        artifacts.shutil.rmtree = rmtree
    else:
        Path.rename = rename
    write_folder(folder, write_version("new"))


@pytest.mark.parametrize(("where", "count"), [("rmtree", 1), ("rename", 1), ("rename", 2)])
def test_killed_while_replacing_a_folder_is_whole_or_absent(tmp_path, where, count):
    folder = tmp_path / "artifact"
    write_folder(folder, write_version("old"))
    with pytest.raises(ChildError, match="exit code -9"):
        Child(replace_and_die, folder, where, count).finish()
    assert not folder.exists() or whole(folder) in ("old", "new")
    write_folder(folder, write_version("newest"))
    assert whole(folder) == "newest"


def test_removing_a_folder(tmp_path):
    remove_folder(tmp_path / "absent")
    write_folder(tmp_path / "artifact", write_version("old"))
    remove_folder(tmp_path / "artifact")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_a_full_disk_is_named_and_changes_nothing(tmp_path, error):
    folder = tmp_path / "artifact"
    write_folder(folder, write_version("old"))

    def write(aside):
        (aside / "a").write_text("half")
        raise error

    with pytest.raises(OSError, match=r"The disk is full \(\d+ MiB free\).*run the same command again") as caught:
        write_folder(folder, write)
    assert caught.value.errno == errno.ENOSPC
    assert str(folder) in str(caught.value)
    assert whole(folder) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_disk_that_is_really_full(tmp_path):
    def write(aside):
        (aside / "weights").symlink_to("/dev/full")
        (aside / "weights").write_bytes(bytes(100_000))

    with pytest.raises(OSError, match="The disk is full"):
        write_folder(tmp_path / "artifact", write)
    assert not list(tmp_path.iterdir())


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        write_folder(tmp_path / "file" / "artifact", write_version("new"))


def test_meta_says_which_stage_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"no finished artifact.*run training/embed_regions.py first"):
        read_meta(tmp_path, "embed_regions")
    write_meta(tmp_path, META)
    assert read_meta(tmp_path, "embed_regions") == META


def test_a_finished_artifact_is_taken_unless_made_otherwise(tmp_path):
    assert not is_finished(tmp_path, META, resume=True)
    write_meta(tmp_path, META)
    assert is_finished(tmp_path, META, resume=True)
    assert not is_finished(tmp_path, {**META, "seed": 1}, resume=False)
    with pytest.raises(ValueError, match="seed was 0, is now 1"):
        is_finished(tmp_path, {**META, "seed": 1}, resume=True)


def test_check_same_names_every_difference_and_the_ways_out():
    check_same({"a": (1, 2), "b": None}, {"a": [1, 2], "b": None}, "x")
    with pytest.raises(ValueError) as caught:
        check_same({"a": 1, "b": "x", "same": 0}, {"a": 2, "c": "y", "same": 0}, "runs/x")
    message = str(caught.value)
    assert message.startswith("runs/x was made with other arguments or inputs: a was 1, is now 2; ")
    assert "b was 'x', is now None" in message and "c was None, is now 'y'" in message
    assert "same" not in message
    assert "--no_resume" in message and "--output_dir" in message


def test_check_made_for_names_both_sides(tmp_path):
    check_made_for({"model": "m", "more": 1}, tmp_path, model="m")
    with pytest.raises(ValueError, match="made for another train split: it holds 'old', this run has 'new'") as caught:
        check_made_for({"model": "m", "train_split": "old"}, tmp_path, model="m", train_split="new")
    assert str(tmp_path) in str(caught.value)


def test_fingerprints_of_strings_know_order_and_borders():
    prints = [fingerprint_of_strings(strings) for strings in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab"], [])]
    assert len(set(prints)) == 5
    assert fingerprint_of_strings(iter(["ab", "c"])) == prints[0]


def test_fingerprint_of_a_model_covers_weights_and_config(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model.*run training/stage0.py first.*--vlm"):
        fingerprint_of_model(tmp_path, "stage0")
    with pytest.raises(ValueError, match=r"run training/stage1.py first.*--mapping_model"):
        fingerprint_of_model(tmp_path / "absent", "stage1")
    found = set()
    for config, weights in (("{}", b"1"), ("{}", b"2"), ('{"a": 1}', b"1"), ("{}", b"1")):
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "model.safetensors").write_bytes(weights)
        found.add(fingerprint_of_model(tmp_path, "stage0"))
    assert len(found) == 3
