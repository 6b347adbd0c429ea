"""How fast MoHD is beside LLaMA of equal activated size, measured side by side in one process."""

MODES = ("train", "forward", "decode", "projections", "layer")  # see cases.Workload
PIPELINE = {
    "loop": "data",
    "prepare": "raw",
    "start": "data",
}  # beside the model: mode -> the option that it needs; see pipeline
