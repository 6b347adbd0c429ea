"""How fast MoHD is compared with LLaMA of equal activated size, measured side by side in one process."""

MODES = ("train", "forward", "decode", "projections", "layer")  # see cases.Workload
PIPELINE = {
    "loop": "data",
    "prepare": "raw",
    "start": "data",
}  # not of a model: mode -> the option that it needs; see pipeline
