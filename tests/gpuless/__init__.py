"""Tools that prove GPU kernels on a machine without a GPU."""
