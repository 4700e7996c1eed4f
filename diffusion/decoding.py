"""What turns latents into images."""
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from files.digests import weights_sha256


@dataclass(frozen=True)
class Decoder:
    """Turns latents (N, C, H, W) into images (N, 1 or 3, H', W') in [-1, 1].

    Attributes:
        name: identifies it, weights included.
        run: the function itself.
    """

    name: str
    run: Callable[[Tensor], Tensor]

    def __call__(self, latents: Tensor) -> Tensor:
        return self.run(latents)


def vae_decoder(name: str, vae: nn.Module, scale: float) -> Decoder:
    """Make a decoder of latents that are ``scale`` times what the VAE decodes."""
    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents / scale).sample

    return Decoder(f"vae-{name}-{weights_sha256(vae)[:16]}", decode)
