"""Triton kernels; the launchers are registered by fastadapt.ops."""
