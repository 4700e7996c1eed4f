"""Integer arithmetic for quantised layers: one exact reference, oneDNN on CPUs, Triton on NVIDIA GPUs."""
