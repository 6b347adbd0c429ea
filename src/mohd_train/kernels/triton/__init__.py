"""The `triton` backend: one file for each op, with its device code, launch and autograd. It was not measured on a GPU yet.

None of it is imported before the backend is asked for, since the package triton is not available on every platform and
TRITON_INTERPRET must be set before the kernels are defined.
"""
