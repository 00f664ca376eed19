"""Plug-ins by folder: a task, a method or a check is a file; the first two are named so in a recipe."""

import importlib
import pkgutil
from typing import Literal

from lowres_ft.errors import RecipeError, nearest
from lowres_ft.spec import Spec, shown

Folder = Literal["tasks", "methods", "checks"]


def names(folder: Folder) -> tuple[str, ...]:
    """The plug-ins that lie in a folder, sorted; a file whose name begins with `_` is a part of others."""
    package = importlib.import_module(f"lowres_ft.{folder}")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in found if name != "base" and not name.startswith("_")))


def load(folder: Folder, name: object) -> type[Spec]:
    """The plug-in class of a name: the one `Spec` that its file defines.

    Raises:
        RecipeError: No file of that name lies in the folder, or it defines no such class, or several.
    """
    known = names(folder)
    if not isinstance(name, str) or name not in known:
        raise RecipeError(f"must be one of {', '.join(known)}, found {shown(name)}{nearest(str(name), known)}")
    module = importlib.import_module(f"lowres_ft.{folder}.{name}")
    base = importlib.import_module(f"lowres_ft.{folder}.base").PLUGIN
    found = {
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    }
    if len(found) != 1:
        told = ", ".join(sorted(value.__name__ for value in found)) or "none"
        raise RecipeError(
            f"'{name}' is no plug-in: its file must define one subclass of {base.__name__}, found {told}",
            hint="A class that is but a part of others belongs into a file whose name begins with _.",
        )
    plugin: type[Spec] = found.pop()
    return plugin
