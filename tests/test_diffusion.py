from functools import partial

import numpy as np
import pytest
import torch
from conftest import golden, golden_model, relative, replayed, sample
from hypothesis import given
from hypothesis import strategies as st

from diffusion import (
    ImageNoise,
    ddim_step,
    ddpm_step,
    guided_denoiser,
    image_labels,
    make_schedule,
)
from diffusion.generate import device_of, guided_drive
from diffusion.loss import discretised_nll, gaussian_kl, training_loss
from diffusion.schedule import space_timesteps


@pytest.mark.parametrize("respacing", ["full", "250", "100", "50", "ddim25"])
def test_schedule_matches_the_published_one(respacing):
    values = golden("diffusion")
    schedule = make_schedule("1000" if respacing == "full" else respacing)
    for key in values:
        place, _, name = key.partition("/")
        # Of the variance the logarithm is compared.
        if place == respacing and name != "posterior_variance":
            assert np.allclose(getattr(schedule, name), values[key], rtol=1e-12, atol=0), key


def test_sections_are_spaced_one_by_one():
    steps = space_timesteps("10,5,1")
    assert len(steps) == 16
    assert steps[0] == 0 and steps[9] == 333
    assert steps[10] == 334 and steps[14] == 666
    assert steps[15] == 667


@given(st.integers(1, 1000))
def test_any_number_of_steps_spans_the_range(count):
    steps = space_timesteps(str(count))
    assert len(set(steps)) == count and steps == sorted(steps)
    assert steps[0] == 0
    assert count == 1 or steps[-1] == 999
    assert len(make_schedule(str(count))) == count


@pytest.mark.parametrize("bad", [
    "0", "-3", "1001", "abc", "", "10,,5", "ddim0", "ddim7.5", "ddim999", "400,400,400", "1e2"])
def test_bad_respacing_is_refused(bad):
    with pytest.raises(ValueError, match="expected|try"):
        space_timesteps(bad)


@pytest.mark.parametrize("key, step", [("ddpm", ddpm_step), ("ddim", ddim_step)])
def test_guided_loops_match_the_published_samplers(key, step):
    values = golden("diffusion")
    labels, x = torch.tensor(values["labels"]), torch.tensor(values["z"])
    denoise = guided_denoiser(golden_model(), labels, float(values["cfg_scale"]))
    draw = replayed(values["noise"][:, :4])
    out = sample(denoise, make_schedule("50"), x, draw, step)
    assert relative(out, values[f"{key}_latents"]) < 1e-4


def test_a_guided_drive_runs_every_step_of_the_published_sampler():
    values, model, calls = golden("diffusion"), golden_model(), []
    draw = replayed(values["noise"][:, :4])
    x, labels = torch.tensor(values["z"]), torch.tensor(values["labels"])
    drive = guided_drive(make_schedule("50"), x, draw, labels, float(values["cfg_scale"]))
    handle = model.register_forward_hook(lambda module, inputs, output: calls.append(inputs))
    assert drive(model) is None
    handle.remove()

    assert len(calls) == 50
    assert torch.equal(calls[0][0], torch.cat([x, x]))
    assert [int(t[0]) for _, t, _ in calls] == make_schedule("50").timestep_map[::-1].tolist()
    last_x, last_t, _ = calls[-1]  # at index 0 the step is the mean of x_0 given x_1
    denoise = guided_denoiser(model, labels, float(values["cfg_scale"]))
    half = last_x[: len(x)]
    latents = ddpm_step(make_schedule("50"), 0, half, denoise(half, last_t[: len(x)]), draw)
    assert relative(latents, values["ddpm_latents"]) < 1e-4


def test_the_device_of_a_model_that_has_buffers_alone():
    model = torch.nn.Module()
    model.register_buffer("codes", torch.empty(2, device="meta"))
    assert device_of(torch.nn.Sequential(model)) == torch.device("meta")


class FakeModel:
    """Some smooth function in place of a network, the same for both libraries."""

    def __call__(self, x, t):
        noise = 0.3 * x + 0.1 * torch.sin(x + t.view(-1, 1, 1, 1) / 100.0)
        return torch.cat([noise, torch.tanh(x)], dim=1)


def test_ddpm_matches_diffusers(monkeypatch):
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm
    theirs = DDPMScheduler(
        1000, 1e-4, 2e-2, "linear",
        variance_type="learned_range",
        timestep_spacing="linspace",
        clip_sample=False,
    )
    theirs.set_timesteps(50)
    ours = make_schedule("50")
    assert theirs.timesteps.tolist() == ours.timestep_map[::-1].tolist()
    noise = torch.randn(50, 2, 4, 8, 8, dtype=torch.float64)
    x = start = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    draws = iter(noise)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(draws))
    for t in theirs.timesteps:
        x = theirs.step(FakeModel()(x, t.expand(2)), t, x).prev_sample
    draws = iter(noise)
    assert relative(sample(FakeModel(), ours, start, lambda: next(draws)), x) < 1e-4


@pytest.mark.parametrize("respacing", ["ddim50", "ddim25"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_matches_diffusers(respacing, eta):
    from diffusers import DDIMScheduler
    steps = int(respacing[4:])
    theirs = DDIMScheduler(
        1000, 1e-4, 2e-2, "linear",
        timestep_spacing="leading",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    theirs.set_timesteps(steps)
    ours = make_schedule(respacing)
    assert theirs.timesteps.tolist() == ours.timestep_map[::-1].tolist()
    noise = torch.randn(steps, 2, 4, 8, 8, dtype=torch.float64)
    x = start = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for t, z in zip(theirs.timesteps, noise):
        out = FakeModel()(x, t.expand(2))[:, :4]
        x = theirs.step(out, t, x, eta=eta, variance_noise=z if eta else None).prev_sample
    draws = iter(noise)
    step = partial(ddim_step, eta=eta)
    assert relative(sample(FakeModel(), ours, start, lambda: next(draws), step), x) < 1e-4


def test_noise_of_an_image_depends_on_seed_and_index_alone():
    together = ImageNoise(7, range(6), (4, 8, 8))
    first, second = together(), together()
    for i in range(6):
        alone = ImageNoise(7, [i], (4, 8, 8))
        assert torch.equal(alone()[0], first[i])
        assert torch.equal(alone()[0], second[i])
    assert not torch.equal(first[0], first[1])
    other_seed = ImageNoise(8, range(6), (4, 8, 8))
    assert not torch.equal(first, other_seed())
    assert torch.equal(image_labels(3, [5, 9], 10), image_labels(3, range(20), 10)[[5, 9]])


def test_noise_is_standard_normal_and_labels_uniform():
    from scipy.stats import chisquare, kstest
    draws = ImageNoise(0, range(64), (4, 8, 8))().flatten().numpy()
    assert kstest(draws, "norm").pvalue > 1e-3
    assert chisquare(np.bincount(image_labels(0, range(5000), 10), minlength=10)).pvalue > 1e-3


def test_loss_terms_match_distributions():
    m1, v1, m2, v2 = torch.randn(4, 100, dtype=torch.float64)
    p = torch.distributions.Normal(m1, torch.exp(0.5 * v1))
    q = torch.distributions.Normal(m2, torch.exp(0.5 * v2))
    assert torch.allclose(gaussian_kl(m1, v1, m2, v2), torch.distributions.kl_divergence(p, q))

    # The 256 grey levels carry all the probability.
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, logvar = torch.full_like(values, 0.2), torch.full_like(values, -3.0)
    mass = torch.exp(-discretised_nll(values, mean, logvar))
    assert abs(mass.sum().item() - 1) < 1e-6
    inner = torch.distributions.Normal(torch.tensor(0.2), torch.exp(torch.tensor(-1.5)))
    exact = inner.cdf(values[1:-1] + 1 / 255) - inner.cdf(values[1:-1] - 1 / 255)
    assert torch.allclose(mass[1:-1], exact, atol=2e-5)  # a tanh approximates the normal CDF


def test_loss_matches_the_published_formula_by_hand():
    schedule = make_schedule()
    x0, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([999, 400, 1])

    def perfect(x, timesteps, y):  # right noise, and the variance of the posterior
        return torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)

    assert training_loss(perfect, schedule, x0, t, None, noise).abs().max() < 1e-4

    def off(x, timesteps, y):  # right noise, variance beta: KL of two normals of one mean
        return torch.cat([noise, torch.ones_like(noise)], dim=1)

    beta = torch.as_tensor(schedule.betas[t.numpy()])
    posterior = torch.as_tensor(np.exp(schedule.posterior_log_variance_clipped)[t.numpy()])
    expected = 0.5 * (torch.log(beta / posterior) - 1 + posterior / beta) / np.log(2)
    loss = training_loss(off, schedule, x0, t, None, noise)
    assert torch.allclose(loss.double(), expected, rtol=1e-3, atol=1e-5)
