"""Our DiT as a model of diffusers, and the pipeline that samples it as its paper does.

diffusers has a DiT of its own (``DiTTransformer2DModel``), which departs from the published one:

- frequencies of timesteps are spread over 127 steps, here over 128;
- every block holds a copy of the embedders, here they are stored once;
- ``DiTPipeline`` takes label 1000 for none, whatever the number of classes; it guides all channels,
  here the first three; and it drops the variance that the model predicts.

So an exported folder holds this DiT. The file is imported only where diffusers is installed.
"""
import inspect
from typing import Any

import diffusers
import torch
from diffusers import (
    ConfigMixin,
    DiTPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from ditas.placing import put_layers
from ditas.request import request_of_label
from files.images import to_bytes
from models import DiT
from quant.checkpoint import Stored

PREDICTED_VARIANCE = ("learned", "learned_range")


class DitasDiT(DiT, ModelMixin, ConfigMixin):
    """``models.DiT`` with a configuration, so that diffusers saves and loads it."""

    _repeated_blocks = ["DiTBlock"]
    _no_split_modules = ["DiTBlock"]

    @register_to_config
    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
    ):
        super().__init__(
            input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes)


class DitasPatchDecoder(ModelMixin, ConfigMixin):
    """Latents (N, C, H, W) to images (N, c, pH, pW) by one transposed convolution.

    It stands where a VAE does. Its first weights are a pixel shuffle.
    """

    @register_to_config
    def __init__(self, out_channels: int = 1, patch_size: int = 2, scaling_factor: float = 1.0):
        super().__init__()
        channels, side = out_channels * patch_size ** 2, patch_size
        self.patches = nn.ConvTranspose2d(channels, out_channels, side, stride=side, bias=False)
        weight = torch.eye(channels).reshape(channels, out_channels, side, side)
        self.patches.weight = nn.Parameter(weight, requires_grad=False)

    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        sample = self.patches(latents)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class DitasDiTPipeline(DiTPipeline):
    """Samples a ``DitasDiT``: null label and guidance as published, the variance predicted."""

    def __init__(
        self,
        transformer: DitasDiT,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | None = None,
    ):
        super().__init__(transformer, vae, scheduler, id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Args:
            class_labels: one an image.
            guidance_scale: 1 is none.
            generator: of the noise, one for all images or a list.
            num_inference_steps: of the scheduler.
            latents: (N, C, H, W) noise to start from; None: it is drawn.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            return_dict: whether the images stand in a named tuple.
        """
        device = self._execution_device
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)  # (N,)
        latents = self._noise(len(labels), generator) if latents is None else latents.to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        draws = self._step_arguments(generator)
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(latents, t)
            output = self._predict(scaled, t, labels, guidance_scale)
            latents = self.scheduler.step(output, t, latents, **draws).prev_sample
        images = self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, count: int, generator: torch.Generator | list | None) -> Tensor:
        config = self.transformer.config
        shape = (count, config.in_channels, config.input_size, config.input_size)
        return randn_tensor(shape, generator, self._execution_device, torch.float32)

    def _step_arguments(self, generator: torch.Generator | list | None) -> dict[str, Any]:
        """Give the generator to schedulers that draw noise."""
        takes_it = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_it else {}

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        """Predict what the scheduler takes: the noise, and the variance if it wants that."""
        count, transformer = len(x), self.transformer
        timesteps = t.expand(count)
        if guidance_scale > 1:
            none = torch.full_like(labels, transformer.config.num_classes)
            output = transformer.forward_with_cfg(
                torch.cat([x, x]), torch.cat([timesteps, timesteps]), torch.cat([labels, none]),
                guidance_scale)[:count]
        else:
            output = transformer(x, timesteps, labels)
        has_variance = self.scheduler.config.get("variance_type") in PREDICTED_VARIANCE
        return output if has_variance else output[:, :x.shape[1]]

    def _images(self, latents: Tensor, output_type: str):
        if output_type == "latent":
            return latents
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        decoded = self.vae.decode(scaled).sample.float()  # (N, 1 or 3, H', W'), around [-1, 1]
        if output_type == "pil":
            return [Image.fromarray(pixels) for pixels in to_bytes(decoded)]
        images = (decoded / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.cpu().permute(0, 2, 3, 1).numpy()


def packed_dit(stored: Stored) -> DitasDiT:
    """Make the model of a checkpoint, with factors folded; ``stored`` is used up.

    Raises:
        UserError: its recipe is not known any more.
    """
    header = stored.header
    with torch.device("meta"):
        transformer = DitasDiT(**header.configuration)
    transformer.load_state_dict(stored.model.state_dict(), strict=False, assign=True)
    for name in stored.layers:
        # The float weights are gone. Of these only the shape is looked at.
        linear = transformer.get_submodule(name)
        empty = torch.zeros(()).expand(linear.weight.shape)
        linear.weight = nn.Parameter(empty, requires_grad=False)
    request = request_of_label(header.recipe_name, header.weight_bit, header.act_bit)
    put_layers(transformer, request, stored.layers, stored.operands)
    return transformer.eval()


def register() -> None:
    """Let ``DiffusionPipeline.from_pretrained`` find our pipeline, which it looks for by name."""
    diffusers.DitasDiTPipeline = DitasDiTPipeline
