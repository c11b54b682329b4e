"""The Hub: checkpoints go to their stage's branch while training runs, a finished model to the branch and to main.

The token is huggingface_hub's own, from `hf auth login` or HF_TOKEN: no option, file, log or card ever holds it.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils._http import default_client_factory

from arguments import StageArguments, TrainingArguments
from artifacts import META_FILE, differences, read_meta, write_folder
from card import CardFacts, write_card

logger = logging.getLogger(__name__)

# What a Hub that is away, busy or half-way through an answer raises: the error of the HTTP client that this version of
# huggingface_hub uses, OSError, and the RuntimeError that it makes of either when a large file does not get through.
FAILURES: Any = (*HfHubHTTPError.__bases__, RuntimeError)
FOR_GOOD = (401, 403, 404)
OF_THE_HUB = ["checkpoints/*", ".gitattributes", "README.md", "*.png", ".eval_results/*"]  # beside a pushed model
PATIENCE = 600  # seconds for an upload that is under way when training ends
ATTEMPTS = 4  # huggingface_hub makes several of its own in each
SILENCE = 30  # seconds that the Hub may take to say something


class Uploads:
    """Sends checkpoints from a thread of its own, one at a time; a newer one takes the place of one that waits.

    Args:
        args: with `push_to_hub` and `hub_model_id`.
        branch: the stage's name.
        output_dir: the stage's folder; what waits is kept in it, as second names of the checkpoint's files.
    """

    def __init__(self, args: StageArguments, branch: str, output_dir: Path) -> None:
        self.args, self.branch, self.output_dir = args, branch, output_dir
        self._staged = output_dir / ".uploads"
        shutil.rmtree(self._staged, ignore_errors=True)
        self._waiting: Path | None = None
        self._busy = self._closed = False
        self._change = threading.Condition()
        threading.Thread(target=self._send_all, daemon=True, name="hub").start()

    def checkpoint(self, newest: Path) -> None:
        """Take note of a checkpoint, with the best weights and the log so far, and return at once."""
        copy = self._staged / newest.name
        for folder in (newest, newest.with_name("best")):
            if folder.exists():
                _copy(folder, copy / folder.name)
        shutil.copy(self.output_dir / "log.jsonl", copy)
        with self._change:
            dropped, self._waiting = self._waiting, copy
            self._change.notify_all()
        if dropped:
            shutil.rmtree(dropped, ignore_errors=True)

    def close(self) -> None:
        """Wait for the upload that is under way and drop the one that waits: the finished model comes next."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            if not self._change.wait_for(lambda: not self._busy, timeout=PATIENCE):
                logger.warning("an upload to %s does not end; going on without it", self.args.hub_model_id)
        shutil.rmtree(self._staged, ignore_errors=True)

    def _send_all(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._waiting is not None)
                folder = None if self._closed else self._waiting
                if folder is None:
                    return
                self._waiting, self._busy = None, True
            try:
                self._send(folder)
            finally:
                with self._change:
                    self._busy = False
                    self._change.notify_all()

    def _send(self, folder: Path) -> None:
        _persist(
            f"sending {folder.name} to {self.args.hub_model_id}@{self.branch}",
            _upload(self.args, str(self.args.hub_model_id), self.branch, folder, "checkpoints/"),
            lambda: self._closed or self._waiting is not None,
        )
        shutil.rmtree(folder, ignore_errors=True)


def open_branch(args: StageArguments, stage: str) -> bool:
    """Make the repository and the stage's branch, private unless said otherwise, and put a first card there.

    Returns:
        Whether the Hub could be reached; it is tried again with each upload.

    Raises:
        ValueError: the token is missing or may not write there; said before any training.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_card(Path(folder), CardFacts(args, stage, str(args.hub_model_id)))
        try:
            _upload(args, str(args.hub_model_id), stage, folder, replace=False)()
            return True
        except HFValidationError as error:
            raise ValueError(f"--hub_model_id {args.hub_model_id} is no name of a repository: {error}") from None
        except FAILURES as error:
            if _status(error) in FOR_GOOD:
                raise ValueError(
                    f"--push_to_hub: the token may not write to {args.hub_model_id} ({_first_line(error)}). Log in "
                    "with one that may (`hf auth login`, or HF_TOKEN), or leave out --push_to_hub."
                ) from None
            logger.warning("%s can't be reached now (%s); training goes on.", args.hub_model_id, _first_line(error))
            return False


def fetch_checkpoint(args: TrainingArguments, stage: str, output_dir: Path, made_with: dict[str, Any]) -> None:
    """Bring the newest checkpoint of the stage's branch here, if it is newer than those here: another machine left it.

    One that was made otherwise (other than `made_with` says) does not take the place of one that is here.

    Raises:
        ConnectionError: the Hub does not answer and there is none here; starting anew would overwrite what is there.
    """
    if not args.resume:
        return
    repo_id, kept = str(args.hub_model_id), output_dir / "checkpoints"
    here = _newest_step(f"checkpoints/{path.name}" for path in kept.glob("step-????????"))
    found: dict[str, Path] = {}

    def download() -> None:
        commit, names = _listing(repo_id, stage)
        if (newest := _newest_step(names)) > here:
            found[newest] = Path(snapshot_download(repo_id, revision=commit, allow_patterns="checkpoints/*"))

    if not _persist(f"fetching the checkpoint of {repo_id}@{stage}", download) and not here:
        raise ConnectionError(f"{repo_id}@{stage} may hold a checkpoint: try again later, or with --no_resume.")
    for step, snapshot in found.items():
        folder = snapshot / "checkpoints"
        theirs = json.loads((folder / step / "progress.json").read_text())["with"]
        if here and (differing := differences(theirs, made_with)):
            logger.info("%s of %s@%s is not fetched: %s", step, repo_id, stage, "; ".join(differing))
            continue
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "log.jsonl", output_dir)
        for name in ("best", step):
            if (folder / name).exists():
                write_folder(kept / name, functools.partial(_copy, folder / name))
        logger.info("fetched %s of %s@%s; the newest here was %s", step, repo_id, stage, here or "none")


def fetch_model(args: StageArguments, folder: Path, meta: dict[str, Any]) -> None:
    """Bring a finished model of the stage here, if there is none here and the branch's was made from the same things.

    One that was made otherwise (other than `meta` says) stays where it is; then the stage is trained here.
    """
    if not args.resume or (folder / META_FILE).is_file():
        return
    repo_id, tag = str(args.hub_model_id), f"{args.stage}-final"
    found: list[Path] = []

    def download() -> None:
        try:
            commit, names = _listing(repo_id, tag)
        except (*FAILURES, HFValidationError) as error:
            # There is none there; of a token that may not read, or a name that can't be, `open_branch` tells.
            if _status(error) in FOR_GOOD or isinstance(error, HFValidationError):
                return
            raise
        if META_FILE not in names:
            return
        theirs = read_meta(Path(hf_hub_download(repo_id, META_FILE, revision=commit)).parent, args.stage)
        if differing := differences(theirs, meta):
            logger.info("%s@%s was made otherwise and is not fetched: %s", repo_id, tag, "; ".join(differing))
        else:
            found.append(Path(snapshot_download(repo_id, revision=commit, ignore_patterns=OF_THE_HUB)))

    _persist(f"looking for a finished model at {repo_id}@{tag}", download)
    for snapshot in found:
        write_folder(folder, functools.partial(_copy, snapshot))
        logger.info("fetched the finished model of %s@%s", repo_id, tag)


def local_folder(name: str | Path) -> Path:
    """A model's folder: the path as it is, or a snapshot of `org/name` or `org/name@branch` on the Hub.

    Raises:
        ValueError: there is neither such a folder nor such a repository.
    """
    repo_id, _, branch = str(name).partition("@")
    if Path(name).exists() or repo_id.count("/") != 1 or repo_id.startswith((".", "/")):
        return Path(name)
    try:
        return Path(snapshot_download(repo_id, revision=branch or None, ignore_patterns="checkpoints/*"))
    except (*FAILURES, HFValidationError) as error:
        raise ValueError(f"{name} is no folder here and no model on the Hub: {_first_line(error)}") from None


def open_artifact(name: str | Path, made_by: str) -> tuple[DatasetDict, dict[str, Any]]:
    """A region store or pairs, and what they were made from: a stage's folder, or a dataset that a stage pushed.

    Args:
        name: a folder, or `org/name` or `org/name@branch` on the Hub.

    Raises:
        ValueError: there is no whole artifact in the folder and no such dataset on the Hub.
    """
    repo_id, _, branch = str(name).partition("@")
    if Path(name).exists() or repo_id.count("/") != 1:
        meta = read_meta(Path(name), made_by)
        return load_from_disk(str(name)), meta
    try:
        meta_file = hf_hub_download(repo_id, META_FILE, repo_type="dataset", revision=branch or None)
        meta = read_meta(Path(meta_file).parent, made_by)
        return load_dataset(repo_id, revision=branch or None), meta
    except (*FAILURES, HFValidationError) as error:
        raise ValueError(f"{name} is no folder here and no dataset on the Hub: {_first_line(error)}") from None


def push_model(model_dir: Path, facts: CardFacts) -> None:
    """Send a finished model with its card to the stage's branch, tag it STAGE-final, and put it on main."""
    args, stage, repo_id = facts.args, facts.stage, facts.repo_id
    with tempfile.TemporaryDirectory(dir=model_dir.parent, prefix=".push-") as folder:
        shutil.copytree(model_dir, folder, dirs_exist_ok=True)
        write_card(Path(folder), facts)

        def send(branch: str) -> bool:
            return _persist(f"sending the model to {repo_id}@{branch}", _upload(args, repo_id, branch, folder))

        if not send(stage):
            return
        _persist(f"tagging {repo_id}@{stage}-final", lambda: _tag(repo_id, stage))
        on_main: list[str] = []
        _persist(f"asking {repo_id}@main for its stage", lambda: on_main.append(_stage_on_main(repo_id)))
        # A model of a later stage stays on main, and so does one that could not be asked for.
        if on_main and on_main[0] <= stage:
            send("main")


def push_adapter(args: StageArguments, stage: str, adapter_dir: Path) -> None:
    """Send a LoRA adapter, with the base beside it, to the repository HUB_MODEL_ID-STAGE-lora."""
    repo_id = f"{args.hub_model_id}-{stage}-lora"
    with tempfile.TemporaryDirectory(dir=adapter_dir.parent, prefix=".push-") as folder:
        shutil.copytree(adapter_dir, folder, dirs_exist_ok=True)
        config = Path(folder) / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": repo_id}, indent=2))
        _persist(f"sending the adapter to {repo_id}", _upload(args, repo_id, "main", folder))


def push_artifact(args: StageArguments, name: str, folder: Path) -> None:
    """Send a region store or pairs to the dataset repository HUB_MODEL_ID-NAME, with what they were made from."""
    repo_id = f"{args.hub_model_id}-{name}"

    def send() -> None:
        load_from_disk(str(folder)).push_to_hub(repo_id, private=args.hub_private)
        HfApi().upload_file(
            path_or_fileobj=folder / META_FILE, path_in_repo=META_FILE, repo_id=repo_id, repo_type="dataset"
        )

    _persist(f"sending {repo_id}", send)


# Each is done once: where every few requests fail, an attempt needs as few of them as can be.
@functools.cache
def _make_repository(repo_id: str, private: bool) -> None:
    HfApi().create_repo(repo_id, private=private, exist_ok=True)


@functools.cache
def _make_branch(repo_id: str, branch: str) -> None:
    if branch != "main":
        # From the first, empty commit: a branch of main would show another stage's files until this one ends.
        first = HfApi().list_repo_commits(repo_id)[-1].commit_id
        HfApi().create_branch(repo_id, branch=branch, revision=first, exist_ok=True)


def _upload(
    args: StageArguments, repo_id: str, branch: str, folder: str | Path, inside: str = "", replace: bool = True
) -> Callable[[], None]:
    """What sends a folder in one commit; called again after a failure, it sends what is missing.

    Args:
        inside: folder of the repository that it becomes, "", or "checkpoints/" (with `resume`, a later one stays).
        replace: whether other files there are removed.
    """
    api = HfApi(library_name="modeling-villa")
    files = {inside + path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []

    def send() -> None:
        _make_repository(repo_id, args.hub_private)
        _make_branch(repo_id, branch)
        if not operations:
            there = api.list_repo_files(repo_id, revision=branch) if replace else []
            if inside and args.resume and (later := _newest_step(there)) > _newest_step(files):
                raise OSError(f"there is a later one, {later}, which another run left")
            old = [path for path in there if path.startswith(inside) and path not in {*files, ".gitattributes"}]
            operations.extend(CommitOperationDelete(path) for path in old)
            operations.extend(CommitOperationAdd(name, path) for name, path in files.items())
        try:
            api.create_commit(repo_id, operations, commit_message=f"Upload {branch}", revision=branch)
        except EntryNotFoundError as error:
            # What it removes is gone: an earlier attempt went through and its answer got lost. List the files anew, but
            # only now: with a listing in each attempt, a Hub that fails every third request would never get through.
            operations.clear()
            raise OSError(f"{branch} has changed meanwhile: {_first_line(error)}") from error

    return send


def _listing(repo_id: str, revision: str) -> tuple[str, list[str]]:
    """The commit that a branch or tag is at, and its files, from the Hub itself: downloads fall back on their cache."""
    info = HfApi().model_info(repo_id, revision=revision)
    return str(info.sha), [file.rfilename for file in info.siblings or []]


def _newest_step(names: Iterable[str]) -> str:
    return max((name.split("/")[1] for name in names if name.startswith("checkpoints/step-")), default="")


def _stage_on_main(repo_id: str) -> str:
    commit, names = _listing(repo_id, "main")
    if META_FILE not in names:
        return ""
    return read_meta(Path(hf_hub_download(repo_id, META_FILE, revision=commit)).parent, "stage0").get("stage", "")


def _tag(repo_id: str, stage: str) -> None:
    with contextlib.suppress(RevisionNotFoundError):
        HfApi().delete_tag(repo_id, tag=f"{stage}-final")
    HfApi().create_tag(repo_id, tag=f"{stage}-final", revision=stage)


def _persist(what: str, action: Callable[[], None], give_up: Callable[[], bool] = lambda: False) -> bool:
    """Do something on the Hub, again after a failure; where it can't be done, say so and go on."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            action()
            return True
        except FAILURES as error:
            last = attempt == ATTEMPTS or _status(error) in FOR_GOOD or give_up()
            logger.warning("%s failed (%s)%s", what, _first_line(error), "" if last else "; trying again")
            if last:
                break
            time.sleep(2 ** (attempt - 1))
    logger.error("%s was given up; nothing is lost here, and the same command, given again, tries again.", what)
    return False


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> str:
    """A second name for a file, or a copy of it where that can't be."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _client() -> Any:
    """As huggingface_hub makes it, which would wait without end for a Hub that takes a request and says nothing."""
    client = default_client_factory()
    client.event_hooks["request"].append(_limit)
    return client


def _limit(request: Any) -> None:
    # Each request: many of huggingface_hub's functions set "no limit", which wins over one of the client.
    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {what: seconds or SILENCE for what, seconds in limits.items()}


set_client_factory(_client)
