"""Modules that PyTorch and transformers import by the way, and that a run never computes with.

They would be in memory from the first step to the last: scipy.optimize for the loss of object detection, and the
compiler of PyTorch (torch._dynamo) for decorators that say what it should leave alone. In a process of our own each is
stood in for by what is asked of it on the way. Whatever else is asked, the module itself is imported and answers, so
that a version which asks more takes more memory, and does nothing else.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_LIGHT = (
    "torch._dynamo.config",
    "torch._dynamo._trace_wrapped_higher_order_op",
)  # which fake tensors and masks ask for


def begin() -> None:
    """Put stand-ins in the place of modules that are not imported yet, until the process ends."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    # The loss of object detection, whose import stands at the top of transformers' models.
    _stand_in("scipy.optimize", {"linear_sum_assignment": _called("scipy.optimize", "linear_sum_assignment")})
    _stand_in("torch._dynamo", _uncompiled())
    _stand_in("torch._dynamo.source", _sources())


class _Deferred(ModuleType):
    """Stands in for a module until something is asked that it has no answer to."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module, by inspect and warnings
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _stand_in(name: str, answers: Mapping[str, Any]) -> None:
    package, _, inner = name.partition(".")
    spec = find_spec(package)
    if name in sys.modules or spec is None or spec.submodule_search_locations is None:
        return
    module = _Deferred(name)
    module.__path__ = [str(Path(place, *inner.split("."))) for place in spec.submodule_search_locations]
    vars(module).update(answers)
    sys.modules[name] = module


def _real(name: str) -> ModuleType:
    """The module itself, imported if it was stood in for."""
    if isinstance(stand_in := sys.modules.get(name), _Deferred):
        for inner in [one for one in sys.modules if f"{one}.".startswith(f"{name}.")]:
            if isinstance(sys.modules[inner], _Deferred):
                del sys.modules[inner]
        module = importlib.import_module(name)
        for told, function in vars(stand_in).get("_marked", ()):
            getattr(module, told)(function)
    return importlib.import_module(name)


def _called(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when the function is called."""
    return lambda *args, **options: getattr(_real(module), name)(*args, **options)


def _uncompiled() -> dict[str, Any]:
    """What torch._dynamo answers where nothing is compiled; marks of functions are made good when something is."""
    marked: list[tuple[str, Callable[..., Any]]] = []

    def disable(function: Any = None, *_: Any, **__: Any) -> Any:
        return function or (lambda function: function)

    def marks(name: str) -> Callable[[Any], Any]:
        def mark(function: Any) -> Any:
            marked.append((name, function))
            return function

        return mark

    names = ("assume_constant_result", "allow_in_graph")
    return {"disable": disable, "graph_break": lambda *_, **__: None, "_marked": marked} | {
        name: marks(name) for name in names
    }


def _sources() -> dict[str, Any]:
    """Where a tensor comes from, which fake tensors note, and ask of nothing but shapes that are symbols."""
    return {name: type(name, (str,), {}) for name in ("ConstantSource", "RandomValueSource")}


class _Finder(MetaPathFinder, Loader):
    """Finds what lies in a module that is stood in for: in the module itself, which is imported then."""

    def find_spec(self, name: str, _: Sequence[str] | None, __: ModuleType | None = None) -> ModuleSpec | None:
        parent = name.rpartition(".")[0]
        if name in _LIGHT or not isinstance(sys.modules.get(parent), _Deferred):
            return None
        _real(parent)
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(spec.name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
