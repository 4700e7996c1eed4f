"""How the Inception network is wired, on random weights, and the published pair of files where they are given."""
import json
import os

import pytest
import torch

import evaluate
from cli.parser import run
from evaluation.inception import WIDTHS, build_network, inception_extractor


@pytest.fixture(scope="module")
def random_inception() -> torch.nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:  # the class insists on loading weights
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        state = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none").state_dict()
    torch.manual_seed(0)
    for name, value in state.items():
        if value.ndim > 1:
            value.normal_(std=(2 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5) if name.endswith(("running_var", "bn.weight")) else value.normal_(std=0.3)
    return build_network(state)


def test_inception_layers_are_those_of_adm(random_inception):
    network, seen_by_hooks = random_inception, {}
    def keep(name):
        return lambda _module, _inputs, output: seen_by_hooks.update({name: output.clone()})
    hooks = [module.register_forward_hook(keep(name)) for name, module in (
        ("unrectified", network.Mixed_6d.branch1x1.bn), ("branch", network.Mixed_6d.branch1x1), ("last", network.Mixed_7c))]
    extractor = inception_extractor(network, torch.device("cpu"))
    pool, spatial, logits = extractor.run(torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    assert extractor.name == "inception-6726825d" and extractor.widths == WIDTHS == (2048, 2023, 1008)
    assert [tuple(values.shape) for values in (pool, spatial, logits)] == [(2, 2048), (2, 2023), (2, 1008)]
    maps = seen_by_hooks["branch"].tolist()
    written_out = [[maps[n][c][y][x] for y in range(17) for x in range(17) for c in range(7)] for n in range(2)]
    assert spatial.tolist() == written_out and (spatial >= 0).all()
    assert (seen_by_hooks["unrectified"] < 0).any() and torch.equal(seen_by_hooks["branch"], seen_by_hooks["unrectified"].relu())
    assert torch.allclose(pool, seen_by_hooks["last"].mean((2, 3)), rtol=1e-4)
    unbiased = pool @ network.fc.weight.T
    assert torch.allclose(logits, unbiased, atol=1e-3) and (network.fc.bias.abs() > 0.01).any()


@pytest.mark.parametrize("size", [(16, 16), (40, 300)])
def test_inception_takes_images_of_any_size(random_inception, size):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    features = inception_extractor(random_inception, torch.device("cpu")).run(images)
    assert [values.shape[1] for values in features] == list(WIDTHS) and all(torch.isfinite(values).all() for values in features)


@pytest.mark.slow
def test_the_numbers_published_for_adm(capsys):
    """README of openai/guided-diffusion: ImageNet 256, ADM-G, ADM-U. DITAS_INCEPTION: its weights, if they are not to be fetched."""
    reference, samples, weights = (os.environ.get(f"DITAS_{name}") for name in ("ADM_REFERENCE", "ADM_SAMPLES", "INCEPTION"))
    if not (reference and samples):
        pytest.skip("set DITAS_ADM_REFERENCE=VIRTUAL_imagenet256_labeled.npz and DITAS_ADM_SAMPLES=admnet_guided_upsampled_imagenet256.npz")
    flags = ["--features", "inception", "--pr-dtype", "float16"] + (["--inception", weights] if weights else [])
    run(evaluate.main, evaluate.make_parser(), [reference, samples, "--json", *flags])
    found, = json.loads(capsys.readouterr().out)
    assert found["inception_score"] == pytest.approx(215.84, rel=1e-3, abs=0.05)
    assert [found["fid"], found["sfid"]] == pytest.approx([3.943, 6.140], abs=0.01)
    assert [found["precision"], found["recall"]] == pytest.approx([0.8265, 0.5309], abs=0.002)
