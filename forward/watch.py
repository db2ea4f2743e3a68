"""See the inputs of a model's weights while it runs: every product with a parameter or a part of one, whoever makes it.

Modules are not asked: a product is known by its operand, which is a parameter, a view of one, or a copy of either. So it
makes no difference whether a weight is used by its own module, by another, by several, one expert at a time or in a batch.
One-dimensional weights (norms) take part in no product; theirs is the input of the module that holds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from forward.parts import Part, Use

_TENSOR = torch.Tensor
PRODUCTS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (torch, "matmul mm bmm baddbmm addmm addbmm mv addmv einsum tensordot inner dot chain_matmul _grouped_mm"),
        (_TENSOR, "matmul __matmul__ __rmatmul__ mm bmm baddbmm addmm addbmm mv addmv inner dot baddbmm_ addmm_"),
        (nn.functional, "bilinear grouped_mm multi_head_attention_forward"),
    )
    for name in names.split()
    if hasattr(owner, name)
)
"""Functions that multiply matrices. `linear`, by far the most common, is looked at by itself."""
COPIES = frozenset(
    getattr(owner, name)
    for owner, names in (
        (
            _TENSOR,
            "to float half bfloat16 double type type_as contiguous clone reshape flatten __getitem__ index_select",
        ),
        (torch, "clone reshape flatten index_select"),
    )
    for name in names.split()
)
"""Functions that may copy a part of a parameter before it is multiplied."""


INTERESTING = PRODUCTS | COPIES | {nn.functional.linear}


class See(Protocol):
    """What is done with an input that was seen."""

    def __call__(self, use: Use, x: torch.Tensor) -> None:
        """Look at an input; it may not be changed, nor kept.

        Args:
            use: what it is multiplied with.
            x: `[..., channels of the use]`, of the dtype of the pass. Weights that share an input get the same tensor.
        """


class Watch:
    """Calls `see` for every input of the parameters asked for; a context manager, for the length of which the model is watched.

    Args:
        model: any module tree; its forward is not changed.
        see: gets the inputs.
        products: names of parameters of two and more dimensions.
        vectors: of one.
        head: the weight of an output head whose product nobody needs: its input is seen, and the result is empty.

    Attributes:
        head: that weight; None where every product is computed.
    """

    def __init__(
        self,
        model: nn.Module,
        see: See,
        *,
        products: Collection[str],
        vectors: Collection[str] = (),
        head: torch.Tensor | None = None,
    ):
        self._model = model
        self._see = see
        self._products = frozenset(products)
        self._vectors = vectors
        self.head = head
        self._parts: dict[int, Part] = {}
        self._held: dict[int, StorageWeakRef] = {}
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], Use | None]] = {}
        self._modules: dict[int, str] = {}
        self._moving = False
        self._strange: dict[int, StorageWeakRef] = {}
        self._handles: list[Any] = []
        self._mode: _Mode | None = None

    def __enter__(self) -> Watch:
        self.find_parameters()
        vectors = {id(self._model.get_parameter(name)): name for name in self._vectors}
        for module in self._model.modules():  # of which several may hold one parameter
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) in vectors:
                    hook = _hook(self._see, Use(vectors[id(parameter)], 0, ((0, parameter.shape[0]),)))
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        self._mode = self.in_thread()
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._mode is not None
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def in_thread(self) -> _Mode:
        """A context manager for another thread, in which the model runs too while it is watched."""
        return _Mode(self)

    def find_again(self, part: nn.Module) -> None:
        """Look where the numbers of a part's parameters are, which have moved; those of all others have not, or are gone."""
        self._forget_expired()
        with torch._C.DisableTorchFunction():  # a mode would have the attributes of each parameter looked at
            for module in part.modules():
                name = self._modules.get(id(module))
                for leaf, parameter in module._parameters.items() if name is not None else ():
                    full = f"{name}.{leaf}"
                    if parameter is not None and full in self._products and parameter.numel():
                        self._hold(parameter, Part.whole(full, parameter))

    def find_parameters(self) -> None:
        """Look where all parameters' numbers are, again where they have moved."""
        with torch._C.DisableTorchFunction():
            self._find_parameters()

    def _find_parameters(self) -> None:
        self._forget()
        self._modules = {id(module): name for name, module in self._model.named_modules()}
        parameters = [(name, one) for name, one in self._model.named_parameters() if name in self._products]
        self._moving = any(one.device.type == "meta" for _, one in parameters)
        for name, parameter in parameters:
            if parameter.numel():  # on the meta device too: the product of a head that is not computed needs no numbers
                self._hold(parameter, Part.whole(name, parameter))

    def _forget(self) -> None:
        self._parts.clear()
        self._held.clear()
        self._known.clear()
        self._strange = {key: reference for key, reference in self._strange.items() if not reference.expired()}

    def _forget_expired(self) -> None:
        for key in [key for key, reference in self._held.items() if reference.expired()]:
            del self._held[key], self._parts[key]

    def _hold(self, tensor: torch.Tensor, part: Part) -> None:
        """Note what a storage holds. As long as the weak reference is there, no other storage has its key."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._held[reference.cdata] = reference
        self._parts[reference.cdata] = part

    def part_of(self, tensor: torch.Tensor, *, multiplied: bool = True) -> Part | None:
        """What a tensor's storage holds of a watched parameter; None for every other tensor.

        Args:
            multiplied: whether it is in its place in a module. What is copied may be put there later: numbers that are brought to a device.
        """
        key = int(tensor.untyped_storage()._cdata)
        part = self._parts.get(key)
        if (
            part is None
            and self._moving
            and type(tensor) is nn.Parameter
            and not (multiplied and self._is_strange(key))
        ):
            self.find_parameters()  # its numbers came to a device when its module began to run
            part = self._parts.get(key)
            if (
                part is None and multiplied
            ):  # of another model that runs in step, say: all parameters need not be looked at again
                self._strange[key] = StorageWeakRef(tensor.untyped_storage())
        return part

    def _is_strange(self, key: int) -> bool:
        """Whether a storage, which is there still, was found to be none of the model's."""
        reference = self._strange.get(key)
        return reference is not None and not reference.expired()

    def copied(self, source: torch.Tensor, copy: torch.Tensor) -> None:
        """Note that a tensor is a copy of another, if that is part of a parameter."""
        part = self.part_of(source, multiplied=False)
        if part is None or int(copy.untyped_storage()._cdata) in self._parts:
            return
        made = part.copied(source, copy)
        if made is not None:
            self._forget_expired()
            self._hold(copy, made)

    def see_product(self, x: torch.Tensor, weight: torch.Tensor, contracted: int, index: int | None = None) -> None:
        """Note a product of an input `[..., channels]` with a tensor, if that is part of a parameter."""
        part = self.part_of(weight)
        use = part.use(weight, contracted, index) if part else None
        if use is not None and x.numel():
            self._see(*use.in_order(x))

    def _see_linear(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """The same of a linear layer, by far the most common, whose parameters are looked up by themselves."""
        reference, use = self._known.get(id(weight), (None, None))
        if reference is None or reference() is not weight:
            if type(weight) is not nn.Parameter or self._moving:
                self.see_product(x, weight, weight.ndim - 1)
                return
            part = self.part_of(weight)
            use = part.use(weight, weight.ndim - 1) if part else None
            self._known[id(weight)] = weakref.ref(weight), use
        if use is not None and x.numel():
            self._see(use, x)

    def leaves_out(self, weight: Any) -> bool:
        """Whether the product with a weight is not computed."""
        return self.head is not None and weight is self.head

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function of torch, and look at what it multiplies."""
        if func is nn.functional.linear:
            x, weight = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"]
            self._see_linear(x, weight)
            if self.leaves_out(weight):
                return x.new_empty((*x.shape[:-1], 0))
        elif self._may_matter(func, args, kwargs):
            with _Dispatch(self):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _may_matter(self, func: Any, args: Any, kwargs: Any) -> bool:
        if func in COPIES:
            return bool(args) and _may_be_part(args[0]) and self.part_of(args[0], multiplied=False) is not None
        return func in PRODUCTS and any(self.part_of(one) is not None for one in _tensors((*args, *kwargs.values())))


class _Mode(TorchFunctionMode):
    """Has a watch look at every function of torch that is called in a thread."""

    def __init__(self, watch: Watch):
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in INTERESTING:
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._watch.call(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """What a function that has part of a parameter among its arguments really multiplies, and copies."""

    def __init__(self, watch: Watch):
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch
        aten = torch.ops.aten
        self._products: dict[Any, Callable[[Any], None]] = {
            aten.mm: lambda args: self._mm(args[0], args[1]),
            aten.addmm: lambda args: self._mm(args[1], args[2]),
            aten.bmm: lambda args: self._bmm(args[0], args[1]),
            aten.baddbmm: lambda args: self._bmm(args[1], args[2]),
            aten.mv: lambda args: self._mv(args[0], args[1]),
            aten.addmv: lambda args: self._mv(args[1], args[2]),
            aten.dot: lambda args: self._mv(args[0][None], args[1]),
        }
        self._copying = {aten._to_copy, aten.clone, aten.contiguous, aten._unsafe_view, aten._reshape_copy}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in self._products:
            self._products[packet](args)
        elif packet in self._copying:
            self._watch.copied(args[0], result)
        return result

    def _mm(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """`[rows, channels] x [channels, out]`, or a weight on the left."""
        self._watch.see_product(left, right, 0)
        self._watch.see_product(right.t(), left, 1)

    def _bmm(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """A batch of products."""
        for x, weight, contracted in ((left, right, 1), (right.transpose(1, 2), left, 2)):
            if self._watch.part_of(weight) is None:
                continue
            if weight.stride(0) == 0 or len(weight) == 1:  # one weight for the whole batch
                self._watch.see_product(x, weight[0], contracted - 1)
                continue
            for index in range(len(weight)):
                self._watch.see_product(x[index], weight, contracted, index)

    def _mv(self, matrix: torch.Tensor, vector: torch.Tensor) -> None:
        self._watch.see_product(vector[None], matrix, 1)
        self._watch.see_product(matrix, vector[:, None], 0)


def _hook(see: See, use: Use) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((one for one in _tensors((*args, *kwargs.values())) if one.is_floating_point()), None)
        if x is not None and x.numel():
            with torch._C.DisableTorchFunction():  # a mode would have each of its steps looked at
                see(use, x)

    return hook


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (one for one in value if isinstance(one, torch.Tensor))


def _may_be_part(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (type(value) is nn.Parameter or value._is_view())
