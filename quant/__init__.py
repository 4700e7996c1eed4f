"""Post-training quantisation of diffusion transformers: the method, room by room.

A layer passes through the rooms in this order.

==================  ===========================================================================
``pipeline``        The order of the steps: start reading here.
``recipe``          What a recipe's choices mean in numbers, and which do not go together.
``parts``           Which part does which job; a new method is a line here.
``calibration/``    The model samples once; its calls are recorded, and replayed for observers.
``balancing/``      Smoothing factors: TAS, SmoothQuant, PTQ4DiT, RepQ-ViT; the grid search.
``weights/``        Rounding to nearest, GPTQ, two-level scales, the low-rank branch.
``activations/``    Ranges of activations, dynamic or found once; attention's operands.
``refinement/``     What is learned or chosen besides: rounding, tuning, group sizes; sequential
                    Hessians.
``layers/``         The quantised linear, simulated; folding factors into the layers before.
``integer/``        The same on integers: exact reference, CPUs (oneDNN), GPUs (Triton).
``install``         Quantised layers into a model; ``backend`` says in which arithmetic.
``streaming``       A model on the CPU whose parts come to the device of their inputs.
``checkpoint/``     All of that as one file.
``numerics/``       What every room uses: codes and scales, ranges, smoothing, compiled passes.
==================  ===========================================================================

TAS is ``aggregate`` in ``balancing/maxima.py``. A *step* is one call of the model while it samples;
a weight's ``step`` is the factor of an output channel. ``docs/architecture.md`` says how to add a
recipe. Of a model's insides this package knows sites only (see ``architectures``).
"""
