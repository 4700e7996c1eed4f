"""Attentions whose operands can be quantised, found in a recorded call."""
from collections import Counter
from collections.abc import Sequence

from torch import fx

from architectures.absorb import behind_casts, name_of, next_linears
from architectures.sites import AttentionSite, Site
from architectures.tracing import Trace


def find_attentions(trace: Trace, sites: Sequence[Site]) -> tuple[AttentionSite, ...]:
    """List the attentions of blocks that one site reads, and nothing else beside its values.

    Left out are modules that multiply several times, attentions whose heads share keys, and those
    that a linear reads together with something else.
    """
    products = [node for node in trace.graph.graph.nodes
                if name_of(node) == "scaled_dot_product_attention"]
    if len(products) != len(trace.attentions):
        # The record computes attention in another way than the model.
        return ()
    times = Counter(trace.attentions)
    found = []
    for node, module in zip(products, trace.attentions):
        site = _reader(trace, node, sites)
        if times[module] == 1 and site is not None and module.startswith(f"{site.block}."):
            found.append(AttentionSite(module, site.name))
    return tuple(found)


def _reader(trace: Trace, node: fx.Node, sites: Sequence[Site]) -> Site | None:
    """Find the site of a block that reads all channels of an attention's output."""
    shapes = [trace.values[operand].shape for operand in node.args[:3]]
    heads = {shape[-3] for shape in shapes}
    if len(shapes) < 3 or len(heads) > 1:
        return None
    width = heads.pop() * shapes[2][-1]
    weights = [behind_casts(reader.args[1]) for reader in next_linears(node)]
    names = {trace.names.get(weight, "").removesuffix(".weight") for weight in weights}
    readers = [site for site in sites if names & set(site.linears)]
    columns = {trace.values[weight].shape[-1] for weight in weights}
    is_whole = len(readers) == 1 and readers[0].block is not None and columns == {width}
    return readers[0] if is_whole else None
