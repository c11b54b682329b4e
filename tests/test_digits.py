"""Where DocMNIST's digits come from: the bundled ones, MNIST, the user's own files, and what is refused."""

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image, load_dataset
from PIL import Image as PilImage

from datasets_scripts import digits as digits_module
from datasets_scripts.digits import SPLITS, fingerprint, load_digits
from datasets_scripts.docmnist import DocMnistConfig, split_digits


def test_splits_share_no_digit_image():
    parts = [load_digits("optdigits", split) for split in SPLITS]
    hashes = [{image.tobytes() for image in part.images} for part in parts]
    assert sum(map(len, hashes)) == len(set().union(*hashes))
    assert sum(len(part.labels) for part in parts) == 1797
    assert all(set(part.labels) == set(range(10)) for part in parts)


def test_bundled_digits_are_legible():
    painted = (load_digits("optdigits", "train").images >= 120).mean(axis=(1, 2))
    assert painted.min() > 0.05 and painted.max() < 0.35


def test_mnist_from_parquet(shared_data):
    folder = shared_data / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no MNIST at {folder}")
    source = DocMnistConfig(digits=folder).digits
    sizes = {split: len(load_digits(source, split).labels) for split in SPLITS}
    assert sizes == {"train": 48_000, "validation": 12_000, "test": 10_000}
    # MNIST itself has no two equal images in its training part, so row numbers are as good as pixels.
    train, validation = ({i.tobytes() for i in load_digits(source, split).images} for split in SPLITS[:2])
    assert len(train) + len(validation) == 60_000 and not train & validation


def parquet(path, images=None, labels=None):
    images = [np.full((28, 28), 10 * n, np.uint8) for n in range(20)] if images is None else images
    labels = [n % 10 for n in range(len(images))] if labels is None else labels
    pictures = [PilImage.fromarray(image) for image in images]
    features = datasets.Features({"image": Image(), "label": datasets.Value("int64")})
    Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(path)
    return path


def test_one_parquet_file_is_divided_in_three(tmp_path):
    path = parquet(tmp_path / "digits.parquet")
    parts = [load_digits(str(path), split) for split in SPLITS]
    assert [len(part.labels) for part in parts] == [12, 4, 4]
    assert len({image.tobytes() for part in parts for image in part.images}) == 20


def test_a_folder_is_known_by_its_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for part in ("train", "test"):
            parquet(tmp_path / name / f"{part}-0.parquet")
    assert fingerprint(str(tmp_path / "a")) == fingerprint(str(tmp_path / "b"))
    parquet(tmp_path / "b" / "test-0.parquet", labels=[0] * 20)
    assert fingerprint(str(tmp_path / "a")) != fingerprint(str(tmp_path / "b"))


def test_bad_digit_sources_are_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"train\.parquet"):
        load_digits(str(tmp_path / "train.parquet"), "train")
    with pytest.raises(ValueError, match="starting with test"):
        DocMnistConfig(digits=tmp_path)
    with pytest.raises(ValueError, match="nothing is at that path"):
        DocMnistConfig(digits="minst")
    with pytest.raises(ValueError, match="got 5"):
        DocMnistConfig(digits=5)
    wide = parquet(tmp_path / "wide.parquet", images=[np.zeros((28, 30), np.uint8)])
    with pytest.raises(ValueError, match=r"\(28, 30\)"):
        load_digits(str(wide), "train")
    odd = parquet(tmp_path / "odd.parquet", labels=[11] * 20)
    with pytest.raises(ValueError, match="found 11 to 11"):
        load_digits(str(odd), "train")
    ones = DocMnistConfig(digits=parquet(tmp_path / "ones.parquet", labels=[1] * 20))
    with pytest.raises(ValueError, match="no image of"):
        split_digits(ones, "train")
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(odd).rename_columns(["picture", "label"]), other)
    with pytest.raises(ValueError, match="columns image and label"):
        load_digits(str(other), "train")


def test_without_network_the_offline_options_are_named(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(digits_module.datasets, "load_dataset", no_network)
    digits_module._read.cache_clear()
    digits_module.load_digits.cache_clear()
    with pytest.raises(ConnectionError, match="optdigits") as error:
        load_dataset("docmnist", cache_dir=str(tmp_path))
    assert 'digits="PATH"' in str(error.value) and "no route" in str(error.value)


def test_mnist_from_the_hub(tmp_path, monkeypatch):
    parts = {part: parquet(tmp_path / f"{part}.parquet") for part in ("train", "test")}
    asked = []

    def hub(name, split):
        asked.append((name, split))
        return Dataset.from_parquet(str(parts[split]), cache_dir=str(tmp_path))

    monkeypatch.setattr(digits_module.datasets, "load_dataset", hub)
    digits_module._read.cache_clear()
    digits_module.load_digits.cache_clear()
    assert [len(load_digits("mnist", split).labels) for split in SPLITS] == [16, 4, 20]
    assert asked == [("ylecun/mnist", "train"), ("ylecun/mnist", "test")]
    digits_module._read.cache_clear()
    digits_module.load_digits.cache_clear()
