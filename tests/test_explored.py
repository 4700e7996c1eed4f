"""What is found out about any transformer before it is quantised."""
import pytest
import torch
from test_ditas import BY_NAME, FLUX, architecture, explored_example, random_example

from architectures.discover import discover, find_blocks
from architectures.examples import build, draw_call
from architectures.explored import discover_shortened
from architectures.registry import architecture_of
from architectures.sites import linears_of, timesteps_of
from architectures.twins import shortened
from architectures.watched import watch
from quant.calibration.arguments import batched_arguments, clock_of


@pytest.mark.parametrize("name, layers", [
    ("SD3Transformer2DModel", {"num_layers": 5}),
    ("WanTransformer3DModel", {"num_layers": 4}),
    pytest.param("FluxTransformer2DModel", {"num_layers": 3, "num_single_layers": 4},
                 marks=pytest.mark.slow),
    # Its blocks are counted, so that the whole of it has to be looked at.
    pytest.param("HunyuanDiT2DModel", {"num_layers": 6}, marks=pytest.mark.slow),
])
def test_a_shortened_model_says_what_the_whole_one_does(name, layers):
    example = BY_NAME[name]
    model, call = random_example(example, **layers), draw_call(example)
    whole = discover(model, call)
    found = discover_shortened(model, call, find_blocks(model))
    assert set(found.sites) == set(whole.sites)
    assert found.reasons == whole.reasons


def test_a_shortened_model_keeps_the_ends_and_shares_its_tensors():
    model = build(BY_NAME["SD3Transformer2DModel"], num_layers=6)
    short, twins = shortened(model, find_blocks(model))
    kept = list(short.transformer_blocks)
    blocks = model.transformer_blocks
    # The last one, which gives no text, is of another kind.
    assert all(one is other for one, other in zip(kept, [blocks[0], blocks[4], blocks[5]]))
    assert len(model.transformer_blocks) == 6
    assert [twins[f"transformer_blocks.{i}"][-1] for i in range(6)] == list("000012")


def test_what_is_watched_is_what_is_traced():
    """Linears that read one tensor are a site without a graph, too."""
    for name in (FLUX, "WanTransformer3DModel", "Lumina2Transformer2DModel"):
        example = BY_NAME[name]
        found = watch(random_example(example), draw_call(example), find_blocks(build(example)))
        known = architecture(name).discovery
        # A factor that streams share because of attention is only seen in a graph.
        together = {linear: set(site.linears) for site in known.sites for linear in site.linears}
        for site in found.scope("blocks"):
            assert set(site.linears) <= together[site.linears[0]]
            assert (site.folds, found.reasons[site.name]) == ((), "not traced")
        assert set(linears_of(found.scope("blocks"))) == set(linears_of(known.scope("blocks")))
        # One modulation for all blocks is only known by a graph.
        assert set(linears_of(found.scope("adaln"))) <= set(linears_of(known.scope("adaln")))


def test_timesteps_are_found():
    example = BY_NAME["FluxTransformer2DModel"]
    call = draw_call(example)
    later = {**call, "timestep": call["timestep"] / 2}
    found = clock_of([call, later])
    assert found == "timestep"
    model = explored_example(example.name)
    assert torch.equal(timesteps_of(later, architecture_of(model).clock), later["timestep"])


def test_images_are_told_from_what_all_share():
    example = BY_NAME["FluxTransformer2DModel"]
    names = batched_arguments(random_example(example), draw_call(example))
    assert set(names) == {
        "hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"}
