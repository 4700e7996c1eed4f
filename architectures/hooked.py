"""What linears see and give while a model runs."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

# Called with a linear's name, input and output; what it returns, if anything, replaces the output.
See = Callable[[str, Tensor, Tensor], Tensor | None]


@contextmanager
def hooked(model: nn.Module, names: Sequence[str], see: See) -> Iterator[None]:
    """Call ``see`` whenever one of the named linears runs, while open."""

    def hook_of(name):
        return lambda module, inputs, output: see(name, inputs[0], output)

    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
