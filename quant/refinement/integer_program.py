"""A group size for every layer as an integer program, solved to optimality.

With costs c and prices p of layer l at size g, and x = 1 for the size that is taken,

    min  sum_l sum_g c_lg x_lg    such that    sum_g x_lg = 1,    sum_l sum_g p_lg x_lg <= limit.
"""
import numpy as np

from quant.refinement.group_sizes import TOLERANCE, Constraint, Groups

Costs = dict[str, dict[int, float]]  # layer -> group size -> cost


def least_cost(costs: Costs, allowed: Constraint) -> Groups:
    """Find the allowed configuration whose summed cost is least.

    Raises:
        ValueError: nothing is allowed, or a cost is not finite.
    """
    # It takes a third of a second to import.
    from scipy.optimize import Bounds, LinearConstraint, milp
    variables = [(name, size) for name, sizes in costs.items() for size in sizes]
    layer = np.repeat(np.arange(len(costs)), [len(sizes) for sizes in costs.values()])
    cost = np.array([costs[name][size] for name, size in variables])
    price = np.array([allowed.price(name, size) for name, size in variables], dtype=float)
    if not np.isfinite(cost).all():
        raise ValueError("the error of a layer at some group size is not finite")

    # What a layer costs at least changes no choice. Without it and in units of the largest rest,
    # the solver's tolerances are small.
    cost, _ = _excess(cost, layer)
    price, least_total = _excess(price, layer)
    cost_unit, price_unit = cost.max() or 1.0, price.max() or 1.0
    limit = allowed.limit + TOLERANCE - least_total
    one_each = LinearConstraint(layer == np.arange(len(costs))[:, None], 1, 1)
    affordable = LinearConstraint(price / price_unit, -np.inf, limit / price_unit)
    solution = milp(
        cost / cost_unit,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=(one_each, affordable),
        options={"mip_rel_gap": 0})
    if solution.x is None:
        raise ValueError(
            "no group sizes are allowed, not even the largest of every layer: "
            "loosen the constraint or offer larger groups")
    return {name: size for (name, size), taken in zip(variables, solution.x) if taken > 0.5}


def _excess(values: np.ndarray, layer: np.ndarray) -> tuple[np.ndarray, float]:
    """Take each layer's least value off its values; return the rest and the sum of the least."""
    least = np.full(layer[-1] + 1, np.inf)
    np.minimum.at(least, layer, values)
    return values - least[layer], least.sum()
