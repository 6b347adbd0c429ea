from sweep.sweep_support import data, stub, sweep_file  # noqa: F401
