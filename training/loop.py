"""The one training loop: Accelerate, checkpoints that survive a kill, validation, early stopping."""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from arguments import TrainingArguments
from artifacts import check_same, remove_folder, write_folder
from card import public_name, public_options
from hub import Uploads, fetch_checkpoint, open_branch
from stage import start

logger = logging.getLogger(__name__)

# Fields that change nothing about the weights, so that a run may be resumed with others; what the paths lead to is
# compared by its content. Of the dataset's folders the last part is kept.
_FREE = {
    *("run_dir", "output_dir", "resume", "save_steps", "keep_last", "tracker", "num_workers", "num_proc", "strict"),
    *("vlm", "mapping_model", "region_store", "pairs"),
    *("push_to_hub", "hub_model_id", "hub_private", "push_artifacts"),
}


class Objective(nn.Module):
    """A model and what is minimised: `forward(batch)` gives the scalar loss, over all processes' batches."""

    model: Any  # a PreTrainedModel

    def forward(self, batch: dict[str, Any]) -> Tensor:
        raise NotImplementedError


@dataclass
class Progress:
    """Where a run stands: whole updates done, and the best validation loss so far."""

    step: int = 0
    best_loss: float = math.inf
    epochs_without_gain: int = 0


def make_accelerator(args: TrainingArguments, output_dir: Path) -> Accelerator:
    """The Accelerator of a stage; without an accelerator device it runs on the CPU, in many processes too."""
    # Accelerate keeps the precision of a process's first Accelerator and refuses another; the stages of a pipeline
    # share a process, and each has its own. The processes themselves (PartialState) stay as they are.
    AcceleratorState._reset_state()
    start()
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.tracker,
        project_dir=str(output_dir),
    )


def identity(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that the weights depend on, without this machine's folders: others compare them."""
    values = {key: value for key, value in asdict(args).items() if key not in _FREE}
    return {**values, "dataset": public_name(args.dataset), "dataset_kwargs": public_options(args.dataset_kwargs)}


def train(
    accelerator: Accelerator,
    objective: Objective,
    splits: dict[str, Any],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    args: TrainingArguments,
    output_dir: Path,
    made_from: dict[str, Any],
) -> Any:
    """Minimise an objective and return its model, trained.

    Everything random depends on the seed, the update and the process alone, and a checkpoint is renamed into
    place when it is whole: a run that is killed and started again ends with the same weights, bit for bit on a CPU
    (on a GPU some of torch's kernels add in no fixed order).

    Args:
        objective: on any device; parameters with `requires_grad` are trained.
        splits: "train" and "validation", each examples by index with an `image_id`; the mean loss of the second
            is measured after each epoch.
        collate: list of examples -> batch, a dictionary with `image_id` (list of strings).
        output_dir: `checkpoints/` and `log.jsonl` are kept here.
        made_from: what the run depends on besides the arguments; kept in checkpoints and compared.

    Raises:
        ValueError: the dataset is empty, or the checkpoint was made with other arguments.
        FloatingPointError: the loss or its gradient is not finite; names the step and the images.
    """
    batches = Batches(
        len(splits["train"]), args.batch_size, args.seed, accelerator.process_index, accelerator.num_processes
    )
    total = args.max_steps or max(1, int(args.num_epochs * len(batches)) // args.gradient_accumulation_steps)
    if args.num_epochs == 0:
        total = 0
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("Every part of the model is frozen: there is nothing to train.")
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(args.warmup_ratio * total), total)
    made_with = {**identity(args), **made_from, "num_processes": accelerator.num_processes}
    checkpoints = Checkpoints(output_dir, made_with, args.keep_last)
    # Before anything is removed: a token that may not write is an error.
    reached = args.push_to_hub and accelerator.is_main_process and open_branch(args, args.stage)
    if not args.resume and accelerator.is_main_process:
        # What this loop and its stage wrote, and nothing else: the folder may be the user's own.
        for name in ("model", "checkpoints", "base", "adapter"):
            remove_folder(output_dir / name)
        (output_dir / "log.jsonl").unlink(missing_ok=True)
    uploads = None
    if reached:
        fetch_checkpoint(args, args.stage, output_dir, made_with)
    # What a branch may hold that could not be asked for is not overwritten.
    if reached or (args.push_to_hub and accelerator.is_main_process and (checkpoints.all() or not args.resume)):
        uploads = Uploads(args, args.stage, output_dir)
    accelerator.wait_for_everyone()
    progress = checkpoints.load_newest(objective.model, optimizer, schedule, accelerator.scaler)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    if args.tracker:
        accelerator.init_trackers("villa", config={k: v for k, v in asdict(args).items() if v is not None})
    log = Log(accelerator, output_dir, progress.step)

    def save() -> None:
        if accelerator.is_main_process:
            newest = checkpoints.save(objective.model, optimizer, schedule, accelerator.scaler, progress)
            if uploads:
                uploads.checkpoint(newest)
        accelerator.wait_for_everyone()

    micro = batches.stream(progress.step * args.gradient_accumulation_steps, splits["train"], collate, args.num_workers)
    bar = tqdm(
        total=total,
        initial=progress.step,
        desc=output_dir.name,
        disable=not accelerator.is_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    objective.train()
    while progress.step < total and not _stopped(progress, args):
        values = _update(accelerator, wrapped, optimizer, micro, progress.step, args, checkpoints)
        log.write(progress.step + 1, {**values, "lr": schedule.get_last_lr()[0]})
        schedule.step()
        progress.step += 1
        bar.update()
        bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        batches_into_epoch = progress.step * args.gradient_accumulation_steps % len(batches)
        if batches_into_epoch < args.gradient_accumulation_steps or progress.step == total:
            check = partial(_check_finite, "validation loss", step=progress.step, checkpoints=checkpoints)
            value = validation_loss(accelerator, objective, splits["validation"], collate, args, check)
            log.write(progress.step, {"validation/loss": value})
            if accelerator.is_main_process and value < progress.best_loss and args.early_stopping_patience:
                checkpoints.save_best(objective.model)
            _count_gain(progress, value)
        if progress.step % args.save_steps == 0 or progress.step == total or _stopped(progress, args):
            save()
    bar.close()
    log.close()
    if uploads:
        uploads.close()
    model = accelerator.unwrap_model(wrapped).model
    if args.early_stopping_patience and progress.step:
        checkpoints.load_best(model)
    return model.eval()


def _update(
    accelerator: Accelerator,
    wrapped: Any,
    optimizer: Any,
    micro: Iterator[dict[str, Any]],
    step: int,
    args: TrainingArguments,
    checkpoints: "Checkpoints",
) -> dict[str, float]:
    """One update of the weights; its mean loss and the norm of its gradient before clipping."""
    losses, norm = [], math.nan
    for part in range(args.gradient_accumulation_steps):
        batch = next(micro)
        # After the batch has arrived: a loader takes random numbers when it starts, and a resumed run starts one in
        # mid-epoch.
        place = (args.seed * 1_000_003 + step) * args.gradient_accumulation_steps + part
        torch.manual_seed(place * accelerator.num_processes + accelerator.process_index)
        with accelerator.accumulate(wrapped):
            loss = wrapped(send_to_device(batch, accelerator.device))
            losses.append(loss.item())
            _check_finite("loss", losses[-1], step, batch, checkpoints)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(wrapped.parameters(), args.max_grad_norm).item()
                if accelerator.scaler is None:
                    _check_finite("gradient's norm", norm, step, batch, checkpoints)
            optimizer.step()
            optimizer.zero_grad()
    return {"loss": sum(losses) / len(losses), "norm": norm}


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator,
    objective: Objective,
    dataset: Any,
    collate: Callable[..., Any],
    args: TrainingArguments,
    check: Callable[..., None],
) -> float:
    """Mean loss over the batches of a dataset, every process its share of each batch.

    Args:
        check: called with the `value` of each batch's loss and the `batch`; raises if it is not finite.
    """
    batches = Batches(len(dataset), args.batch_size, 0, accelerator.process_index, accelerator.num_processes)
    objective.eval()
    losses = []
    for indices in batches.epoch(0):
        batch = collate([dataset[i] for i in indices])
        with accelerator.autocast():
            losses.append(objective(send_to_device(batch, accelerator.device)).item())
        check(value=losses[-1], batch=batch)
    objective.train()
    return sum(losses) / len(losses)


class Batches:
    """The order of the data: shuffled by (seed, epoch), cut into global batches, each process taking its slice.

    A last batch that is not full is left out, unless it is the only one.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if length == 0:
            raise ValueError("There is nothing to train on: the dataset is empty.")
        if length < world_size:
            raise ValueError(f"{length} examples can't be spread over {world_size} processes.")
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.size = min(batch_size * world_size, length)

    def __len__(self) -> int:
        return self.length // self.size

    def epoch(self, epoch: int) -> Iterator[list[int]]:
        """This process's indices, batch by batch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.length, generator=generator)[: len(self) * self.size]
        for batch in order.view(len(self), self.size):
            yield batch.tensor_split(self.world_size)[self.rank].tolist()

    def stream(self, start: int, dataset: Any, collate: Callable[..., Any], workers: int) -> Iterator[dict[str, Any]]:
        """Batches without end, from the `start`-th on, through a DataLoader."""
        epoch, skip = divmod(start, len(self))
        while True:
            order = list(self.epoch(epoch))[skip:]
            yield from DataLoader(dataset, batch_sampler=order, collate_fn=collate, num_workers=workers)
            epoch, skip = epoch + 1, 0


class Checkpoints:
    """Numbered folders under `output_dir/checkpoints`, each whole or absent, the newest few kept."""

    def __init__(self, output_dir: Path, made_with: dict[str, Any], keep_last: int) -> None:
        self.root = output_dir / "checkpoints"
        self.made_with = made_with
        self.keep_last = keep_last

    def all(self) -> list[Path]:
        """From oldest to newest; a folder that is half written has another name and is never listed."""
        return sorted(self.root.glob("step-????????"))

    def save(self, model: nn.Module, optimizer: Any, schedule: Any, scaler: Any, progress: Progress) -> Path:
        """Write the newest, then remove the oldest; returns the newest."""

        def write(folder: Path) -> None:
            _save_weights(model, folder)
            state = {
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler else {},
            }
            torch.save(state, folder / "trainer.pt")
            (folder / "progress.json").write_text(json.dumps({"progress": asdict(progress), "with": self.made_with}))

        newest = self.root / f"step-{progress.step:08d}"
        write_folder(newest, write)
        for old in self.all()[: -self.keep_last]:
            remove_folder(old)
        return newest

    def load_newest(self, model: nn.Module, optimizer: Any, schedule: Any, scaler: Any) -> Progress:
        """Put model and optimizer back where the newest checkpoint left them; without one, start at 0.

        Raises:
            ValueError: the checkpoint was made with other arguments or inputs.
        """
        if not self.all():
            return Progress()
        folder = self.all()[-1]
        kept = json.loads((folder / "progress.json").read_text())
        check_same(kept["with"], self.made_with, str(folder))
        _load_weights(model, folder)
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        progress = Progress(**kept["progress"])
        logger.info("resumed from %s", folder)
        return progress

    def save_best(self, model: nn.Module) -> None:
        """Keep the weights with the lowest validation loss."""
        write_folder(self.root / "best", lambda folder: _save_weights(model, folder))

    def load_best(self, model: nn.Module) -> None:
        """Put the weights with the lowest validation loss into the model."""
        _load_weights(model, self.root / "best")


class Log:
    """Appends one JSON line per entry to `log.jsonl`, and hands the numbers to the tracker."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, start: int) -> None:
        self.accelerator, self.path = accelerator, output_dir / "log.jsonl"
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
            self.path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Keep the values of one update."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)

    def close(self) -> None:
        """Let the tracker finish."""
        # Not `end_training`: it ends the process group as well, which the stage still needs.
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _stopped(progress: Progress, args: TrainingArguments) -> bool:
    return 0 < args.early_stopping_patience <= progress.epochs_without_gain


def _count_gain(progress: Progress, value: float) -> None:
    if value < progress.best_loss:
        progress.best_loss, progress.epochs_without_gain = value, 0
    else:
        progress.epochs_without_gain += 1


def _check_finite(what: str, value: float, step: int, batch: dict[str, Any], checkpoints: Checkpoints) -> None:
    if math.isfinite(value):
        return
    kept = checkpoints.all()
    raise FloatingPointError(
        f"The {what} is {value} at update {step}, in the batch of images {', '.join(batch['image_id'])}. "
        f"The last good checkpoint is {kept[-1] if kept else 'none yet'}; "
        "look at those images, lower --learning_rate, or try --mixed_precision no."
    )


def _save_weights(model: nn.Module, folder: Path) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
    )


def _load_weights(model: nn.Module, folder: Path) -> None:
    model.load_state_dict(load_file(folder / "model.safetensors"))
