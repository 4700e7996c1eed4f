"""How the Inception network is wired, on random weights.

The published pair of files is judged where it is given.
"""
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
    # The class insists on loading weights.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path="none")
    state = network.state_dict()
    torch.manual_seed(0)
    for name, value in state.items():
        if value.ndim > 1:
            value.normal_(std=(2 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            if name.endswith(("running_var", "bn.weight")):
                value.uniform_(0.5, 1.5)
            else:
                value.normal_(std=0.3)
    return build_network(state)


def test_inception_layers_are_those_of_adm(random_inception):
    network = random_inception
    seen_by_hooks = {}

    def keep(name):
        return lambda _module, _inputs, output: seen_by_hooks.update({name: output.clone()})

    watched = {
        "unrectified": network.Mixed_6d.branch1x1.bn,
        "branch": network.Mixed_6d.branch1x1,
        "last": network.Mixed_7c,
    }
    hooks = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    extractor = inception_extractor(network, torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    pool, spatial, logits = extractor.run(images)
    for hook in hooks:
        hook.remove()

    assert extractor.name == "inception-6726825d"
    assert extractor.widths == WIDTHS == (2048, 2023, 1008)
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023) and logits.shape == (2, 1008)

    maps = seen_by_hooks["branch"].tolist()
    order = [(c, y, x) for y in range(17) for x in range(17) for c in range(7)]
    written_out = [[image[c][y][x] for c, y, x in order] for image in maps]
    assert spatial.tolist() == written_out and (spatial >= 0).all()
    assert (seen_by_hooks["unrectified"] < 0).any()
    assert torch.equal(seen_by_hooks["branch"], seen_by_hooks["unrectified"].relu())

    assert torch.allclose(pool, seen_by_hooks["last"].mean((2, 3)), rtol=1e-4)
    unbiased = pool @ network.fc.weight.T
    assert torch.allclose(logits, unbiased, atol=1e-3)
    assert (network.fc.bias.abs() > 0.01).any()


@pytest.mark.parametrize("size", [(16, 16), (40, 300)])
def test_inception_takes_images_of_any_size(random_inception, size):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    features = inception_extractor(random_inception, torch.device("cpu")).run(images)
    assert [values.shape[1] for values in features] == list(WIDTHS)
    assert all(torch.isfinite(values).all() for values in features)


@pytest.mark.slow
def test_the_numbers_published_for_adm(capsys):
    """They stand in the README of openai/guided-diffusion: ImageNet 256, ADM-G, ADM-U.

    DITAS_INCEPTION names the network's weights, if they are not to be fetched.
    """
    reference = os.environ.get("DITAS_ADM_REFERENCE")
    samples = os.environ.get("DITAS_ADM_SAMPLES")
    weights = os.environ.get("DITAS_INCEPTION")
    if not (reference and samples):
        pytest.skip(
            "set DITAS_ADM_REFERENCE=VIRTUAL_imagenet256_labeled.npz "
            "and DITAS_ADM_SAMPLES=admnet_guided_upsampled_imagenet256.npz")
    flags = ["--features", "inception", "--pr-dtype", "float16"]
    if weights:
        flags += ["--inception", weights]
    run(evaluate.main, evaluate.make_parser(), [reference, samples, "--json", *flags])
    (scores,) = json.loads(capsys.readouterr().out)
    assert scores["inception_score"] == pytest.approx(215.84, rel=1e-3, abs=0.05)
    assert [scores["fid"], scores["sfid"]] == pytest.approx([3.943, 6.140], abs=0.01)
    precision_and_recall = [scores["precision"], scores["recall"]]
    assert precision_and_recall == pytest.approx([0.8265, 0.5309], abs=0.002)
