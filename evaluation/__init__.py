"""Judging images: what a network sees in them, ADM's metrics, and fidelity to the float model."""
