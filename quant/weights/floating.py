"""The part that leaves every weight in floating point, at 16 bits."""
from torch import Tensor

from architectures.sites import Site
from quant.calibration.trajectory import WeightOf, joint_weight
from quant.calibration.watch import Watch
from quant.numerics.floating import FloatWeight, half_unless_overflow
from quant.numerics.smoothing import Smoothing
from quant.weights.low_rank import LowRankWeight


def float_weight(weight: Tensor) -> LowRankWeight:
    """Make a weight (O, I) one that is not quantised and has no branch."""
    rows, columns = weight.shape
    left, right = weight.new_zeros(rows, 0), weight.new_zeros(0, columns)
    return LowRankWeight(FloatWeight(weight), left, right)


class FloatWeights:
    """Leaves every weight alone but for its smoothing factors.

    Args:
        float_weight: of every linear.
    """

    def __init__(self, float_weight: WeightOf):
        self._float_weight = float_weight

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for nothing."""

    def weight_of(self, site: Site) -> Tensor:
        """Return the weight (O, I) whose magnitudes the balance measures."""
        return joint_weight(site, self._float_weight)

    def shared(self, linear: str) -> Tensor:
        """Return the weight (O, I), of which all candidates of a search are multiples."""
        return self._float_weight(linear)

    def finish(
        self, site: Site, smoothing: Smoothing, group: int | None
    ) -> dict[str, LowRankWeight]:
        """Multiply the input channels of a site's weights by its factors, and round to float16."""
        weights = {}
        for name in site.linears:
            weight = smoothing.of_weight(self._float_weight(name))
            weights[name] = float_weight(half_unless_overflow(weight.detach()).float())
        return weights

    draft = finish
