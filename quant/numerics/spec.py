"""What a quantiser is, apart from the values: bits, granularity, convention."""
from dataclasses import dataclass, replace

OFF_BITS = 16  # a bit width of 16 means "not quantised"
WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8, OFF_BITS)
ACT_BITS = (4, 5, 6, 7, 8, OFF_BITS)

# The dimensions that share a scale, in the view that `grouped` makes; None for all of them.
REDUCED = {
    "tensor": None,
    "image": (-2, -1),
    "token": (-1,),
    "channel": (-1,),
    "group": (-1,),
    "strided": (0,),
}
GRANULARITIES = tuple(REDUCED)
CONVENTIONS = ("affine", "free", "clamped", "two-level", "published")


@dataclass(frozen=True)
class QuantSpec:
    """Everything that decides how a tensor is quantised, apart from its values.

    Attributes:
        bits: code width; 16 switches the quantiser off.
        granularity: what shares a scale.
            ``tensor``: everything.
            ``image``: the last two dimensions.
            ``token`` and ``channel``: the last dimension (of an activation, of a weight (O, I)).
            ``group``: ``group`` consecutive entries of the last dimension.
            ``strided``: the published DiTAS weight layout, ``group`` entries of one input channel
            that lie ``O/group`` rows apart.
        group: entries per group for ``group`` (capped at the row length) and ``strided``.
        convention: how a range becomes scale and zero point.
            ``affine`` widens the range to include 0 and divides it by ``2^bits - 1``. The zero
            point is one of the codes, so that 0 is exact.
            ``free`` divides the range as it is, so that the zero point of values wholly off 0 is
            no code (Q-DiT, eq. 1; its floor is a rounding here, which keeps both ends of a range).
            ``clamped`` is ``free`` with a zero point moved to the nearest code, so that values
            wholly off 0 lose their far end (Q-DiT's code).
            ``two-level`` is affine for weights, whose scales then become integer multiples of one
            per row (``quant.weights.two_level``).
            ``published`` is DiTAS's code: scale ``(max - min) / 2^bits``, zero point rounded but
            not clamped.
        tail: whether the last group of a row may be shorter than the others.

    Raises:
        ValueError: unknown granularity or convention.
    """

    bits: int
    granularity: str
    group: int = 0
    convention: str = "affine"
    tail: bool = False

    def __post_init__(self):
        check_quantiser(self.granularity, self.convention)

    @property
    def top(self) -> int:
        """The largest code."""
        return 2 ** self.bits - 1

    def per_step(self) -> "QuantSpec":
        """Turn one range per tensor into one per step, for stacks (steps, rows, channels)."""
        return replace(self, granularity="image") if self.granularity == "tensor" else self


def check_quantiser(granularity: str, convention: str) -> None:
    """Raise a ``ValueError`` if there is no such granularity or convention."""
    if granularity not in GRANULARITIES or convention not in CONVENTIONS:
        raise ValueError(
            f"unknown quantiser {granularity!r}/{convention!r}: "
            f"expected one of {GRANULARITIES} and of {CONVENTIONS}"
        )
