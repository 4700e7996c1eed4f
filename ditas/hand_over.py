"""The way back into diffusers: ``save_pretrained`` and ``from_pretrained`` of quantised models.

diffusers knows a quantiser by its name in two tables, where ``register`` puts ours. A folder's
``config.json`` then says how linears are written (``DitasConfig``), and ``DitasQuantizer`` reads
them. This file is imported only where diffusers is installed.
"""
from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ditas.awaited import owner_of, put_awaited, put_stowed, take
from ditas.layouts import Data
from ditas.quantizing import quantize
from ditas.request import Request, read_request
from errors import UserError

METHOD = "ditas"


class Method(StrEnum):
    """The name of the quantisation, in the form that diffusers takes."""

    DITAS = METHOD


class DitasConfig(QuantizationConfigMixin):
    """How a transformer is quantised, or was.

    Args:
        recipe: a key of ``config.RECIPES``; at load only those that look at no data, such as
            ``rtn``.
        flags: of the recipe, as of ``ditas.quantize``; may be given as keywords.
        stored: what a file holds, written by ``quantize``; None: it holds a float model.
    """

    def __init__(
        self,
        recipe: str = "rtn",
        flags: dict[str, Any] | None = None,
        stored: Data | None = None,
        quant_method: str = METHOD,
        **keywords,
    ):
        self.quant_method = Method(quant_method)
        self.recipe = recipe
        self.flags = {**(flags or {}), **keywords}
        self.stored = stored
        self.request()

    def request(self) -> Request:
        """Check recipe and flags.

        Raises:
            UserError: as ``read_request``.
        """
        return read_request(self.recipe, self.flags)

    def to_dict(self) -> Data:
        """Write it as what ``config.json`` holds."""
        return {"quant_method": METHOD, "recipe": self.recipe, "flags": self.flags,
                "stored": self.stored}

    def __repr__(self) -> str:
        # diffusers' own one calls a method that it does not have.
        return f"DitasConfig({self.request().label})"


class DitasQuantizer(DiffusersQuantizer):
    """Reads quantised models, and quantises float ones as they are loaded."""

    # Parts that a model wants in float32 stay so.
    use_keep_in_fp32_modules = True

    def validate_environment(self, *args, **kwargs) -> None:
        """Refuse what cannot be done before anything is read.

        Raises:
            UserError: a float model with a recipe that looks at data.
        """
        request = self.quantization_config.request()
        if not self.pre_quantized and request.needs_calls:
            raise UserError(
                f"recipe {request.label} looks at the model while it samples, which loading does "
                "not: load the float pipeline, then ditas.quantize(pipe.transformer, drive=lambda: "
                f"pipe(prompts), recipe='{self.quantization_config.recipe}')")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Refuse float16, in which products of integers overflow."""
        if torch_dtype == torch.float16:
            raise UserError("a quantised model cannot be of float16, whose numbers end at 65504: "
                            "give torch_dtype=torch.bfloat16")
        return torch_dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        if self.pre_quantized:
            put_awaited(model, self.quantization_config.stored)
            # Going to each tensor's module by its path would take as long as reading it.
            self._modules = dict(model.named_modules())

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict, **kwargs
    ) -> bool:
        """Tell whether a tensor belongs to what is quantised or to what folding left."""
        return self.pre_quantized and owner_of(self._modules, param_name) is not None

    def check_quantized_param_shape(self, *args, **kwargs) -> bool:
        """Leave shapes to ``stow``."""
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Tensor],
        *args,
        **kwargs,
    ) -> None:
        """Keep a tensor as the file has it: ``param_value`` is rounded to the model's type."""
        take(self._modules, param_name, state_dict[param_name], target_device)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        config = self.quantization_config
        if self.pre_quantized:
            del self._modules
            put_stowed(model, config.request())
        else:
            quantize(model, None, config.recipe, **config.flags)
            self.quantization_config = model.config.quantization_config
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def sign(model: nn.Module, request: Request, stored: Data) -> None:
    """Let a model of diffusers know that it is quantised, as one that was loaded does.

    Args:
        stored: how it is written into a file.
    """
    config = DitasConfig(request.recipe_name, request.flags, stored)
    model.register_to_config(quantization_config=config)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = DitasQuantizer(config)


def register() -> None:
    """Let diffusers know our quantisation by its name."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = DitasQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = DitasConfig
