"""Quantise a diffusion transformer where it is: in a notebook, inside its pipeline.

    import ditas

    done = ditas.quantize(
        pipe.transformer,
        drive=lambda: pipe(prompts, num_inference_steps=28),
        recipe="ditas", weight_bit=4, act_bit=8)
    print(done)
"""
from ditas.quantizing import quantize
from errors import UserError

__all__ = ["UserError", "quantize"]
