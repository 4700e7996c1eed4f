"""AdaRound with learned activation steps, block by block (Nagel et al., 2020; BRECQ, Li et al., 2021; as PTQ4DiT uses them).

Every weight is rounded down or up. Which, is learned: a block of the quantised model, given the outputs of the quantised blocks before
it, has to give what the float block gives to the float outputs. Rounding is relaxed to h(V) in [0, 1] and pushed to 0 or 1 as the
iterations go; the steps of static activation quantisers are learned beside it.
"""
import math
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

import config
from quant.activations.attention import Operands, QuantAttention
from quant.activations.quantisers import Activation, TimestepIndex
from quant.install import install
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.refinement.soft_layers import LearnedStep, SoftLinear, StraightThrough, learnable


@dataclass(frozen=True)
class Inputs:
    """Model inputs for P images: latents ``x`` (P, C, H, W), ``t`` and ``y`` (P,)."""

    x: Tensor
    t: Tensor
    y: Tensor


def rounding_loss(h: Tensor, beta: float) -> Tensor:
    """``sum (1 - |2h - 1|^beta)``: 0 where every h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def beta_at(iteration: int, iterations: int) -> float | None:
    """The exponent of ``rounding_loss``: none while warming up, then linearly from the first to the second of ``config.rounding_beta``."""
    warm = config.rounding_warmup * iterations
    if iteration < warm:
        return None
    first, last = config.rounding_beta
    return last + (first - last) * (1 - (iteration - warm) / (iterations - warm))


def reconstruct(model: nn.Module, layers: dict[str, QuantizedLayer], operands: dict[str, Operands], inputs: Inputs, iterations: int,
                rate: float) -> tuple[dict[str, QuantizedLayer], dict[str, Operands]]:
    """Learn the rounding of every layer inside the blocks.

    Args:
        model: float, left as it was.
        layers: rounded to the nearest, of floating scales and no low-rank branch; those outside the blocks are used and not learned.
        operands: of the attentions, whose steps are learned; may be empty.
        inputs: of the calibration trajectory.
        iterations: per block; the published 20 000 are for blocks of DiT-XL/2.
        rate: the learning rate of the rounding; fewer iterations need a higher one to get from one end to the other.

    Returns:
        Layers and operands.
    """
    layers, operands = dict(layers), dict(operands)
    quantised = install(deepcopy(model), layers, operands=operands)
    clock = next((each for each in (getattr(module, "clock", None) for module in quantised.modules()) if each is not None), None)
    x, c = model.embed(inputs.x, inputs.t, inputs.y)
    seen, condition = quantised.embed(inputs.x, inputs.t, inputs.y)
    index = None if clock is None else clock.index  # of the inputs

    def outputs(block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        made = []
        for batch in torch.arange(len(x), device=x.device).split(config.reconstruction_batch):
            if clock is not None:
                clock.index = index[batch]
            made.append(block(x[batch], c[batch]))
        return torch.cat(made)
    generator = torch.Generator().manual_seed(0)
    with tqdm(total=iterations * len(model.blocks), desc="rounding", unit="step") as bar:
        for i, block in enumerate(model.blocks):
            target = outputs(block, x, c)
            soft = deepcopy(quantised.blocks[i])
            names = [name for name in layers if name.startswith(f"blocks.{i}.")]
            found = {}
            for name in names:
                module = model.get_submodule(name)
                weight = module.weight if layers[name].smooth is None else module.weight * layers[name].smooth
                found[name] = SoftLinear(weight.detach(), layers[name], layers[name].bias(module.bias.detach()), clock)
            for name, module in found.items():
                soft.set_submodule(name.removeprefix(f"blocks.{i}."), module)
            if isinstance(soft.attn, QuantAttention):
                for key in ("query", "key", "value", "probabilities"):
                    act = getattr(operands[f"blocks.{i}.attn"], key)
                    setattr(soft.attn, key, learnable(act, None) if isinstance(act, Activation) else StraightThrough(getattr(soft.attn, key)))
            _train(soft, list(found.values()), seen, condition, index, clock, target, iterations, rate, generator, bar)
            layers |= {name: module.harden() for name, module in found.items()}
            if isinstance(soft.attn, QuantAttention):
                key = f"blocks.{i}.attn"
                learned = {name: replace(getattr(operands[key], name), scale=module.scale.detach())
                           for name, module in soft.attn.named_children() if isinstance(module, LearnedStep)}
                operands[key] = replace(operands[key], **learned)
            seen, x = outputs(_hard(quantised.blocks[i], i, model, layers, operands, clock), seen, condition), target
    return layers, operands


def _hard(block: nn.Module, i: int, model: nn.Module, layers: dict[str, QuantizedLayer], operands: dict[str, Operands],
          clock: TimestepIndex | None) -> nn.Module:
    """Block ``i`` of the quantised model with the layers and operands as they are now."""
    prefix = f"blocks.{i}."
    for name, layer in layers.items():
        if name.startswith(prefix):
            block.set_submodule(name.removeprefix(prefix), QuantLinear(layer, layer.bias(model.get_submodule(name).bias), clock=clock))
    if isinstance(block.attn, QuantAttention):
        block.attn = QuantAttention(block.attn, operands[f"{prefix}attn"])
    return block


@torch.enable_grad()
def _train(block: nn.Module, linears: list[SoftLinear], x: Tensor, c: Tensor, index: Tensor | None, clock: TimestepIndex | None, target: Tensor,
           iterations: int, rate: float, generator: torch.Generator, bar: tqdm) -> None:
    steps = [module.scale for module in block.modules() if isinstance(module, LearnedStep)]
    rounding = torch.optim.Adam([each.v for each in linears], lr=rate, fused=True)
    ranges = torch.optim.Adam(steps, lr=config.step_rate) if steps else None
    floors = [0.1 * step.min().item() for step in steps]  # Adam moves small steps as far as large ones, if need be through zero
    for iteration in range(iterations):
        batch = torch.randint(len(x), (config.reconstruction_batch,), generator=generator).to(x.device)
        if clock is not None:
            clock.index = index[batch]
        error = (block(x[batch], c[batch]) - target[batch]).square().sum(1).mean()
        beta = beta_at(iteration, iterations)
        loss = error if beta is None else error + config.rounding_weight * sum(rounding_loss(each.h, beta) for each in linears)
        for optimiser in filter(None, (rounding, ranges)):
            optimiser.zero_grad()
        loss.backward()
        rounding.step()
        if ranges is not None:
            for group in ranges.param_groups:
                group["lr"] = config.step_rate * 0.5 * (1 + math.cos(math.pi * iteration / iterations))
            ranges.step()
            for step, least in zip(steps, floors):
                step.data.clamp_(min=least)
        bar.update()
