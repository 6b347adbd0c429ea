#!/bin/sh
# Trains a study and measures its finished runs: what `make study` puts in the background.
#   sh scripts/study.sh PYTHON SWEEP_FILE SCALE OUT [words for sweep.py launch]
# One at a time for a folder; SIGTERM (`make study-stop`) has the runs save and end.
set -eu
python=$1 sweep=$2 scale=$3 out=$4
shift 4
exec 9>"$out/launcher.lock" # held by whatever this starts, too
flock -n 9 || { echo "another launcher is at work in $out" >&2; exit 1; }
child=
trap 'rm -f "$out/launcher.pid"; kill -TERM $child 2>/dev/null; wait $child; exit 143' TERM INT
trap 'rm -f "$out/launcher.pid"' EXIT
echo $$ >"$out/launcher.pid"
echo "$(date -u +%FT%TZ) launched: $sweep --scale $scale $*"
"$python" scripts/sweep.py launch "$sweep" --scale "$scale" --out "$out" "$@" & child=$!
wait $child || echo "launch ended with status $?; what is finished is measured all the same"
"$python" eval/run_eval.py --sweep "$out" --perplexity --batch-size 16 & child=$!
wait $child
echo "$(date -u +%FT%TZ) done"
