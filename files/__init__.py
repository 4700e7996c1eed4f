"""Input and output: whole files or none, fingerprints, images, arrays and weights."""
