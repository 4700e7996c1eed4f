"""Describe edits of a recorded call as folds: places of a model that divide an activation."""
import itertools
from dataclasses import dataclass

from architectures.absorb import Edit, Edits
from architectures.channels import UNTOUCHED, Demand, Obstacle, before_broadcast
from architectures.sites import Entries, Fold, Modulation, Rows, SharedModulation
from architectures.tracing import Trace

ORDER = "channels in another order"
MOST_RUNS = 16  # that are worth to be written down


@dataclass(frozen=True)
class Run:
    """Neighbouring elements that neighbouring factors divide.

    Attributes:
        channel: the first one's factor.
        is_scale: whether they are the scale of ``1 + scale``.
    """

    start: int
    stop: int
    channel: int
    is_scale: bool

    def is_chunk(self, width: int) -> bool:
        """Tell whether it is one of the chunks that a vector is cut into."""
        return (self.channel == 0 and self.stop - self.start == width
                and self.start % width == 0)


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
    found = runs(edit.demand)
    scales = [run for run in found if run.is_scale]
    plain = [run for run in found if not run.is_scale]
    folds: list[Fold] = []
    for scale in scales:
        shift = plain.pop(0) if plain else None
        folds.append(Modulation(linear, _chunk(shift, width), _chunk(scale, width)))
    rows = len(edit.demand.factor)
    for run in plain:
        whole = run.stop - run.start == rows == width
        folds.append(Rows(linear) if whole else Rows(linear, run.start, run.stop, run.channel))
    return folds


def _of_argument(
    trace: Trace, edit: Edit, parameters: list[Edit], width: int
) -> tuple[Fold, Edit | None]:
    """Describe a divided vector, and return the table that is added to it."""
    _, block, name = edit.node.args
    shape = trace.values[edit.node].shape
    demand = before_broadcast(edit.demand, (1, *shape[1:]), "images of several factors")
    divided = runs(demand)
    if shape[-1] == width and all(run.stop <= width < demand.factor.numel() for run in divided):
        # It could be taken for the whole of every vector.
        raise Obstacle("only the first of several vectors")
    for table in parameters:
        entries = runs(table.demand)
        places = [(run.start, run.stop, run.channel) for run in entries]
        is_sum = not any(run.is_scale for run in divided)
        if is_sum and places == [(run.start, run.stop, run.channel) for run in divided]:
            shift, scale = _pair(entries, width)
            return SharedModulation(trace.names[table.node], shift, scale, block, name), table
    shift, scale = _pair(divided, width)
    return SharedModulation(None, shift, scale, block, name), None


def _pair(found: list[Run], width: int) -> tuple[int | None, int]:
    scales = [run for run in found if run.is_scale]
    shifts = [run for run in found if not run.is_scale]
    if len(scales) != 1 or len(shifts) > 1:
        raise Obstacle("a vector of several shifts")
    return _chunk(shifts[0] if shifts else None, width), _chunk(scales[0], width)


def _chunk(run: Run | None, width: int) -> int | None:
    if run is None:
        return None
    if not run.is_chunk(width):
        raise Obstacle(ORDER)
    return run.start // width


def _of_parameter(trace: Trace, edit: Edit, width: int) -> list[Fold]:
    name, found = trace.names[edit.node], runs(edit.demand)
    if any(run.channel != 0 or run.stop - run.start != width for run in found):
        raise Obstacle(ORDER)
    return [Entries(name, run.start, run.stop, run.is_scale) for run in found]


def runs(demand: Demand) -> list[Run]:
    """Cut what a demand touches into runs, in the order of the flattened elements.

    Raises:
        Obstacle: it consists of too many, or an element is neither divided nor a scale.
    """
    factor, plus = demand.factor.flatten(), demand.plus.flatten()
    touched = (factor != UNTOUCHED).nonzero().flatten()
    if not ((plus[touched] == 0) | (plus[touched] == 1)).all():
        raise Obstacle("a scale beside another number than 1")
    follows = (touched.diff() == 1) & (factor[touched].diff() == 1) & (plus[touched].diff() == 0)
    edges = [0, *((~follows).nonzero().flatten() + 1).tolist(), len(touched)]
    if len(edges) > MOST_RUNS:
        raise Obstacle(ORDER)
    found = []
    for first, end in itertools.pairwise(edges):
        start, stop = int(touched[first]), int(touched[end - 1]) + 1
        found.append(Run(start, stop, int(factor[start]), bool(plus[start])))
    return found
