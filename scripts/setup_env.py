"""Creates or completes the Python environment of this checkout: what `make setup` runs.

    python3 scripts/setup_env.py ENVIRONMENT_FOLDER

Runs before anything is installed, so it needs the standard library only. The folder is created where it is not there;
an environment of yours is installed into. A stamp inside it, written last, says what it was completed for: this
checkout, pyproject.toml, constraints.txt, and the interpreter. Two at once take turns.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED_GB = 9  # 7 for the packages, the rest while they are unpacked
IMPORTS = "import torch, composer, streaming, transformers, lm_eval, mohd_train"


def fingerprint() -> str:
    """What an environment is complete for."""
    parts = [str(ROOT), sys.version, *((ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def complete(folder: Path) -> bool:
    stamp = folder / "mohd_train.stamp"
    return stamp.is_file() and stamp.read_text() == fingerprint() and (folder / "bin" / "python").exists()


def tell(line: str) -> bool:
    """Whether a line of pip is worth showing: what takes long, and what goes wrong."""
    size = re.search(r"Downloading (\S+).*\(([\d.]+) (MB|GB)\)", line)
    large = size is not None and (size[3] == "GB" or float(size[2]) >= 100)
    return large or line.startswith(("Installing", "Successfully", "ERROR", "error"))


def run(folder: Path, *command: object) -> None:
    words, log = [str(word) for word in command], folder / "mohd_train.setup.log"
    print("$", " ".join(words), flush=True)
    # Should this be killed, the command inherits the lock and holds it for as long as it goes on.
    child = subprocess.Popen(
        words, cwd=ROOT, close_fds=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert child.stdout is not None
    with open(log, "a") as file:
        for line in child.stdout:
            file.write(line)
            file.flush()
            if tell(line.strip()):
                print(" ", line.strip()[:110], flush=True)
    if child.wait() != 0:
        sys.exit(f"error: set-up failed: `{' '.join(words)}` exited with {child.returncode}; its output: {log}")


def imports(python: Path) -> bool:
    return subprocess.call([str(python), "-c", IMPORTS], cwd=ROOT, stderr=subprocess.DEVNULL) == 0


def install(folder: Path) -> None:
    """Everything up to the stamp; what an interrupted call left is completed, or made anew where that does not do."""
    python, ours = folder / "bin" / "python", folder / "mohd_train.unfinished"
    if ours.exists() and not (folder / "bin" / "pip").exists():
        shutil.rmtree(folder)  # interrupted while it was created
    if not python.exists():
        if importlib.util.find_spec("ensurepip") is None:
            sys.exit(f"error: {sys.executable} cannot create environments; install its venv package (python3-venv)")
        folder.mkdir(parents=True, exist_ok=True)
        ours.touch()  # not somebody's environment: it may be thrown away until it is complete
        print(f"creating {folder} with Python {sys.version.split()[0]}", flush=True)
        venv.create(folder, with_pip=True)
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off")
    run(folder, *pip, "-e", ".[dev]", "-c", "constraints.txt")
    if not imports(python) and ours.exists():
        print("an interrupted installation left packages broken: installing all of them again", flush=True)
        run(folder, *pip, "--force-reinstall", "-e", ".[dev]", "-c", "constraints.txt")
    run(folder, python, "-c", IMPORTS)
    ours.unlink(missing_ok=True)


def main() -> None:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        sys.exit(f"error: this is Python {sys.version.split()[0]}; 3.10 to 3.12 is needed: try PYTHON=python3.11")
    folder = Path(sys.argv[1]).absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f".{folder.name.lstrip('.')}.lock", "w")  # noqa: SIM115
    except OSError as error:
        sys.exit(f"error: cannot write to {folder.parent} ({error.strerror}); make setup VENV=/elsewhere/venv")
    os.set_inheritable(lock.fileno(), True)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another set-up of {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if complete(folder):
            return
        free = shutil.disk_usage(folder.parent).free / 1e9
        if free < NEEDED_GB and not (folder / "bin" / "python").exists():
            sys.exit(f"error: {folder.parent} has {free:.1f} GB free, {NEEDED_GB} are needed; try VENV=/elsewhere/venv")
        print(
            f"setting up {folder}: about 5 minutes the first time, 7 GB (torch, Composer, lm-eval, test tools)",
            flush=True,
        )
        began = time.monotonic()
        install(folder)
        part = folder / "mohd_train.stamp.part"
        part.write_text(fingerprint())
        os.replace(part, folder / "mohd_train.stamp")
        print(f"set up {folder} in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
