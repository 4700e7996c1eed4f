"""LoRA beside quantised linears: as beside the float ones, wherever factors were folded."""
import diffusers
import peft
import pytest
import torch
from conftest import relative
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, FluxPipeline
from test_ditas import BY_NAME, WHOLE_ROWS, output, random_example, run_on
from torch import Tensor, nn

import ditas
from architectures.examples import draw_call
from ditas.adapters import AdaptedLinear
from ditas.packing import PackedLinear, welcome_adapters
from evaluation.metrics import sqnr_db
from quant.install import with_stand_in
from quant.layers.fold import ROW_SCALES

RANK = 4
FLUX = "FluxTransformer2DModel"
NAMES = ["DiTTransformer2DModel", "PixArtTransformer2DModel", FLUX]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear)}


def draw_adapter(model: nn.Module) -> dict[str, Tensor]:
    """Draw an adapter of all linears of a float model, modulation and embedders too."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, linear in linears(model).items():
        down = torch.randn(RANK, linear.in_features, generator=generator)
        up = torch.randn(linear.out_features, RANK, generator=generator)
        tensors[f"{name}.lora_A.weight"] = down / linear.in_features ** 0.5
        tensors[f"{name}.lora_B.weight"] = up * 0.2
    return tensors


def put_beside(model: nn.Module, adapter: dict[str, Tensor], name: str = "style") -> None:
    """Load an adapter as diffusers does; some of its transformers cannot, but peft can."""
    if hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter(dict(adapter), prefix=None, adapter_name=name)
        return
    targets = sorted({key.split(".lora_")[0] for key in adapter})
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    peft.inject_adapter_in_model(config, model, name, state_dict=adapter)
    peft.set_peft_model_state_dict(model, adapter, name)


def quantised(name: str, recipe: str = "ditas", **flags) -> nn.Module:
    model = random_example(BY_NAME[name])
    flags = {"weight_bit": 8, "act_bit": 8, "backend": "fake", **flags}
    ditas.quantize(model, run_on(model, BY_NAME[name]), recipe, **flags)
    return model


def adapted_float(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute what the float model gives with a random adapter, and return that, too."""
    model = random_example(BY_NAME[name])
    adapter = draw_adapter(model)
    plain = output(model, name)
    put_beside(model, adapter)
    expected = output(model, name)
    assert sqnr_db(expected, plain) < 15
    return expected, adapter


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_does_what_it_does_to_the_float_model(name, tmp_path):
    expected, adapter = adapted_float(name)
    model = quantised(name, group_size=WHOLE_ROWS)
    model.save_pretrained(tmp_path)
    put_beside(model, adapter)
    given = output(model, name)
    assert sqnr_db(expected, given) > 30
    # Factors were folded on both sides, into quantised and into float linears.
    changed = [part for part in model.modules() if isinstance(part, AdaptedLinear)]
    assert any(part.factors is not None for part in changed)
    assert any(part.scales is not None for part in changed)
    # What was folded is in the file.
    again = getattr(diffusers, BY_NAME[name].class_name).from_pretrained(tmp_path)
    put_beside(again, adapter)
    assert torch.equal(output(again, name), given)


@pytest.mark.parametrize("recipe, flags", [
    # The modulation is quantised as well, and scales of its rows change; or it stays float.
    ("ditas", {"scope": "adaln", "adaln_weight_bit": 16, "group_size": WHOLE_ROWS}),
    ("ditas", {"adaln_weight_bit": 16, "group_size": WHOLE_ROWS}),
    ("rtn", {"backend": "integer"}),
])
def test_an_adapter_goes_with_other_recipes(recipe, flags, tmp_path):
    name = "DiTTransformer2DModel"
    expected, adapter = adapted_float(name)
    model = quantised(name, recipe, **flags)
    model.save_pretrained(tmp_path)
    put_beside(model, adapter)
    given = output(model, name)
    assert sqnr_db(expected, given) > 30
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    put_beside(again, adapter)
    assert torch.equal(output(again, name), given)


def test_an_adapter_goes_with_bfloat16_and_scales_stay_float32(tmp_path):
    name = "DiTTransformer2DModel"
    expected, adapter = adapted_float(name)
    model = quantised(name, group_size=WHOLE_ROWS, adaln_weight_bit=16)
    model.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    scales = {place: value for place, value in model.named_buffers() if place.endswith(ROW_SCALES)}
    assert len(scales) == 2
    for place, value in scales.items():
        assert torch.equal(again.get_buffer(place), value)
    put_beside(again, adapter)
    call = draw_call(BY_NAME[name])
    with torch.no_grad():
        given, = again(**{**call, "hidden_states": call["hidden_states"].bfloat16()})
    assert given.dtype == torch.bfloat16
    assert relative(given.flatten(), expected) < 0.03


def test_an_adapter_gets_the_input_before_it_was_folded():
    torch.manual_seed(0)
    linear = nn.Linear(16, 12, bias=False)
    adapter = draw_adapter(nn.Sequential(linear))
    x, factors, shift = torch.randn(3, 5, 16), torch.rand(16) + 0.5, torch.randn(16)
    scales = torch.rand(12) + 0.5
    tensors = {"folded_smooth": factors, "folded_shift": shift, "rows": scales}
    computing = with_stand_in(linear, torch.float32, torch.device("cpu"))
    model = nn.Sequential(PackedLinear(computing, tensors, linear.weight.shape))
    welcome_adapters()
    put_beside(model, adapter)
    arriving = (x + shift) / factors
    down, up = adapter["0.lora_A.weight"], adapter["0.lora_B.weight"]
    added = model(arriving) - linear(arriving)
    assert relative(added, x @ down.T @ up.T * scales) < 1e-5


def flux_pipeline(model: nn.Module) -> FluxPipeline:
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=model)


def named_for_pipeline(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"transformer.{name}": value.clone() for name, value in adapter.items()}


def test_a_pipeline_loads_weighs_and_unloads_adapters():
    expected, adapter = adapted_float(FLUX)
    model = quantised(FLUX, group_size=WHOLE_ROWS)
    before = output(model, FLUX)
    pipe = flux_pipeline(model)
    pipe.load_lora_weights(named_for_pipeline(adapter), adapter_name="style")
    assert sqnr_db(expected, output(model, FLUX)) > 30

    # A second one, of nothing, and half of the first.
    zeros = {name: torch.zeros_like(value) for name, value in adapter.items()}
    pipe.load_lora_weights(named_for_pipeline(zeros), adapter_name="nothing")
    pipe.set_adapters(["style", "nothing"], [0.5, 1.0])
    halved = {name: value / 2 if "lora_B" in name else value for name, value in adapter.items()}
    other = random_example(BY_NAME[FLUX])
    put_beside(other, halved)
    assert sqnr_db(output(other, FLUX), output(model, FLUX)) > 30

    with pytest.raises(ditas.UserError, match="cannot be fused"):
        pipe.fuse_lora()
    pipe.disable_lora()
    assert torch.equal(output(model, FLUX), before)
    pipe.unload_lora_weights()
    assert torch.equal(output(model, FLUX), before)
    assert not any(isinstance(part, AdaptedLinear) for part in model.modules())


@pytest.mark.parametrize("side, message", [
    ("A", "the adapter is of another model: its .* reads 7 values, and that of this "),
    ("B", "the adapter is of another model: its .* gives 7 values, and that of this "),
])
def test_an_adapter_of_another_width_is_refused(side, message):
    name = FLUX
    model = quantised(name, "rtn")
    before = output(model, name)
    adapter = draw_adapter(random_example(BY_NAME[name]))
    wrong = next(key for key in adapter if f"to_k.lora_{side}" in key)
    shape = (RANK, 7) if side == "A" else (7, RANK)
    with pytest.raises(ditas.UserError, match=message) as error:
        put_beside(model, {**adapter, wrong: torch.zeros(shape)})
    assert "\n" not in str(error.value)
    assert torch.equal(output(model, name), before)
    put_beside(model, adapter)


def test_what_is_no_plain_adapter_is_refused():
    model = quantised("PixArtTransformer2DModel", "rtn", scope="all")
    with pytest.raises(ditas.UserError, match="DoRA looks at float weights"):
        peft.inject_adapter_in_model(
            peft.LoraConfig(target_modules=["attn1.to_q"], use_dora=True), model)
    with pytest.raises(ditas.UserError, match="pos_embed.proj is a convolution that quanti"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["pos_embed.proj"]), model)


def test_other_models_get_the_adapters_of_peft():
    model = nn.Sequential(nn.Linear(4, 4))
    welcome_adapters()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model)
    assert type(model[0]) is peft.tuners.lora.Linear
