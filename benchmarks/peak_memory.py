"""Runs a command and prints the largest resident memory that it or one of its children had.

python benchmarks/peak_memory.py accelerate launch training/stage1.py --config training/configs/docmnist_small.yaml
"""

import resource
import subprocess
import sys

if __name__ == "__main__":
    code = subprocess.run(sys.argv[1:], check=False).returncode
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    sys.stdout.write(f"peak resident memory: {peak:.2f} GiB (exit status {code})\n")
    sys.exit(code)
