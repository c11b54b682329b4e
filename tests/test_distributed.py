"""Two processes over gloo: the same losses, gradients and weights as one with the whole batch."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel
from training_helpers import (
    STAGES,
    copy_of_run,
    files_of,
    finished_run,
    in_child,
    in_two_processes,
    read_log,
    run_stage,
    tiny_config,
    write_config,
)

from datasets_scripts.loading import Collator, load_split
from datasets_scripts.schema import attribute_names, attribute_prompts
from gather import gather_with_gradient
from modeling_villa import VillaClipModel, VillaMappingModel, VillaProcessor
from stage0 import ImageTextCollator, ImageTextObjective, Stage0Arguments
from stage1 import MappingObjective
from stage2 import RegionTextCollator, RegionTextObjective, Stage2Arguments
from texts import FrozenTexts, RegionTexts

SHARES = (slice(0, 5), slice(5, 8))  # ragged on purpose


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


def share_of(values):
    """This process's part of a list, all of it in a single process."""
    state = PartialState(cpu=True)
    return values[SHARES[state.process_index]] if state.num_processes > 1 else values


def gathered():
    """(gathered rows, gradient of this process's rows, gathered booleans) for a loss that mixes all rows."""
    generator = torch.Generator().manual_seed(0)
    rows = share_of(torch.randn(8, 3, dtype=torch.float64, generator=generator)).clone().requires_grad_()
    whole = gather_with_gradient(rows)
    (whole.t() @ whole).logsumexp(0).square().sum().backward()
    return whole.detach().numpy(), rows.grad.numpy(), gather_with_gradient(rows.detach() > 0).numpy()


def test_gathering_with_gradients():
    whole, gradient, flags = in_child(gathered)
    parts = in_two_processes(gathered)
    for rows, _, booleans in parts:
        np.testing.assert_array_equal(rows, whole)
        np.testing.assert_array_equal(booleans, flags)
        assert booleans.dtype == np.bool_
    # Both processes compute the loss: the sum of their gradients is twice the gradient, which DDP's mean halves.
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]) / 2, gradient, rtol=1e-12)


def gathered_unevenly():
    state = PartialState(cpu=True)
    rows = torch.full((3 * state.process_index, 2), 1.0, requires_grad=True)
    whole = gather_with_gradient(rows)
    whole.square().sum().backward()
    return tuple(whole.shape), rows.grad.tolist()


def test_a_process_may_have_nothing():
    assert in_two_processes(gathered_unevenly) == [((3, 2), []), ((3, 2), [[4.0, 4.0]] * 3)]


def objective_of(stage, config, run_dir):
    """(objective in double precision, without dropout, its collator, examples), built as the stage builds them."""
    options = yaml.safe_load(config.read_text())["dataset_kwargs"]
    data = load_split("docmnist", options, "train")
    examples = [data[i] for i in range(8)]
    names, prompts = attribute_names(data), attribute_prompts(data)
    folder = run_dir / ("stage1" if stage == "stage1" else "stage0") / "model"
    processor = VillaProcessor.from_pretrained(folder)
    if stage == "stage1":
        model = VillaMappingModel.from_pretrained(folder).double()
        model.vlm.requires_grad_(False)
        model.vlm.vision_model.requires_grad_(True)
        return MappingObjective(model).eval(), Collator(processor, len(names)), examples
    model = VillaClipModel.from_pretrained(folder).double().eval()
    if stage == "stage0":
        return ImageTextObjective(model, Stage0Arguments()).eval(), ImageTextCollator(processor, len(names)), examples
    frozen = None
    if stage == "stage2_frozen":
        model.text_model.requires_grad_(False)
        sentences = [sentence for example in examples for sentence in example["sentences"]]
        frozen = FrozenTexts(model, processor.tokenizer, sentences + [example["text"] for example in examples])
    texts = RegionTexts([prompts[name] for name in names], "sentences")
    collate = RegionTextCollator(processor, len(names), "region_attributes", texts, tokens=frozen is None)
    return RegionTextObjective(model, frozen, Stage2Arguments()).eval(), collate, examples


def loss_and_gradients(stage, config, run_dir):
    torch.manual_seed(0)
    objective, collate, examples = objective_of(stage, config, run_dir)
    distributed = PartialState(cpu=True).num_processes > 1
    batch = collate(share_of(examples))
    batch = {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in batch.items()}
    wrapped = DistributedDataParallel(objective) if distributed else objective
    loss = wrapped(batch)
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in objective.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2", "stage2_frozen"])
def test_loss_and_gradients_are_those_of_the_whole_batch(finished, stage):
    expected_loss, expected = in_child(loss_and_gradients, stage, *finished)
    assert expected_loss > 0.1
    assert max(abs(gradient).max() for gradient in expected.values()) > 1e-3
    for loss, gradients in in_two_processes(loss_and_gradients, stage, *finished):
        assert loss == pytest.approx(expected_loss, abs=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            np.testing.assert_allclose(gradients[name], gradient, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.fixture(scope="module")
def pair(finished, tmp_path_factory):
    """(config, run folder) of all stages run on two processes, without dropout, half the batch each."""
    folder = tmp_path_factory.mktemp("pair")
    kwargs = {**tiny_config(folder)["stage0"]["backbone_kwargs"], "drop_rate": 0.0}
    options = yaml.safe_load(finished[0].read_text())["dataset_kwargs"]
    config = write_config(folder, batch_size=4, max_steps=4, dataset_kwargs=options, stage0={"backbone_kwargs": kwargs})
    for stage in STAGES:
        one, other = in_two_processes(run_stage, stage, config)
        assert one == other
    return config, folder / "run"


def test_two_processes_leave_one_artifact_of_each_stage(pair):
    _, run_dir = pair
    names = sorted(path.name for path in run_dir.iterdir())
    assert names == sorted(STAGES)
    for stage in ("stage0", "stage1", "stage2"):
        assert sorted(path.name for path in (run_dir / stage).iterdir()) == ["checkpoints", "log.jsonl", "model"]
        assert [line["step"] for line in read_log(run_dir / stage) if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_two_processes_train_as_one_with_the_whole_batch(pair, tmp_path, stage):
    config, run_dir = pair
    copy = copy_of_run(run_dir, tmp_path, *[name for name in STAGES if name < stage and name != "embed_regions"])
    if stage == "stage2":
        copy_of_run(run_dir, tmp_path / "more", "stage0")
    in_child(run_stage, stage, config, "--run_dir", copy, "--batch_size", 8)
    two = [line["loss"] for line in read_log(run_dir / stage) if "loss" in line]
    one = [line["loss"] for line in read_log(copy / stage) if "loss" in line]
    assert two == pytest.approx(one, rel=1e-3)
    assert len(set(two)) == 4


def test_a_run_on_two_processes_resumes_bit_for_bit(pair, finished, tmp_path):
    config, run_dir = pair
    copy = copy_of_run(run_dir, tmp_path, "stage0")
    words = ("--run_dir", copy, "--backbone_kwargs", json.dumps(tiny_config(tmp_path)["stage0"]["backbone_kwargs"]))
    words = (*words, "--no_resume")
    in_two_processes(run_stage, "stage0", config, *words)
    whole = files_of(copy / "stage0" / "model")
    shutil.rmtree(copy / "stage0" / "model")
    shutil.rmtree(copy / "stage0" / "checkpoints" / "step-00000004")
    in_two_processes(run_stage, "stage0", config, *words[:-1])
    assert files_of(copy / "stage0" / "model") == whole
