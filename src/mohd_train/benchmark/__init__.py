"""How fast MoHD is beside LLaMA of equal activated size, measured side by side in one process."""

MODES = ("train", "forward", "decode", "projections", "layer")  # see cases.Workload
