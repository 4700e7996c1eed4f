"""``ditas.quantize`` changes a module completely or not at all."""
import weakref
from collections.abc import Callable
from itertools import count

import pytest
import torch
from test_ditas import (
    BY_NAME,
    FLUX,
    WHOLE_ROWS,
    explored_example,
    output,
    run_on,
    stack_and_drive,
)
from torch import nn

import ditas
from ditas import hand_over, packing, placing, quantizing
from ditas.stowed import StowedLinear


def everything_of(model: nn.Module) -> list:
    """List whatever makes a module what it is."""
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks)
             for module in model.modules()]
    names = [(name, type(module), sorted(vars(module)), module.training)
             for name, module in model.named_modules()]
    return [names, hooks, list(model.parameters())]


def interrupted_in_call(number: int, function: Callable) -> Callable:
    """Make a function that is interrupted when it is called for that time."""
    numbers = count(1)

    def call(*args, **kwargs):
        if next(numbers) == number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


# Before anything is found, while layers are made, while they are put in, and at the very end.
@pytest.mark.parametrize("owner, name, number, recipe", [
    (quantizing, "record_calls", 1, "ditas"),
    (placing, "outcome_of", 1, "ditas"),
    (placing, "stored_form", 1, "ditas"),
    (nn.Module, "set_submodule", 1, "ditas"),
    (nn.Module, "set_submodule", 7, "ditas"),
    (packing, "quantize_operands", 2, "ptq4dm"),
    (placing, "watch_timesteps", 1, "ptq4dm"),
    (hand_over, "sign", 1, "ptq4dm"),
])
def test_a_module_is_left_as_it_was(owner, name, number, recipe, monkeypatch):
    flags = {"ditas": {"group_size": WHOLE_ROWS},
             "ptq4dm": {"act_steps": "each", "attention": "uniform"}}
    example = BY_NAME["Flux2Transformer2DModel" if recipe == "ditas" else FLUX]
    model = explored_example(example.name).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts, expected = everything_of(model), output(model, example.name)
    drive = run_on(model, example)
    monkeypatch.setattr(owner, name, interrupted_in_call(number, getattr(owner, name)))
    with pytest.raises(KeyboardInterrupt):
        ditas.quantize(model, drive, recipe, **flags[recipe])
    for one, other in zip(everything_of(model), parts, strict=True):
        assert len(one) == len(other)
        assert all(a is b or a == b for a, b in zip(one, other))
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(output(model, example.name), expected)
    assert "quantization_config" not in model.config


def test_the_codes_are_all_that_is_left():
    model, calls, drive = stack_and_drive()
    weights = [weakref.ref(part.weight) for part in model.modules() if isinstance(part, nn.Linear)]
    ditas.quantize(model, drive, "ditas", group_size=16)
    # Cycles do not keep them either.
    assert not any(weight() is not None for weight in weights)
    linears = [part for part in model.modules() if isinstance(part, StowedLinear)]
    assert len(linears) == len(weights) == 6
    assert not any(list(linear.buffers()) for linear in linears)
    model(**calls[0])
    assert not any(isinstance(part, StowedLinear) for part in model.modules())
