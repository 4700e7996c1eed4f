"""Judging images: features of a network, ADM's metrics of them, and fidelity to the float model."""
