"""Rounding weights, and the low-rank branch beside them."""
