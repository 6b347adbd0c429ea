"""The `triton` backend: a file an op, with its device code, launch and autograd. Not measured on a GPU yet.

Nothing of it is imported before the backend is asked for: the package triton is not there on every platform, and
TRITON_INTERPRET must be set before the kernels are defined.
"""
