"""Moving outliers from activations into weights: one file per method, and the grid search."""
