"""AdaRound with learned activation steps, block by block.

After Nagel et al. (2020) and BRECQ (Li et al., 2021), as PTQ4DiT uses them. Every weight is rounded
down or up, and which is learned. A block of the quantised model gets the outputs of the quantised
blocks before it, and has to give what the float block gives to the float outputs. Rounding is
relaxed to h(V) in [0, 1] and pushed to 0 or 1 as the iterations go. The steps of static activation
quantisers are learned beside it.
"""
import math
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

import config
from architectures.registry import architecture_of
from architectures.sites import AttentionSite, Call, linears_of
from config import Recipe
from quant.activations.attention import Operands, quantize_operands
from quant.activations.quantisers import Activation, TimestepIndex
from quant.install import install
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.numerics.tokens import matrix
from quant.refinement.block_chain import BlockChain
from quant.refinement.soft_layers import LearnedStep, SoftLinear, StraightThrough, learnable

Layers = dict[str, QuantizedLayer]

# The quantisers of an attention whose steps can be learned.
_OPERANDS = ("query", "key", "value", "probabilities")


def rounding_loss(h: Tensor, beta: float) -> Tensor:
    """Compute ``sum (1 - |2h - 1|^beta)``: 0 where every h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def beta_at(iteration: int, iterations: int) -> float | None:
    """Return the exponent of ``rounding_loss``.

    None while warming up, then linearly from the first to the second of ``config.rounding_beta``.
    """
    warm = config.rounding_warmup * iterations
    if iteration < warm:
        return None
    first, last = config.rounding_beta
    return last + (first - last) * (1 - (iteration - warm) / (iterations - warm))


def reconstruct(
    model: nn.Module, layers: Layers, operands: dict[str, Operands], inputs: Call, recipe: Recipe
) -> tuple[Layers, dict[str, Operands]]:
    """Learn the rounding of every layer inside the blocks.

    Args:
        model: float, left as it was.
        layers: rounded to the nearest, of floating scales and no low-rank branch. Those outside
            the blocks are used and not learned.
        operands: of the attentions, whose steps are learned; may be empty.
        inputs: a call of the model, of images drawn from the trajectory.
        recipe: says how many iterations a block gets, and the learning rate of the rounding. The
            published 20 000 are for blocks of DiT-XL/2; fewer iterations need a higher rate.

    Returns:
        Layers and operands.
    """
    layers, operands = dict(layers), dict(operands)
    architecture = architecture_of(model)
    quantised = install(deepcopy(model), layers, operands=operands)
    float_blocks = BlockChain(model, inputs)
    quantised_blocks = BlockChain(quantised, inputs)
    generator = torch.Generator().manual_seed(0)
    names = architecture.blocks(model)
    with tqdm(total=recipe.iterations * len(names), desc="rounding", unit="step") as bar:
        for name in names:
            # Of the float block, on the float model's inputs.
            target = float_blocks.outputs(model.get_submodule(name))
            block = Block(model, name, layers, operands, quantised_blocks.timestep_index)
            soft = block.soften(quantised.get_submodule(name))
            # On what the quantised blocks before it give.
            linears = block.soft_linears(soft)
            train(soft, linears, quantised_blocks, target, recipe, generator, bar)
            block.harden(soft, layers, operands)
            hard = block.rebuild(quantised.get_submodule(name), layers, operands)
            quantised_blocks.advance(quantised_blocks.outputs(hard))
            float_blocks.advance(target)
    return layers, operands


@dataclass(frozen=True)
class Block:
    """One block of a model whose layers are learned.

    Attributes:
        model: float.
        name: of the block.
        layers, operands: of the whole model, as they are before this block is learned.
        timestep_index: of the quantised model, if ranges depend on the timestep.
    """

    model: nn.Module
    name: str
    layers: Layers
    operands: dict[str, Operands]
    timestep_index: TimestepIndex | None

    @property
    def linears(self) -> list[str]:
        """The names of its quantised linears, in the order of the layers."""
        sites = architecture_of(self.model).sites(self.model, "all")
        inside = set(linears_of([site for site in sites if site.block == self.name]))
        return [name for name in self.layers if name in inside]

    @property
    def attentions(self) -> list[AttentionSite]:
        """Its attentions whose operands are quantised."""
        sites = architecture_of(self.model).attentions(self.model)
        return [site for site in sites
                if site.name in self.operands and site.name.startswith(f"{self.name}.")]

    def soften(self, block: nn.Module) -> nn.Module:
        """Copy a quantised block, and make its rounding and its steps learnable."""
        soft = deepcopy(block)
        for name in self.linears:
            linear, layer = self.model.get_submodule(name), self.layers[name]
            weight = layer.smoothing.of_weight(matrix(linear)).detach()
            bias = None if linear.bias is None else linear.bias.detach()
            module = SoftLinear(weight, layer, layer.bias(bias), self.timestep_index)
            soft.set_submodule(self._inside(name), module)
        for attention in self.attentions:
            modules = soft.get_submodule(self._inside(attention.name)).operands
            for operand in _OPERANDS:
                act = getattr(self.operands[attention.name], operand)
                setattr(modules, operand, _learnable_operand(act, getattr(modules, operand)))
        return soft

    def soft_linears(self, soft: nn.Module) -> list[SoftLinear]:
        """List the learned linears of a soft block, in the order of the layers."""
        return [soft.get_submodule(self._inside(name)) for name in self.linears]

    def harden(
        self, soft: nn.Module, layers: Layers, operands: dict[str, Operands]
    ) -> None:
        """Put what was learned into ``layers`` and ``operands``."""
        for name in self.linears:
            layers[name] = soft.get_submodule(self._inside(name)).harden()
        for attention in self.attentions:
            modules = soft.get_submodule(self._inside(attention.name)).operands
            learned = {}
            for operand, module in modules.named_children():
                if isinstance(module, LearnedStep):
                    act = getattr(operands[attention.name], operand)
                    learned[operand] = replace(act, scale=module.scale.detach())
            operands[attention.name] = replace(operands[attention.name], **learned)

    def rebuild(
        self, block: nn.Module, layers: Layers, operands: dict[str, Operands]
    ) -> nn.Module:
        """Give a quantised block the layers and operands as they are now."""
        for name in self.linears:
            bias = layers[name].bias(self.model.get_submodule(name).bias)
            module = QuantLinear(layers[name], bias, timestep_index=self.timestep_index)
            block.set_submodule(self._inside(name), module)
        for attention in self.attentions:
            quantize_operands(
                block.get_submodule(self._inside(attention.name)), operands[attention.name])
        return block

    def _inside(self, name: str) -> str:
        return name.removeprefix(f"{self.name}.")


def _learnable_operand(act, module: nn.Module) -> nn.Module:
    return learnable(act, None) if isinstance(act, Activation) else StraightThrough(module)


@torch.enable_grad()
def train(
    block: nn.Module,
    linears: list[SoftLinear],
    chain: BlockChain,
    target: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    bar: tqdm,
) -> None:
    """Train the rounding and the steps of a soft block to give ``target`` (P, T, D).

    Args:
        linears: of the block, whose rounding is learned.
        chain: gives the block's calls.
        generator: draws the images of every iteration.
    """
    rounding = torch.optim.Adam(
        [linear.v for linear in linears], lr=recipe.rounding_rate, fused=True)
    steps = Steps([module.scale for module in block.modules() if isinstance(module, LearnedStep)])
    for iteration in range(recipe.iterations):
        chosen = torch.randint(len(target), (config.reconstruction_batch,), generator=generator)
        chosen = chosen.to(target.device)
        error = (chain.run(block, chosen) - target[chosen]).square().sum(1).mean()
        loss = error
        beta = beta_at(iteration, recipe.iterations)
        if beta is not None:
            penalty = sum(rounding_loss(linear.h, beta) for linear in linears)
            loss = error + config.rounding_weight * penalty
        rounding.zero_grad()
        steps.zero_grad()
        loss.backward()
        rounding.step()
        steps.step(iteration / recipe.iterations)
        bar.update()


class Steps:
    """The learned activation steps of a block; their learning rate falls along a cosine."""

    def __init__(self, scales: list[Tensor]):
        self._scales = scales
        self._optimizer = torch.optim.Adam(scales, lr=config.step_rate) if scales else None
        # Adam moves small steps as far as large ones, if need be through zero.
        self._floors = [0.1 * scale.min().item() for scale in scales]

    def zero_grad(self) -> None:
        if self._optimizer is not None:
            self._optimizer.zero_grad()

    def step(self, progress: float) -> None:
        """Make one step; ``progress`` is the share of the iterations that are done."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = config.step_rate * 0.5 * (1 + math.cos(math.pi * progress))
        self._optimizer.step()
        for scale, floor in zip(self._scales, self._floors):
            scale.data.clamp_(min=floor)
