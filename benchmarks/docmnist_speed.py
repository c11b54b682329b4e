"""How many DocMNIST images a second are drawn on one core, encoding not counted.

python benchmarks/docmnist_speed.py --complexity 29.4
"""

import argparse
import statistics
import sys
import time

from datasets_scripts.docmnist import DocMnistConfig, images_of_split, split_digits
from datasets_scripts.docmnist_rendering import RandomWords, draw

BATCH = 250  # images drawn at a time


def main() -> None:
    """Draw the first images of the train split again and again, and print the median speed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--complexity", type=float, default=29.4)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    config = DocMnistConfig(complexity=args.complexity, digits="optdigits")
    digits, plan = split_digits(config, "train"), images_of_split(config, "train")
    seconds = []
    for _ in range(args.rounds):
        began = time.process_time()
        for first in range(0, args.images, BATCH):
            part = slice(first, min(first + BATCH, args.images))
            drawing = draw(config.vocabulary, digits, plan.plain[part], plan.shaped[part], RandomWords(0, 0, 1, first))
            if not drawing.images.any():
                raise RuntimeError("nothing was drawn")
        seconds.append(time.process_time() - began)
    speed = args.images / statistics.median(seconds)
    sys.stdout.write(f"complexity {args.complexity}: {speed:.0f} images/s on one core\n")


if __name__ == "__main__":
    main()
