"""What the stages do alike: read the corpus, find the device, hand on a model."""

import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel

from arguments import StageArguments
from artifacts import fingerprint_of_strings, is_finished, write_folder, write_meta
from card import CardFacts
from datasets_scripts.loading import load_split
from datasets_scripts.schema import attribute_names
from hub import fetch_model, push_adapter, push_model
from modeling_villa import VillaClipModel, VillaProcessor

# How long processes wait for the one that generates data or embeds regions.
PATIENCE = timedelta(hours=24)


def start() -> PartialState:
    """The processes of this run; without an accelerator they use the CPU. The main one says what it skips, resumes."""
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.WARNING, format="%(message)s")
    for client in ("httpx", "httpx2"):  # they tell of every request
        logging.getLogger(client).setLevel(logging.WARNING)
    return state


def open_vlm(folder: Path) -> tuple[VillaClipModel, VillaProcessor]:
    """A VLM and its processor.

    Raises:
        ValueError: the tokenizer is not the text tower's, or the image tower can't take the processor's images.
    """
    model, processor = VillaClipModel.from_pretrained(folder), VillaProcessor.from_pretrained(folder)
    try:
        model.check_processor(processor)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model, processor


def load_splits(args: StageArguments) -> dict[str, Dataset]:
    """The checked train and validation splits; the main process generates them, the others read its cache."""
    with start().main_process_first():
        return {
            split: load_split(args.dataset, json.loads(args.dataset_kwargs), split, args.strict, args.num_proc)
            for split in ("train", "validation")
        }


def fingerprints(splits: dict[str, Dataset]) -> dict[str, str]:
    """What an artifact made from these splits depends on: the vocabulary, and each split's images by all but pixels."""
    columns = ["image_id", "sentences", "regions", "attributes", "attribute_sentences"]
    prints = {
        f"{split}_split": fingerprint_of_strings(json.dumps(rows) for rows in data.select_columns(columns).iter(1000))
        for split, data in splits.items()
    }
    return {"vocabulary": fingerprint_of_strings(attribute_names(splits["train"])), **prints}


def has_model(args: StageArguments, folder: Path, meta: dict[str, Any]) -> bool:
    """Whether the finished model is there; with `--push_to_hub` another machine may have left it on its branch.

    Raises:
        ValueError: it is there, but was made otherwise; the message names what differs.
    """
    with start().main_process_first():
        if args.push_to_hub and start().is_main_process:
            fetch_model(args, folder, meta)
    return is_finished(folder, meta, args.resume)


def send_model(args: StageArguments, folder: Path, splits: dict[str, Dataset]) -> Path:
    """Send a finished model to the Hub, with `--push_to_hub`; returns its folder."""
    if args.push_to_hub and start().is_main_process:
        names = attribute_names(splits["train"])
        example = splits["validation"][0]["image"]
        push_model(folder, CardFacts(args, args.stage, str(args.hub_model_id), attributes=names, example=example))
        if (folder.parent / "adapter").is_dir():
            push_adapter(args, args.stage, folder.parent / "adapter")
    start().wait_for_everyone()
    return folder


def save_model(folder: Path, model: PreTrainedModel, processor: VillaProcessor, meta: dict[str, Any]) -> None:
    """Write a stage's model, its processor and what it was made from, from the main process."""

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
        write_meta(aside, meta)

    if start().is_main_process:
        write_folder(folder, write)
    start().wait_for_everyone()
