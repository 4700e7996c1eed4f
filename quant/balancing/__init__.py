"""Moving outliers from activations into weights: one file per method, and the grid search.

``maxima`` is TAS and SmoothQuant, ``salience`` PTQ4DiT, ``reparameterise`` RepQ-ViT. The search for
their strength is ``search``, its definition ``candidates`` and ``losses``, its fast path
``compiled``.
"""
