"""A native checkpoint as a Hugging Face folder, with its config and tokenizer.

    python scripts/export_hf.py runs/355m-x2/checkpoints/latest-rank0.pt exported/355m-x2
    python scripts/export_hf.py runs/355m-dense/checkpoints/latest-rank0.pt exported/355m --llama

Load it with `import mohd_train.hf` and `AutoModelForCausalLM.from_pretrained(OUT_DIR)`; a --llama folder needs no import.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mohd_train.errors import run_cli
from mohd_train.hf.convert import export
from mohd_train.storage import path_or_uri


def main() -> None:
    """Parses, exports, says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=path_or_uri, help="a checkpoint in its run folder, here or s3://...")
    parser.add_argument("out_dir", type=Path, help="the folder to write; it must not hold anything")
    parser.add_argument("--llama", action="store_true", help="write a dense model as LlamaForCausalLM")
    arguments = parser.parse_args()
    model = export(arguments.checkpoint, arguments.out_dir, llama=arguments.llama)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.out_dir}: {type(model).__name__} with {parameters:,} parameters, and its tokenizer")


if __name__ == "__main__":
    run_cli(main)
