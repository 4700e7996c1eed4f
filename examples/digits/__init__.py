"""The embedded test bed: a small DiT trained on scikit-learn's 1797 handwritten digits."""
