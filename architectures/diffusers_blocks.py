"""What the transformers of diffusers share: a list of blocks, and a registered configuration."""
from typing import Any

from torch import Tensor, nn

from architectures.sites import Call, per_image_linears


class DiffusersArchitecture:
    """A transformer of diffusers whose blocks map tokens to tokens.

    Attributes:
        class_name: of the model, in diffusers.
    """

    class_name: str
    clock = "timestep"

    def blocks(self, model: nn.Module) -> list[str]:
        return [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]

    def advance(self, call: Call, output: Tensor) -> Call:
        return {**call, "hidden_states": output}

    def temporal(self, model: nn.Module) -> list[str]:
        return per_image_linears(self.sites(model, "all"))

    def configuration(self, model: nn.Module) -> dict[str, Any]:
        return {key: value for key, value in model.config.items() if not key.startswith("_")}

    def build(self, configuration: dict[str, Any]) -> nn.Module:
        # Not at the top of the file: diffusers is needed for its own models only.
        import diffusers
        try:
            return getattr(diffusers, self.class_name)(**configuration)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"this is no configuration of {self.class_name}: {error}") from None
