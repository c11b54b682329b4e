"""LoRA (Hu et al., 2021) with PEFT: adapters in the towers, how they are kept, and how they are merged.

An adapted stage writes three folders instead of one:
    model/    the whole trained model, the adapter merged into its weights: what later stages and evaluations read;
    base/     the model that training started from;
    adapter/  the adapter (`adapter_config.json`, `adapter_model.safetensors`) with its base embedded, so that
              `AutoModel.from_pretrained(adapter)` is the trained model in one call, wherever the folder lies, and
              `AutoModel.from_pretrained(base).load_adapter(adapter)` is the same.
The adapter names its base "../base", a path of no machine. To send it to the Hub without the base's weights:
    model = AutoModel.from_pretrained(adapter)
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.push_to_hub("org/adapter")
"""

import copy
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from arguments import TrainingArguments
from artifacts import remove_folder, write_folder
from modeling_villa import VillaProcessor
from stage import start

logger = logging.getLogger(__name__)

NAME = "default"  # what PEFT and load_adapter call an adapter that is given no name
TRAINED = ("frozen", "lora", "full")
BYTES = 12  # of a trained float32 parameter besides itself: its gradient and AdamW's two moments


@dataclass
class LoraArguments(TrainingArguments):
    """What a stage that can adapt a tower needs besides."""

    lora_rank: int = field(default=16, metadata={"help": "rank r of LoRA's updates"})
    lora_alpha: float = field(default=32, metadata={"help": "LoRA's updates are scaled by LORA_ALPHA / LORA_RANK"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the inputs of LoRA's updates"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}.")
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}.")


def import_peft() -> Any:
    """PEFT, which nothing but LoRA needs.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"LoRA needs peft ({error}): pip install modeling-villa[train]") from error
    return peft


def layers_to_adapt(model: nn.Module, part: str) -> list[str]:
    """Names of the layers beneath a part of the model that LoRA can adapt and be merged into.

    These are all plain linear and convolutional layers: of a text tower q, k, v and out_proj, both layers of each MLP
    and the projection (adapting all of them is what reaches full training; Dettmers et al., 2023, section 4), of an
    image tower every convolution, too, from which it mostly consists. Left out, and so frozen, are

    - grouped convolutions, which PEFT can't merge, dilated ones and those that pad with anything but zeros, whose
      updates PEFT computes without;
    - subclasses of both, which do more with their weight than multiply (standardise it, pad the input);
    - a `qkv` beside a `q_bias` (BEiT, EVA, Swin v2), whose weight timm uses without calling the layer.

    Raises:
        ValueError: nothing is left.
    """
    found = []
    for name, module in model.get_submodule(part).named_modules(prefix=part):
        above, _, own = name.rpartition(".")
        if type(module) is nn.Linear:
            adaptable = own != "qkv" or getattr(model.get_submodule(above), "q_bias", None) is None
        else:
            adaptable = type(module) is nn.Conv2d and module.groups == 1 and set(module.dilation) == {1}
            adaptable = adaptable and module.padding_mode == "zeros"
        if adaptable:
            found.append(name)
    if not found:
        raise ValueError(
            f"{part} ({type(model.get_submodule(part)).__name__}) has no layer that LoRA can adapt, no plain linear or "
            "ungrouped convolutional one; leave it frozen or train it in full."
        )
    return found


def add_adapter(model: Any, adapted: Sequence[str], trained: Sequence[str], args: LoraArguments) -> None:
    """Freeze a model, in place, but for LoRA beneath some parts and for other parts, which are trained in full.

    Args:
        model: a PreTrainedModel; it keeps its class, and gets PEFT's layers inside.
        adapted: names of the parts whose layers are adapted.
        trained: names of the parts that are trained in full and kept in the adapter, buffers included. PEFT takes
            every module whose name ends like one of them.

    Raises:
        ValueError: a part has no layer to adapt.
    """
    names = [name for part in adapted for name in layers_to_adapt(model, part)]
    whole = sum(parameter.numel() for parameter in model.parameters())
    config = import_peft().LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=names,
        modules_to_save=list(trained) or None,
    )
    model.add_adapter(config, NAME)
    config.target_modules = set(names)  # PEFT has shortened a long list to common endings
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(
        "LoRA of rank %d in %d layers of a model of %s parameters: %s are trained, their gradients and AdamW's moments "
        "take %.1f MiB",
        args.lora_rank,
        len(names),
        f"{whole:,}",
        f"{count:,}",
        count * BYTES / 2**20,
    )


def keep_statistics(tower: nn.Module) -> None:
    """To be called after `train()`: a frozen tower stays as it is, and so do an adapted one's batch statistics."""
    trained = {parameter.requires_grad for parameter in tower.parameters()}
    if trained == {False}:
        tower.eval()
    elif False in trained:
        for module in tower.modules():
            if hasattr(module, "running_var"):
                module.eval()


def remove_adapter(model: Any, merge: bool) -> Any:
    """Take the adapter out of a model, in place: what remains is its base or, merged, the whole trained model."""
    peft = import_peft()
    for name, module in list(model.named_modules()):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            if merge:
                module.merge()
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, peft.utils.ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[NAME] if merge else module.original_module)
    model.delete_adapter(NAME)
    return model


def save_adapter(output_dir: Path, model: Any, processor: VillaProcessor) -> None:
    """Write `adapter/` and `base/` from the main process, then merge the adapter into the model.

    Without an adapter those of an earlier run are removed.
    """
    has_adapter = hasattr(model, "peft_config")
    base_dir, adapter_dir = output_dir / "base", output_dir / "adapter"

    def write_base(aside: Path) -> None:
        remove_adapter(copy.deepcopy(model), merge=False).save_pretrained(aside)
        processor.save_pretrained(aside)

    def write_adapter(aside: Path) -> None:
        model.save_pretrained(aside)  # of a model with an adapter transformers writes the adapter alone
        path = aside / "adapter_config.json"
        config = json.loads(path.read_text())
        config |= {"base_model_name_or_path": "../base", "target_modules": sorted(config["target_modules"])}
        path.write_text(json.dumps(config, indent=2) + "\n")
        shutil.copytree(base_dir, aside, dirs_exist_ok=True)

    if start().is_main_process:
        for folder, write in ((base_dir, write_base), (adapter_dir, write_adapter)):
            remove_folder(folder)
            if has_adapter:
                write_folder(folder, write)
    if has_adapter:
        remove_adapter(model, merge=True)
