"""How the runs of a sweep are started: on this machine (local), or by a scheduler (slurm, kubernetes)."""
