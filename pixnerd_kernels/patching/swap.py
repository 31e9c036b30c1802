"""Gives one module another method, and takes it back without a trace.

The instance's class becomes a subclass with one method replaced. Unlike an attribute on the instance, that survives
what PyTorch does to modules: `copy.deepcopy`, pickling, `nn.DataParallel`'s replicas and FSDP2's own subclass find
the method bound to the right object, and torch.compile, which guards a module's type, compiles it anew.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Replacement:
    """What is called in place of a method; holds constants only, so that it pickles and compares.

    Attributes:
        op: the public name of the op that does the work.
        method: the replaced method.
    """

    op: ClassVar[str]
    method: ClassVar[str] = "forward"

    def run(self, module: Any, *args: Any) -> Any:
        """The method's result, from `module`'s own parameters."""
        raise NotImplementedError

    def accepts(self, module: Any, *args: Any) -> bool:
        """Whether `run` takes this call; what it does not take goes to the original method."""
        return True


def special(tensor: object) -> bool:
    """Whether a tensor is of a class with rules of its own (quantised, distributed), which the ops do not know.

    PyTorch's stand-ins while it traces a graph are like the tensors that they stand for.
    """
    kind = type(tensor)
    ordinary = kind in (Tensor, nn.Parameter) or not isinstance(tensor, Tensor)
    return not ordinary and not kind.__module__.startswith("torch._subclasses")


#: Subclasses by original class and replacement: blocks that are alike share one, and one compiled graph.
_classes: dict[tuple[type, Replacement], type] = {}


def arguments(method: Callable) -> list[inspect.Parameter]:
    """A method's parameters without `self`; none where it is not a Python function."""
    try:
        return list(inspect.signature(method).parameters.values())[1:]
    except (TypeError, ValueError):
        return []


def patched_class(original: type, replacement: Replacement) -> type:
    """The subclass of `original` whose `replacement.method` runs the replacement."""
    key = (original, replacement)
    if key not in _classes:
        method = getattr(original, replacement.method)
        names = [p.name for p in arguments(method) if p.kind is not p.KEYWORD_ONLY]

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = args
            for name in names[len(args) :]:
                if name not in kwargs:
                    break
                given = (*given, kwargs[name])
            known = len(given) == len(args) + len(kwargs) and not any(map(special, given))
            if known and replacement.accepts(self, *given):
                return replacement.run(self, *given)
            return method(self, *args, **kwargs)

        call = functools.wraps(method)(call)
        namespace = {
            replacement.method: call,
            "__reduce_ex__": _reduce_ex,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_pixnerd_original": original,
            "_pixnerd_replacement": replacement,
        }
        _classes[key] = type(original)(original.__name__, (original,), namespace)
    return _classes[key]


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickles and copies as the original class and the replacement: a generated class has no importable name."""
    reduced = super(type(self), self).__reduce_ex__(protocol)
    if isinstance(reduced, str):
        return reduced
    own = (type(self)._pixnerd_original, type(self)._pixnerd_replacement)
    return (_rebuild, own, *reduced[2:])


def _rebuild(original: type, replacement: Replacement) -> Any:
    cls: Any = patched_class(original, replacement)
    return cls.__new__(cls)


def replacement_of(module: nn.Module) -> Replacement | None:
    """The replacement that runs in this module, if it is patched."""
    return getattr(type(module), "_pixnerd_replacement", None)


def swap(module: nn.Module, replacement: Replacement) -> None:
    """Patch this instance."""
    module.__class__ = patched_class(type(module), replacement)


def restore(module: nn.Module) -> None:
    """Give the instance its class back.

    Raises:
        RuntimeError: something else has changed its class since (FSDP2 and parametrizations do).
    """
    own = vars(type(module))
    if "_pixnerd_original" not in own:
        raise RuntimeError(
            f"{type(module).__name__}: its class was changed after the patch (fully_shard and parametrizations do "
            "that); undo that first"
        )
    module.__class__ = own["_pixnerd_original"]
