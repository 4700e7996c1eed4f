"""Quantisers as pure functions: codes, scales, ranges, smoothing, and compiled passes over rows."""
