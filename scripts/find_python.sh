#!/bin/sh
# Prints the path of a Python 3.10 to 3.12: the one given, else that of the environment, else the first on the PATH.
#   sh scripts/find_python.sh "$PYTHON" "$VENV/bin/python"
fits='import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 12); print(sys._base_executable)'
if [ -n "$1" ]; then
    "$1" -c "$fits" 2>/dev/null && exit 0
    echo "error: PYTHON=$1 is no working Python 3.10, 3.11 or 3.12" >&2
    exit 1
fi
for python in "$2" python3.11 python3.12 python3.10 python3 python; do
    "$python" -c "$fits" 2>/dev/null && exit 0
done
echo "error: no Python 3.10, 3.11 or 3.12 found; install one (apt install python3.11 python3.11-venv; pyenv install 3.11;" \
    "uv python install 3.11) and run again, or name it: make setup PYTHON=/path/to/python3.11" >&2
exit 1
