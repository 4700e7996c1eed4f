"""Gaussian diffusion: one schedule, two samplers, one loss."""
from diffusion.noise import ImageNoise, image_labels
from diffusion.sampler import ddim_step, ddpm_step, guided_denoiser, sample_loop
from diffusion.schedule import Schedule, make_schedule

__all__ = [
    "ImageNoise",
    "Schedule",
    "ddim_step",
    "ddpm_step",
    "guided_denoiser",
    "image_labels",
    "make_schedule",
    "sample_loop",
]
