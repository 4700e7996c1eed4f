"""The seam: all that the house knows of a transformer's insides, as plain data.

``sites`` defines the data, one file per family fills it in, ``registry`` finds the right file.
"""
