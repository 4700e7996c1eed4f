"""Layer-wise grid search for the migration strength (DiTAS, section 4.2).

The loss of a candidate with factors s is ``sum over timesteps of mean((X W^T - Qa(X/s) (V diag(s))^T)^2)``, where V is the
quantised weight seen from the unsmoothed input: ``Q(W diag(s)) / s``, or one V shared by all candidates.

With D = X - Qa(X/s) diag(s) (what rounding took from the input) and E = V - W (what it added to the weight), the difference
of outputs is ``D V^T - X E^T``, so that its squared norm is

    <D, D G - 2 X M> + <X^T X, F>,    G = V^T V,  M = E^T V,  F = E^T E    (each I x I)

Nothing large cancels in it: D and E are rounding errors. A candidate then costs one or two products with an I x I matrix
where the plain form costs one with an O x I: cheaper when the layer widens.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from quant.quantizer import OFF_BITS, QuantSpec, fake_quantize, scale_and_zero, signed_codes_

BLOCK = 2 ** 18  # input values handled at a time: small enough to stay in a CPU's cache between passes


class AlphaSearch:
    """Accumulates the loss of every candidate for one layer while its inputs pass by.

    Args:
        weight: (O, I) float weight.
        factors: (A, I) smoothing factors of each candidate.
        weight_spec: how a candidate quantises ``W diag(s)``.
        act: the activation quantiser.
        shared: (O, I) quantised weight V that all candidates share instead (published DiTAS), or None.

    Attributes:
        loss: (A,) float64.
    """

    def __init__(self, weight: Tensor, factors: Tensor, weight_spec: QuantSpec, act: QuantSpec, shared: Tensor | None):
        self.loss = torch.zeros(len(factors), dtype=torch.float64, device=weight.device)
        self._weight, self._factors, self._weight_spec, self._shared = weight, factors, weight_spec, shared
        self._act, self._range_per_step = act.per_step(), act.granularity == "tensor"
        rows, columns = weight.shape
        self._wide = rows > columns * (2 if shared is None else 1)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Add the losses on inputs ``x`` (K, N, T, I) with float outputs ``y`` (K, N, T, O), without bias, of K timesteps."""
        step_size = y.numel() // len(y)  # outputs per timestep, over which the loss takes a mean
        stack = x.flatten(1, 2) if self._range_per_step else x.flatten(0, 1)  # whatever shares a range is an entry: (B, R, I)
        entries = max(1, BLOCK // stack[0].numel())
        blocks, outputs = stack.split(entries), y.reshape(*stack.shape[:2], -1).split(entries)
        energies = self._wide_energies(blocks) if self._wide else self._plain_energies(blocks, outputs)
        self.loss += energies / step_size

    def best(self) -> int:
        """Index of the first candidate of least loss."""
        return int(self.loss.argmin())

    def _candidate(self, s: Tensor) -> Tensor:
        if self._shared is not None:
            return self._shared
        return fake_quantize(self._weight * s, self._weight_spec).div_(s)  # V, (O, I)

    def _codes(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each candidate, integer-valued codes of X/s (B, R, I) in a buffer that the next one reuses, and their scale."""
        buffer, act = torch.empty_like(x), self._act
        if act.bits == OFF_BITS:
            yield from ((torch.div(x, s, out=buffer), x.new_ones(1, 1, 1)) for s in self._factors)
        elif act.granularity == "image":  # division keeps order: the extremes of X/s come from those of X's columns
            factors = self._factors[:, None, None]
            lows = (x.amin(1, keepdim=True) / factors).amin(-1, keepdim=True)  # (A, B, 1, 1)
            highs = (x.amax(1, keepdim=True) / factors).amax(-1, keepdim=True)
            for s, scale, zero in zip(self._factors, *scale_and_zero(lows, highs, act)):
                yield signed_codes_(torch.div(x, s, out=buffer).div_(scale), zero, act), scale
        else:
            for s in self._factors:
                torch.div(x, s, out=buffer)
                scale, zero = scale_and_zero(buffer.amin(-1, keepdim=True), buffer.amax(-1, keepdim=True), act)
                yield signed_codes_(buffer.div_(scale), zero, act), scale

    def _plain_energies(self, blocks: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Tensor:
        """Squared norm of the difference of outputs for each candidate, (A,) float64."""
        weights = [(self._candidate(s) * s).T for s in self._factors]
        energies = []
        for x, y in zip(blocks, outputs):  # a block stays in the cache for all candidates
            for (codes, scale), weight in zip(self._codes(x), weights):
                difference = torch.matmul(codes, weight).mul_(scale).sub_(y).view(-1)
                energies.append(torch.dot(difference, difference))
        return torch.stack(energies).view(len(blocks), -1).sum(0, dtype=torch.float64)

    def _wide_energies(self, blocks: tuple[Tensor, ...]) -> Tensor:
        """The same by the formula above."""
        covariance = sum(x.flatten(0, 1).T @ x.flatten(0, 1) for x in blocks).view(-1)  # X^T X
        products, constants = [], []
        for s in self._factors if self._shared is None else self._factors[:1]:
            v = self._candidate(s)
            e = v - self._weight
            products.append((v.T @ v, -2 * (e.T @ v)))  # G, -2 M
            constants.append(torch.dot(covariance, (e.T @ e).view(-1)))
        energies = []
        for x in blocks:
            rows = x.flatten(0, 1)
            for i, (codes, scale) in enumerate(self._codes(x)):
                if i < len(products):  # a shared one is used throughout
                    gram, cross = products[i][0], rows @ products[i][1]
                d = torch.addcmul(x, codes.mul_(scale), self._factors[i], value=-1, out=codes).flatten(0, 1)
                energies.append(torch.dot(d.view(-1), torch.addmm(cross, d, gram).view(-1)))
        return torch.stack(energies).view(len(blocks), -1).sum(0, dtype=torch.float64) + torch.stack(constants).double()
