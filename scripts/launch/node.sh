#!/bin/bash
# One node of a run: Composer's launcher, which reads LOCAL_WORLD_SIZE, WORLD_SIZE, NODE_RANK, MASTER_ADDR and MASTER_PORT.
#   bash scripts/launch/node.sh FILE... [key=value...]          (as scripts/train.py; COMPOSER names another launcher)
# A notice from the scheduler (SIGTERM, or SIGUSR1 before SLURM's time limit) is passed on to the training processes alone: the
# launcher and the data loader's workers would end at once, and the run with them, before it could save.
set -u
trap '' TERM USR1 # what is started from here on ignores them, until it says otherwise
"${COMPOSER:-composer}" scripts/train.py "$@" autoresume=true &
launcher=$!
notify() {
    for process in $(cat "/proc/$launcher/task/$launcher/children" 2>/dev/null); do
        kill -TERM "$process" 2>/dev/null
    done
}
trap notify TERM USR1
status=0
while kill -0 "$launcher" 2>/dev/null; do # a notice interrupts `wait`
    wait "$launcher"
    status=$?
done
exit "$status"
