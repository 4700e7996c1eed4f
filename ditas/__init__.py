"""Quantise a diffusion transformer where it is: in a notebook, inside its pipeline.

    import ditas

    done = ditas.quantize(
        pipe.transformer,
        drive=lambda: pipe(prompts, num_inference_steps=28),
        recipe="ditas", weight_bit=4, act_bit=8)
    print(done)
    pipe.save_pretrained("my-model")

Importing it lets diffusers know our quantisation:

    import ditas
    pipe = DiffusionPipeline.from_pretrained("my-model")
"""
from importlib.util import find_spec

from ditas.quantizing import quantize
from errors import UserError

__all__ = ["UserError", "quantize"]

if find_spec("diffusers") is not None:
    from ditas import dit, hand_over
    from ditas.dit import DitasDiT, DitasDiTPipeline, DitasPatchDecoder
    from ditas.hand_over import DitasConfig, DitasQuantizer
    from ditas.scheduler import DitasDDPMScheduler
    dit.register()
    hand_over.register()
    __all__ += ["DitasConfig", "DitasDDPMScheduler", "DitasDiT", "DitasDiTPipeline",
                "DitasPatchDecoder", "DitasQuantizer"]
