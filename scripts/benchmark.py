"""`mohd benchmark`: time MoHD against LLaMA. `python scripts/benchmark.py --help` says more."""

from mohd_train.cli import script

if __name__ == "__main__":
    script("benchmark")
