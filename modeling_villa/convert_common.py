"""What the conversions share: reading checkpoints, comparing tensors, writing the folder."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import HfArgumentParser

from .modeling_villa_clip import VillaClipModel
from .processing_villa import VillaProcessor


def read_tensors(path: Path, name: str) -> dict[str, Any]:
    """What a .safetensors file holds, or one of torch.save; nothing is unpickled but tensors.

    Args:
        path: the file.
        name: what error messages call it.

    Raises:
        ValueError: there are no plain tensors in the file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}, not a dictionary of tensors")
        return found
    except Exception as error:  # whatever the unpickler meets that is no tensor
        raise ValueError(
            f"{name} cannot be read as plain tensors (weights_only=True), as OpenAI's TorchScript archives "
            "cannot; give the same weights as .safetensors, and those as a whole file."
        ) from error


def counters(model: VillaClipModel) -> dict[str, Tensor]:
    """The steps counted by the model's BatchNorms, which are not in every file and are not used."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")}


def check_tensors(found: dict[str, Tensor], model: VillaClipModel) -> None:
    """Check renamed tensors against the model's.

    Raises:
        ValueError: tensors are missing, left over or of another shape; all of them are named.
    """
    expected = model.state_dict()
    problems = {
        "missing": [name for name in expected if name not in found],
        "left over": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(f"The checkpoint is not one of this model. Tensors {listed}.")


def check_output(output: str) -> None:
    """
    Raises:
        ValueError: the folder is there already.
    """
    if Path(output).exists():
        raise ValueError(f"output: {output} exists already.")


def write(output: str, model: VillaClipModel, processor: VillaProcessor) -> None:
    """Write the folder; it gets its name only when it is complete.

    Raises:
        ValueError: the processor is not the model's.
    """
    model.check_processor(processor)
    folder = Path(output)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    os.replace(partial, folder)


def run(arguments: Any, convert: Callable[[Any], None]) -> None:
    """A conversion's command line, its options those of a dataclass."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    convert(HfArgumentParser(arguments, allow_abbrev=False).parse_args_into_dataclasses()[0])
