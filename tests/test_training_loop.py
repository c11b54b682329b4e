"""The training loop on a model of a few numbers: order of the data, updates, checkpoints, stopping, errors."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_helpers import Child, ChildError, die, files_of, read_log

import loop
from arguments import TrainingArguments
from loop import Batches, Objective, make_accelerator, train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Toy(Objective):
    """Least squares with a linear model and dropout of its input; notes the indices that it sees."""

    def __init__(self, dropout=0.0, poisoned=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Linear(3, 1)
        with torch.no_grad():
            self.model.weight.copy_(torch.randn(1, 3, generator=generator))
            self.model.bias.zero_()
        self.dropout, self.poisoned = nn.Dropout(dropout), poisoned
        self.seen = []

    def forward(self, batch):
        if self.training:
            self.seen.append(batch["image_id"])
        loss = (self.model(self.dropout(batch["x"]))[:, 0] - batch["y"]).square().mean()
        return loss * math.nan if self.poisoned in batch["image_id"] and self.training else loss


def examples(count, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + noise * torch.randn(count, generator=generator)
    return [{"image_id": f"image-{i}", "x": x[i], "y": y[i]} for i in range(count)]


def collate(rows):
    return {
        "image_id": [row["image_id"] for row in rows],
        "x": torch.stack([row["x"] for row in rows]),
        "y": torch.stack([row["y"] for row in rows]),
    }


SPLITS = {"train": examples(17), "validation": examples(9, seed=1)}


def fit(folder, objective=None, splits=SPLITS, made_from=None, **options):
    """Train a toy; returns its weights, the objective and the log."""
    options = {"batch_size": 4, "num_epochs": 2, "learning_rate": 0.1, "warmup_ratio": 0.0, **options}
    args = TrainingArguments(run_dir=str(folder), **options)
    objective = objective or Toy()
    model = train(make_accelerator(args, folder), objective, splits, collate, args, folder, made_from or {"data": "1"})
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, objective, read_log(folder)


def losses(log):
    return [line for line in log if "loss" in line]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The order of the data


def test_order_is_a_function_of_seed_and_epoch():
    def orders(seed, epoch):
        return list(Batches(23, 5, seed, 0, 1).epoch(epoch))

    assert orders(3, 2) == orders(3, 2)
    assert orders(3, 2) != orders(3, 1)
    assert orders(3, 2) != orders(4, 2)


def test_an_epoch_holds_each_example_once_and_drops_the_last_short_batch():
    batches = Batches(23, 5, 0, 0, 1)
    epoch = list(batches.epoch(0))
    assert len(batches) == len(epoch) == 4
    assert {len(batch) for batch in epoch} == {5}
    assert len({index for batch in epoch for index in batch}) == 20
    dropped = [set(range(23)) - {i for batch in batches.epoch(epoch) for i in batch} for epoch in range(50)]
    assert set().union(*dropped) == set(range(23))  # not always the same ones


def test_a_short_batch_is_kept_if_it_is_the_only_one():
    assert sorted(next(Batches(3, 5, 0, 0, 1).epoch(0))) == [0, 1, 2]
    assert len(Batches(3, 5, 0, 0, 1)) == 1


@pytest.mark.parametrize("length", [24, 5])
def test_processes_share_a_global_batch(length):
    whole = list(Batches(length, 6, 7, 0, 1).epoch(1))
    parts = [list(Batches(length, 2, 7, rank, 3).epoch(1)) for rank in range(3)]
    assert [[i for part in slices for i in part] for slices in zip(*parts, strict=True)] == whole


def test_nothing_to_train_on():
    with pytest.raises(ValueError, match="nothing to train on"):
        Batches(0, 4, 0, 0, 1)
    with pytest.raises(ValueError, match="2 examples can't be spread over 3 processes"):
        Batches(2, 4, 0, 0, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_from_anywhere_is_the_same_stream(workers):
    batches = Batches(17, 4, 0, 0, 1)
    stream = batches.stream(0, SPLITS["train"], collate, workers)
    whole = [next(stream)["image_id"] for _ in range(10)]
    for start in (1, 4, 6):
        later = batches.stream(start, SPLITS["train"], collate, workers)
        assert [next(later)["image_id"] for _ in range(10 - start)] == whole[start:]


# Updates


def test_updates_are_adamw_on_the_batches_in_order(tmp_path):
    found, objective, log = fit(tmp_path, num_epochs=2, max_grad_norm=0.5, weight_decay=0.2)
    twin = Toy()
    optimizer = torch.optim.AdamW(twin.model.parameters(), lr=0.1, weight_decay=0.2)
    order = [indices for epoch in range(2) for indices in Batches(17, 4, 0, 0, 1).epoch(epoch)]
    for step, indices in enumerate(order):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / len(order)))
        loss = twin(collate([SPLITS["train"][i] for i in indices]))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(twin.model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        line = losses(log)[step]
        assert line["step"] == step + 1
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert line["norm"] == pytest.approx(norm.item(), rel=1e-6)
        assert line["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
    assert objective.seen == [[f"image-{i}" for i in indices] for indices in order]
    for name, tensor in twin.model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path):
    splits = {**SPLITS, "train": examples(16)}
    options = {"splits": splits, "num_epochs": 4, "max_grad_norm": 0.3}
    large, _, large_log = fit(tmp_path / "1x8", batch_size=8, **options)
    small, _, small_log = fit(tmp_path / "2x4", batch_size=4, gradient_accumulation_steps=2, **options)
    assert len(losses(large_log)) == len(losses(small_log)) == 8
    for name in large:
        torch.testing.assert_close(small[name], large[name], rtol=1e-5, atol=1e-6)
    assert [line["norm"] for line in losses(small_log)] == pytest.approx(
        [line["norm"] for line in losses(large_log)], rel=1e-4
    )


def test_learning_rate_rises_then_falls_as_a_cosine(tmp_path):
    _, _, log = fit(tmp_path, max_steps=20, warmup_ratio=0.25, learning_rate=0.4)
    found = [line["lr"] for line in losses(log)]
    rising = [0.4 * step / 5 for step in range(5)]
    falling = [0.4 * 0.5 * (1 + math.cos(math.pi * (step - 5) / 15)) for step in range(5, 20)]
    assert found == pytest.approx(rising + falling)


def test_gradients_are_clipped(tmp_path):
    # AdamW hides the scale of a gradient, but not that of one gradient against the others.
    free, _, log = fit(tmp_path / "free", max_grad_norm=1e9, max_steps=4)
    clipped, _, _ = fit(tmp_path / "clipped", max_grad_norm=0.01, max_steps=4)
    assert max(line["norm"] for line in losses(log)) > 1
    assert not equal(free, clipped)


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({"num_epochs": 2}, 8),
        ({"num_epochs": 0.5}, 2),
        ({"num_epochs": 0.01}, 1),
        ({"num_epochs": 9, "max_steps": 3}, 3),
        ({"num_epochs": 2, "gradient_accumulation_steps": 3}, 2),
    ],
)
def test_number_of_updates(tmp_path, options, updates):
    assert len(losses(fit(tmp_path, **options)[2])) == updates


def test_frozen_parameters_stay(tmp_path):
    objective = Toy()
    objective.model.bias.requires_grad_(False)
    found, _, _ = fit(tmp_path, objective)
    assert found["bias"].item() == 0
    assert not torch.equal(found["weight"], Toy().model.weight)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_mixed_precision(tmp_path, precision):
    seen = []

    class Watching(Toy):
        def forward(self, batch):
            seen.append(self.model(batch["x"]).dtype)
            return super().forward(batch)

    found, _, log = fit(tmp_path, Watching(), max_steps=2, mixed_precision=precision)
    assert set(seen) == {torch.float32 if precision == "no" else torch.bfloat16}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(math.isfinite(line["loss"]) for line in losses(log))


def test_stages_of_one_process_may_differ_in_precision_and_accumulation(tmp_path):
    first, _, _ = fit(tmp_path / "a", max_steps=2)
    fit(tmp_path / "b", max_steps=2, mixed_precision="bf16", gradient_accumulation_steps=2)
    third, _, _ = fit(tmp_path / "c", max_steps=2)
    assert equal(first, third)


# Validation, early stopping, log


def test_validation_after_each_epoch_and_at_the_end(tmp_path):
    _, _, log = fit(tmp_path, num_epochs=2.5)
    assert [line["step"] for line in log if "validation/loss" in line] == [4, 8, 10]


def test_validation_loss_is_the_mean_over_batches_without_dropout(tmp_path):
    found, objective, log = fit(tmp_path, Toy(dropout=0.5), max_steps=1)
    twin = Toy()
    twin.model.load_state_dict(found)
    batches = [collate([SPLITS["validation"][i] for i in rows]) for rows in Batches(9, 4, 0, 0, 1).epoch(0)]
    with torch.no_grad():
        expected = sum(twin(batch).item() for batch in batches) / 2
    assert log[-1]["validation/loss"] == pytest.approx(expected, rel=1e-6)
    assert len(objective.seen) == 1


def overfitting(folder, **options):
    """A run whose validation loss soon rises: the two splits want opposite weights."""
    turned = [{**row, "y": -row["y"]} for row in SPLITS["train"][:8]]
    objective = Toy()
    with torch.no_grad():
        objective.model.weight.copy_(torch.tensor([[-1.4, 2.8, -0.7]]))  # first the way to the middle, then past it
    splits = {"train": SPLITS["train"], "validation": turned}
    return fit(folder, objective, splits, num_epochs=30, learning_rate=0.02, **options)


def test_early_stopping_stops_and_the_best_weights_win(tmp_path):
    found, _, log = overfitting(tmp_path, early_stopping_patience=2, save_steps=3)
    values = [line["validation/loss"] for line in log if "validation/loss" in line]
    best = values.index(min(values))
    assert 0 < best == len(values) - 3, values
    assert len(losses(log)) == 4 * len(values) < 4 * 30
    twin = Toy()
    twin.model.load_state_dict(found)
    turned = [{**row, "y": -row["y"]} for row in SPLITS["train"][:8]]
    rows = [collate([turned[i] for i in indices]) for indices in Batches(8, 4, 0, 0, 1).epoch(0)]
    with torch.no_grad():
        assert sum(twin(row).item() for row in rows) / 2 == pytest.approx(min(values), rel=1e-6)


def test_without_patience_the_last_weights_win(tmp_path):
    _, _, log = overfitting(tmp_path)
    values = [line["validation/loss"] for line in log if "validation/loss" in line]
    assert len(values) == 30
    assert values[-1] > min(values)
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_tensorboard_writes_its_file(tmp_path):
    pytest.importorskip("tensorboard")
    fit(tmp_path, max_steps=2, tracker="tensorboard")
    events = [path for path in tmp_path.rglob("events.out.tfevents.*") if path.stat().st_size > 100]
    assert events


# Checkpoints


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept(tmp_path):
    fit(tmp_path, max_steps=8, save_steps=3, keep_last=2)
    assert names(tmp_path) == ["step-00000006", "step-00000008"]
    assert set(files_of(tmp_path / "checkpoints" / "step-00000006")) == {
        "model.safetensors",
        "trainer.pt",
        "progress.json",
    }


def fit_and_die(folder, step, options):
    """Train a toy that is killed while it computes update `step`."""

    class Mortal(Toy):
        def forward(self, batch):
            if self.training and len(self.seen) == step:
                die()
            return super().forward(batch)

    fit(folder, Mortal(dropout=0.3), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_epochs": 3, "save_steps": 3},
        # A killed process's loaders hold on for seconds.
        pytest.param({"num_epochs": 3, "save_steps": 1, "num_workers": 1}, marks=pytest.mark.slow),
        {"num_epochs": 4, "save_steps": 3, "gradient_accumulation_steps": 2},
        {"num_epochs": 3, "save_steps": 3, "early_stopping_patience": 2},
    ],
    ids=["plain", "workers", "accumulation", "early_stopping"],
)
def test_killed_anywhere_ends_with_the_same_weights_and_log(tmp_path, options):
    expected, _, log = fit(tmp_path / "whole", Toy(dropout=0.3), **options)
    plain, _, _ = fit(tmp_path / "plain", Toy(), **options)
    assert not equal(expected, plain)  # the dropout is at work
    for step in (1, 4, 5):
        with pytest.raises(ChildError, match="exit code -9"):
            Child(fit_and_die, tmp_path / "killed", step, options).finish()
    found, _, resumed_log = fit(tmp_path / "killed", Toy(dropout=0.3), **options)
    assert equal(found, expected)
    assert resumed_log == log


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path):
    expected, _, _ = fit(tmp_path, max_steps=4, save_steps=2)
    half = tmp_path / "checkpoints" / ".step-00000099.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    found, _, _ = fit(tmp_path, max_steps=4, save_steps=2)
    assert equal(found, expected)


def test_a_log_cut_off_in_a_line_goes_on_without_doubles(tmp_path):
    fit(tmp_path, max_steps=6, save_steps=2, keep_last=3)
    expected = read_log(tmp_path)
    for folder in names(tmp_path)[1:]:
        loop.remove_folder(tmp_path / "checkpoints" / folder)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    _, _, log = fit(tmp_path, max_steps=6, save_steps=2, keep_last=3)
    assert log == expected
    assert [line["step"] for line in losses(log)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.2}, "learning_rate was 0.1, is now 0.2"),
        ({"seed": 1}, "seed was 0, is now 1"),
        ({"made_from": {"data": "2"}}, "data was '1', is now '2'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, words):
    fit(tmp_path, max_steps=2)
    before = files_of(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=words):
        fit(tmp_path, max_steps=2, **change)
    assert files_of(tmp_path / "checkpoints") == before


def test_what_changes_no_weights_may_change_on_resume(tmp_path):
    fit(tmp_path, max_steps=2)
    fit(tmp_path, max_steps=2, save_steps=1, keep_last=1, num_workers=1, strict=True)


def test_no_resume_starts_anew_and_removes_only_its_own(tmp_path):
    fit(tmp_path, max_steps=4, save_steps=1)
    (tmp_path / "model").mkdir()
    (tmp_path / "notes.txt").write_text("the user's")
    _, objective, log = fit(tmp_path, max_steps=3, learning_rate=0.2, resume=False)
    assert len(objective.seen) == 3
    assert names(tmp_path) == ["step-00000003"]
    assert [line["step"] for line in losses(log)] == [1, 2, 3]
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "notes.txt").read_text() == "the user's"


# Loss that is not finite


def test_a_nan_loss_stops_and_names_step_images_and_checkpoint(tmp_path):
    order = list(Batches(17, 4, 0, 0, 1).epoch(0))
    poisoned = f"image-{order[2][1]}"
    with pytest.raises(FloatingPointError) as caught:
        fit(tmp_path, Toy(poisoned=poisoned), save_steps=1)
    message = str(caught.value)
    assert "The loss is nan at update 2" in message
    assert ", ".join(f"image-{i}" for i in order[2]) in message
    assert str(tmp_path / "checkpoints" / "step-00000002") in message
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    weights = load_file(tmp_path / "checkpoints" / "step-00000002" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    expected, _, _ = fit(tmp_path / "whole", save_steps=1)
    found, _, _ = fit(tmp_path, save_steps=1)
    assert equal(found, expected)


def test_a_nan_before_the_first_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"at update 0.*last good checkpoint is none yet"):
        fit(tmp_path, Toy(poisoned=f"image-{next(Batches(17, 4, 0, 0, 1).epoch(0))[0]}"))


def test_an_infinite_gradient_stops_too(tmp_path):
    class Cliff(Toy):
        def forward(self, batch):
            return super().forward(batch) + (self.model.bias.abs() * 0).sqrt().sum()  # 0, its gradient is not finite

    with pytest.raises(FloatingPointError, match=r"gradient's norm is (nan|inf) at update 0"):
        fit(tmp_path, Cliff())


def test_a_nan_validation_loss_stops(tmp_path):
    splits = {**SPLITS, "validation": [{**row, "y": torch.tensor(math.nan)} for row in SPLITS["validation"]]}
    with pytest.raises(FloatingPointError, match="validation loss is nan at update 4"):
        fit(tmp_path, splits=splits)


def test_progress_is_plain_json_beside_the_weights(tmp_path):
    fit(tmp_path, max_steps=2, save_steps=1)
    kept = json.loads((tmp_path / "checkpoints" / "step-00000001" / "progress.json").read_text())
    assert kept["progress"]["step"] == 1
    assert kept["with"]["learning_rate"] == 0.1 and kept["with"]["data"] == "1"
