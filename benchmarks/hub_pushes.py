"""What pushing checkpoints costs a stage: its time with --push_to_hub over its time without, alternating runs.

    python tests/local_hub.py --port 8765 --delay 1.0      # in another terminal; export here what it prints
    python benchmarks/hub_pushes.py --runs 2 accelerate launch training/stage1.py --config training/configs/X.yaml \
        --save_steps 5

It counts whole commands, from the first line of Python to the last upload.
"""

import argparse
import statistics
import subprocess
import sys
import time


def main() -> None:
    """Run the command with and without pushing, by turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2, help="of each kind")
    parser.add_argument("--hub_model_id", default="benchmark/pushes")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(args.runs):
        for kind, times in seconds.items():
            push = ["--push_to_hub", "--hub_model_id", args.hub_model_id] if kind == "with" else []
            began = time.monotonic()
            subprocess.run([*args.command, "--no_resume", *push], check=True)
            times.append(time.monotonic() - began)
    without, with_pushes = (statistics.median(times) for times in seconds.values())
    sys.stdout.write(f"without {without:.1f} s, with {with_pushes:.1f} s, ratio {with_pushes / without:.3f}\n")


if __name__ == "__main__":
    main()
