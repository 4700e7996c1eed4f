"""A pretended accelerator: its tensors hold CPU data and refuse to meet tensors on the CPU.

PyTorch keeps the dispatch key PrivateUse1 for devices that it does not know, and lets
Python implement one.
Every operator runs on the CPU data. So results are those of the CPU, and a tensor left on the wrong
device is an error, as it is on a GPU. ``MEMORY`` counts the bytes that lie there.
"""
from collections import Counter
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy, aten.to)  # what may see both sides
INDEXING = (aten.index, aten.index_put, aten.index_put_)  # a GPU takes indices from the CPU too
# Operators that cannot be left to PyTorch's own way through others: torch.tensor has to find copy_,
# and the rest would resize an empty tensor, which the wrapper below cannot follow.
OWN = ("copy_", "arange", "arange.start", "arange.start_step", "eye", "eye.m")


class Memory:
    """The bytes of the tensors that lie on the accelerator; views share theirs.

    Attributes:
        used: now.
        peak: at most, since ``forget_peak``.
    """

    def __init__(self):
        self.used = self.peak = 0
        self._tensors: Counter[int] = Counter()

    def forget_peak(self) -> None:
        self.peak = self.used

    def take(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        self._tensors[place] += 1
        if self._tensors[place] == 1:
            self.used += storage.nbytes()
            self.peak = max(self.peak, self.used)

    def give_back(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        self._tensors[place] -= 1
        if self._tensors[place] == 0:
            self.used -= storage.nbytes()


MEMORY = Memory()


class Share:
    """Counts for one tensor, as long as it lives."""

    def __init__(self, storage: torch.UntypedStorage):
        self._storage = storage
        MEMORY.take(storage)

    def __del__(self):
        MEMORY.give_back(self._storage)


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended accelerator; ``data_on_cpu`` has its shape, strides and dtype."""

    @staticmethod
    def __new__(cls, data_on_cpu: Tensor):
        # A view of a normal tensor is a normal tensor, in inference mode too.
        with torch.inference_mode(data_on_cpu.is_inference()):
            wrapper = Tensor._make_wrapper_subclass(
                cls, data_on_cpu.shape, strides=data_on_cpu.stride(), dtype=data_on_cpu.dtype,
                storage_offset=data_on_cpu.storage_offset(), device=f"{NAME}:0")
        wrapper.data_on_cpu = data_on_cpu
        wrapper.share = Share(data_on_cpu.untyped_storage())
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, *args, **(kwargs or {}))

    # What PyTorch does not pass on for subclasses, or does by changing a shape in place.

    def __repr__(self, **_) -> str:
        return f"{self.data_on_cpu!r} on {self.device}"

    def tolist(self) -> list:
        return self.data_on_cpu.tolist()

    def __matmul__(self, other: Tensor) -> Tensor:
        if self.dim() == 1 and other.dim() == 2:
            return torch.mm(self[None], other)[0]
        return torch.matmul(self, other)

    def new_tensor(self, data, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(self.device)


def get_data(tensor: Tensor) -> Tensor:
    """Give what ``tensor.data`` is: the same values, which know no gradient."""
    if isinstance(tensor, DeviceTensor):
        return DeviceTensor(tensor.data_on_cpu.detach())
    return torch._C.TensorBase.data.__get__(tensor)


def set_data(tensor: Tensor, value: Tensor) -> None:
    """Do what ``tensor.data = value`` does, which PyTorch forbids between unlike classes."""
    if not isinstance(tensor, DeviceTensor) and not isinstance(value, DeviceTensor):
        torch._C.TensorBase.data.__set__(tensor, value)
        return
    value = value.detach()
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, value)


def is_elsewhere(value) -> bool:
    """Whether this is a CPU tensor that the accelerator cannot read: a single number it could."""
    return isinstance(value, Tensor) and not isinstance(value, DeviceTensor) and value.dim() > 0


def check_device(operator, args: tuple, kwargs: dict) -> None:
    """Refuse an operator on tensors of the accelerator that would read others.

    Raises:
        RuntimeError: an argument is a CPU tensor with dimensions, and this is no copy.
    """
    if operator.overloadpacket in COPIES:
        return
    if operator.overloadpacket in INDEXING and isinstance(args[0], DeviceTensor):
        args = args[:1] + args[2:]
    if any(map(is_elsewhere, tree_leaves((args, kwargs)))):
        raise RuntimeError(f"{operator}: expected all tensors on one device, got {NAME} and cpu")


def run(operator, *args, **kwargs):
    """Run an operator on the CPU data.

    Raises:
        RuntimeError: see ``check_device``.
    """
    if operator.name() in OPDEFS:  # the project's own: what is inside has to be checked too
        return OPDEFS[operator.name()]._init_fn(*args, **kwargs)
    leaves = tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
    if ours:
        check_device(operator, args, kwargs)
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    stays = devices[0].type == NAME if devices else bool(ours)
    owners = {id(leaf.data_on_cpu): leaf for leaf in ours}

    def to_cpu(value):
        if isinstance(value, torch.device):
            return CPU
        return value.data_on_cpu if isinstance(value, DeviceTensor) else value

    def from_cpu(value):
        if not isinstance(value, Tensor):
            return value
        owner = owners.get(id(value))
        if not stays:
            return value if owner is None else value.clone()
        if owner is None:
            return DeviceTensor(value)
        if owner.shape != value.shape or owner.stride() != value.stride():
            raise NotImplementedError(f"{operator} changed a shape in place")
        return owner

    cpu_args, cpu_kwargs = tree_map(to_cpu, (args, kwargs))
    return tree_map(from_cpu, operator(*cpu_args, **cpu_kwargs))


@cache
def accelerator() -> tuple[torch.device, tuple[torch.library.Library, ...]]:
    """The device and what keeps it alive; the first call registers it, once in a process."""
    _setup_privateuseone_for_python_backend(NAME)
    Tensor.data = property(get_data, set_data)
    # Operators without tensors, such as torch.zeros, reach PrivateUse1.
    others = torch.library.Library("_", "IMPL")
    others.fallback(run, "PrivateUse1")
    own = torch.library.Library("aten", "IMPL")
    for name in OWN:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(aten, packet), overload or "default")
        own.impl(name, partial(run, operator), "PrivateUse1")
    return torch.device(f"{NAME}:0"), (others, own)
