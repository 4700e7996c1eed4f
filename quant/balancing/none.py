"""The balance of recipes that have none."""
from architectures.sites import Site
from quant.calibration.watch import Watch
from quant.numerics.smoothing import NO_SMOOTHING, Smoothing


class NoBalance:
    """Leaves every site as it is."""

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for nothing."""

    def finish(self, site: Site) -> Smoothing:
        """Return no factors."""
        return NO_SMOOTHING
