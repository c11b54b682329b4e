"""DocMNIST for people without this package: a dataset repository with a configuration per complexity.

    python -m datasets_scripts.push_docmnist --repo_id org/docmnist --complexities 5.0 29.4 --digits mnist

Afterwards `load_dataset("org/docmnist", "complexity_29.4")` works plainly. Given again after a kill or a failure, the
command sends what is missing. The token is huggingface_hub's own (`hf auth login` or HF_TOKEN).
"""

import argparse
from collections.abc import Sequence

from datasets import DatasetDict, load_dataset
from huggingface_hub import DatasetCard

import datasets_scripts  # noqa: F401  (registers docmnist)

COMPLEXITIES = (5.0, 9.1, 15.2, 21.2, 25.1, 29.4)
CARD = """
# DocMNIST

Synthetic pages for fine-grained vision-language learning, after ViLLA (Varma et al., ICCV 2023): 84 x 84 pixels, up to
nine cells, in each a handwritten digit in one of five colours and, in two of three, the outline of a circle or
rectangle in one of three sizes. The text of a page has a sentence for each attribute on it and never says where.

A configuration `complexity_C` has pages with C region-attribute pairs on average: {configs}.

```python
from datasets import load_dataset

pages = load_dataset("{repo_id}", "{default}", split="train")
```

| column | meaning |
|---|---|
| `image_id` | unique within the split |
| `image` | the page |
| `text`, `sentences` | the description, whole and sentence by sentence |
| `regions` | boxes of the filled cells: x0, y0, x1, y1 in pixels |
| `attributes` | what the text states; groups and prompt templates are JSON in the feature's `id` |
| `attribute_sentences` | for each of them, the sentence that states it |
| `region_attributes` | the true pairs, for evaluation only |

Splits never share a digit image. Digits: {digits}. Attribute budget of the train split: {budget} pairs.
"""


def config_name(complexity: float) -> str:
    """The configuration of a complexity."""
    return f"complexity_{float(complexity)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw and send each configuration, then the card.

    Raises:
        ValueError: a complexity or budget out of range, or the digits can't be found.
        HfHubHTTPError: the token may not write there.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", required=True, help="org/name of the dataset repository")
    parser.add_argument("--complexities", type=float, nargs="+", default=COMPLEXITIES)
    parser.add_argument("--attribute_budget", type=int, default=300_000)
    parser.add_argument("--digits", default="mnist", help="mnist, optdigits, or a folder or Parquet file with MNIST")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--public", action="store_true", help="a repository that is made is public")
    args = parser.parse_args(argv)
    options = {"attribute_budget": args.attribute_budget, "digits": args.digits, "seed": args.seed}
    complexities = sorted(args.complexities, reverse=True)
    default = config_name(complexities[0])
    for complexity in complexities:  # the default first: datasets 5.2 can't name one later
        splits = load_dataset("docmnist", complexity=complexity, **options)
        name = config_name(complexity)
        DatasetDict(splits).push_to_hub(
            args.repo_id, config_name=name, set_default=name == default, private=not args.public
        )
    card = DatasetCard.load(args.repo_id)
    card.data.license, card.data.pretty_name = "mit", "DocMNIST"
    card.data.task_categories = ["zero-shot-object-detection", "zero-shot-image-classification"]
    card.data.tags = ["vision-language", "region-attribute", "synthetic", "villa"]
    card.text = CARD.format(
        repo_id=args.repo_id,
        default=default,
        configs=", ".join(f"`{config_name(complexity)}`" for complexity in complexities),
        digits=args.digits if args.digits in ("mnist", "optdigits") else "MNIST",
        budget=args.attribute_budget,
    )
    card.push_to_hub(args.repo_id)


if __name__ == "__main__":
    main()
