"""Edits of a recorded call as places of a model that divide an activation."""
from architectures.absorb import Edit, Edits
from architectures.channels import UNTOUCHED, Demand, Obstacle, before_broadcast
from architectures.sites import Entries, Fold, Modulation, Rows, SharedModulation
from architectures.tracing import Trace

# Chunks as wide as the activation, by their first element: those that are divided as they are,
# and those that are the scale of 1 + scale.
Chunks = tuple[list[int], list[int]]


def folds_of(trace: Trace, edits: Edits, width: int) -> tuple[Fold, ...]:
    """Describe edits that divide an activation of ``width`` channels.

    Raises:
        Obstacle: they divide channels in an order that no place describes.
    """
    rows, parameters, arguments = [], [], []
    for edit in edits:
        if edit.rows:
            rows.append(edit)
        elif edit.node in trace.names:
            parameters.append(edit)
        else:
            arguments.append(edit)
    folds: list[Fold] = []
    for edit in rows:
        folds += _of_rows(trace, edit, width)
    for edit in arguments:
        fold, table = _of_argument(trace, edit, parameters, width)
        folds.append(fold)
        parameters = [parameter for parameter in parameters if parameter is not table]
    for edit in parameters:
        folds += _of_parameter(trace, edit, width)
    return tuple(folds)


def _of_rows(trace: Trace, edit: Edit, width: int) -> list[Fold]:
    linear = trace.names[edit.node].removesuffix(".weight")
    plain, scales = chunks(edit.demand, width)
    folds: list[Fold] = []
    for start in scales:
        shift = plain.pop(0) // width if plain else None
        folds.append(Modulation(linear, shift=shift, scale=start // width))
    rows = len(edit.demand.factor)
    for start in plain:
        whole = start == 0 and rows == width
        folds.append(Rows(linear) if whole else Rows(linear, start, start + width))
    return folds


def _of_argument(
    trace: Trace, edit: Edit, parameters: list[Edit], width: int
) -> tuple[Fold, Edit | None]:
    """Describe a divided vector, and return the table that is added to it."""
    _, block, name = edit.node.args
    shape = trace.values[edit.node].shape
    demand = before_broadcast(edit.demand, (1, *shape[1:]), "images of several factors")
    plain, scales = chunks(demand, width)
    for table in parameters:
        shifts, table_scales = chunks(table.demand, width)
        if not scales and sorted(shifts + table_scales) == plain:
            shift, scale = _pair(shifts, table_scales, width)
            return SharedModulation(trace.names[table.node], shift, scale, block, name), table
    shift, scale = _pair(plain, scales, width)
    return SharedModulation(None, shift, scale, block, name), None


def _pair(shifts: list[int], scales: list[int], width: int) -> tuple[int | None, int]:
    if len(scales) != 1 or len(shifts) > 1:
        raise Obstacle("a vector of several shifts")
    return shifts[0] // width if shifts else None, scales[0] // width


def _of_parameter(trace: Trace, edit: Edit, width: int) -> list[Fold]:
    name = trace.names[edit.node]
    plain, scales = chunks(edit.demand, width)
    return [*(Entries(name, start, start + width) for start in plain),
            *(Entries(name, start, start + width, is_scale=True) for start in scales)]


def chunks(demand: Demand, width: int) -> Chunks:
    """Find the chunks of a flattened demand.

    Raises:
        Obstacle: it does not consist of whole chunks in order.
    """
    factor, plus = demand.factor.flatten(), demand.plus.flatten()
    touched = factor != UNTOUCHED
    starts = (factor == 0).nonzero().flatten().tolist()
    expected = 0
    plain, scales = [], []
    for start in starts:
        chunk = slice(start, start + width)
        in_order = factor[chunk].tolist() == list(range(width))
        kind = float(plus[start])
        if not in_order or kind not in (0.0, 1.0) or not (plus[chunk] == kind).all():
            raise Obstacle("channels in another order")
        (scales if kind else plain).append(start)
        expected += width
    if int(touched.sum()) != expected:
        raise Obstacle("channels in another order")
    return plain, scales
