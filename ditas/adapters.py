"""Adapters (LoRA) beside the linears of quantised models.

An adapter was trained beside a float linear: ``y = W x + B A x``. Where smoothing factors were
folded, the linear's input arrives as ``(x + shift) / factors``, and rows of its output leave
multiplied by scales. So the adapter gets ``x`` back, and its output is multiplied by the scales.

peft finds a kind of adapter by its name in a table, where ``register`` puts ours. This file is
imported only where peft is installed.
"""
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ditas.packing import PackedLinear
from errors import UserError
from quant.layers.fold import ROW_SCALES


class AdaptedLinear(nn.Module, LoraLayer):
    """A linear of a quantised model and its adapters: ``y + scales (B A x) alpha / r``.

    Args:
        base_layer: a ``PackedLinear``, or a float linear.
        adapter_name, config, r, lora_alpha: of the first adapter, as peft gives them.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)
        base = self.get_base_layer()
        for name, value in _folded_around(base).items():
            value = None if value is None else value.to(base.weight.device)
            self.register_buffer(name, value, persistent=False)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                y = y + self._adapt(name, x).to(y.dtype)
        return y

    def _adapt(self, name: str, x: Tensor) -> Tensor:
        """Compute what one adapter adds, from the input as it arrives."""
        down, up = self.lora_A[name], self.lora_B[name]
        if self.factors is not None:
            x = x * self.factors
        if self.shift is not None:
            x = x - self.shift
        x = self._cast_input_dtype(x, down.weight.dtype)
        added = up(down(self.lora_dropout[name](x))) * self.scaling[name]
        return added if self.scales is None else added * self.scales

    def merge(self, *args, **kwargs) -> None:
        raise UserError("an adapter cannot be fused into quantised weights: leave it unfused")

    def unmerge(self) -> None:
        """Do nothing: nothing was merged."""


def _folded_around(base: nn.Module) -> dict[str, Tensor | None]:
    """Tell what was folded around a linear: factors and shift (I,), and scales of rows (O,)."""
    if isinstance(base, PackedLinear):
        tensors = base.in_file
        return {"factors": tensors.get("folded_smooth"), "shift": tensors.get("folded_shift"),
                "scales": tensors.get("rows")}
    return {"factors": None, "shift": None, "scales": getattr(base, ROW_SCALES, None)}


class QuantisedLoraModel(LoraModel):
    """Puts adapters into any model; of one with quantised linears, all linears get ours.

    peft could fuse those of its float linears, and would leave the model half fused.
    """

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args,
        state_dict: dict[str, Tensor] | None = None, **kwargs,
    ) -> None:
        """Put an adapter in, once it is known to fit.

        Raises:
            UserError: the model is quantised, and a tensor of the adapter has another width than
                its linear.
        """
        self.has_packed = any(isinstance(part, PackedLinear) for part in model.modules())
        if self.has_packed:
            check_widths(model, state_dict or {})
        super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)

    def _create_new_module(
        self, lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs
    ) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        is_linear = isinstance(base, nn.Linear | PackedLinear)
        if not self.has_packed or not (is_linear or hasattr(base, ROW_SCALES)):
            return super()._create_new_module(lora_config, adapter_name, target, **kwargs)
        if lora_config.use_dora:
            raise UserError("DoRA looks at float weights, and this model is quantised: "
                            "expected a plain LoRA")
        if not is_linear or getattr(base, "is_patches", False):
            raise UserError(f"{kwargs['target_name']} is a convolution that quantisation changed: "
                            "expected adapters of linears")
        return AdaptedLinear(
            target, adapter_name, lora_config, kwargs["r"], kwargs["lora_alpha"])


def check_widths(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Make sure that the tensors of an adapter fit the linears that they are for.

    Raises:
        UserError: one does not.
    """
    modules = dict(model.named_modules())
    for key, value in state_dict.items():
        name, _, rest = key.partition(".lora_")
        linear = modules.get(name)
        if not hasattr(linear, "in_features") or value.dim() != 2:
            continue
        reads = rest.startswith("A.")
        given = value.shape[1] if reads else value.shape[0]
        expected = linear.in_features if reads else linear.out_features
        if given != expected:
            raise UserError(
                f"the adapter is of another model: its {name} {'reads' if reads else 'gives'} "
                f"{given} values, and that of this {type(model).__name__} {expected}")


def register() -> None:
    """Let peft put our adapters beside quantised linears."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = QuantisedLoraModel
