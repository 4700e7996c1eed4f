"""The sampler of ``diffusion`` as a scheduler of diffusers.

diffusers' own ``DDPMScheduler`` computes the same step in another order. Where activations have
codes, a value that is rounded elsewhere may get another one, and its images drift from ours.
"""
import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusion.sampler import ddpm_step
from diffusion.schedule import TRAIN_STEPS, make_schedule, schedule_of

# A pipeline that loads a scheduler looks for its base in the module that defines it.
__all__ = ["PUBLISHED", "DitasDDPMScheduler", "SchedulerMixin"]

# The published schedule, whose steps are those of ``diffusion.schedule``.
PUBLISHED = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "beta_schedule": "linear",
    "variance_type": "learned_range",
    "timestep_spacing": "linspace",
    "clip_sample": False,
    "prediction_type": "epsilon",
    "thresholding": False,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}


class DitasDDPMScheduler(DDPMScheduler):
    """Steps as ``diffusion.sampler.ddpm_step`` takes them, to the last bit.

    Attributes:
        schedule: that of ``set_timesteps``; all steps before it is called.
    """

    schedule = make_schedule()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps of a run: a number of them, or themselves, descending.

        Raises:
            ValueError: the configuration is not the ``PUBLISHED`` one.
        """
        for name, value in PUBLISHED.items():
            if self.config[name] != value:
                raise ValueError(
                    f"this scheduler has {name} {self.config[name]!r}, expected {value!r}: "
                    "take diffusers' DDPMScheduler for other schedules")
        super().set_timesteps(num_inference_steps, device, timesteps)
        self.schedule = schedule_of(self.timesteps.tolist()[::-1])

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor]:
        """Take one ancestral step.

        Args:
            model_output: noise and variance (N, 2C, H, W), as ``models.DiT`` gives them.
            timestep: one of ``timesteps``.
            sample: latents (N, C, H, W).
            generator: of the noise that is added, one for all images or a list.
            return_dict: whether the result stands in a named tuple.

        Raises:
            ValueError: ``set_timesteps`` did not choose this timestep.
        """
        def draw() -> Tensor:
            return randn_tensor(sample.shape, generator, sample.device, sample.dtype)

        found, = np.nonzero(self.schedule.timestep_map == int(timestep))
        if not len(found):
            raise ValueError(f"timestep {int(timestep)} is none of the {len(self.schedule)} that "
                             "set_timesteps chose")
        latents = ddpm_step(self.schedule, int(found[0]), sample, model_output, draw)
        return DDPMSchedulerOutput(prev_sample=latents) if return_dict else (latents,)
