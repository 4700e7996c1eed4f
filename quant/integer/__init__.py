"""Integer arithmetic for quantised layers.

One exact reference, oneDNN on CPUs, Triton on NVIDIA GPUs.
"""
