"""What users of diffusers do with a model: the same with a quantised one."""
import pytest
import torch
from test_ditas import output
from test_hand_over import FLUX, quantised_example

from ditas.packing import PackedLinear


@pytest.fixture(scope="module")
def quantised():
    """Quantise a small Flux; it is not to be changed."""
    return quantised_example(FLUX)


@pytest.fixture(scope="module")
def folder(quantised, tmp_path_factory):
    place = tmp_path_factory.mktemp("use")
    quantised.save_pretrained(place)
    return place


def packed_linears(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def test_repeated_blocks_are_compiled(quantised, folder):
    loaded = type(quantised).from_pretrained(folder)
    # As the compiler sees it, without the minutes that it takes to compile.
    loaded.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(output(loaded, FLUX), output(quantised, FLUX))


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu"])
def test_a_device_map_is_followed(device_map, quantised, folder):
    loaded = type(quantised).from_pretrained(folder, device_map=device_map)
    assert torch.equal(output(loaded, FLUX), output(quantised, FLUX))


def test_a_model_goes_to_bfloat16_but_for_its_steps(quantised, folder):
    loaded = type(quantised).from_pretrained(folder, torch_dtype=torch.bfloat16)
    for linear in packed_linears(loaded):
        # Its first call expands it.
        linear(torch.zeros(1, 1, linear.in_features, dtype=torch.bfloat16))
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in loaded.named_buffers()}
    assert kinds["step"] == kinds["bias"] == torch.float32
    assert {value.dtype for value in loaded.parameters()} == {torch.bfloat16}
