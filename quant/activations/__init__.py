"""Quantising activations: modules, and the parts that find their ranges."""
