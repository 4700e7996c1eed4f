"""Files: whole or not at all, images, arrays, weights."""
