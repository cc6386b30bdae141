"""FLOP formulas for `torch.utils.flop_counter`, registered when somebody imports it.

That module imports triton, which `import svitt_ops` must not; so the formulas wait for it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from svitt_ops._ops import ops

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def register(name: str, formula: Callable[..., int]) -> None:
    """Count ``svitt_ops::<name>`` by ``formula``, called with the op's own arguments."""
    _formulas[name] = formula
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _hand_over(counter: ModuleType) -> None:
    for name, formula in _formulas.items():

        def count(*args: Any, formula: Any = formula, out_val: Any = None, **kwargs: Any) -> int:
            return formula(*args, **kwargs)

        packet = getattr(ops, name)
        counter.register_flop_formula(packet, get_raw=True)(count)
    _formulas.clear()


class _Finder(MetaPathFinder):
    """Runs `_hand_over` right after the counter's module, then is gone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _hand_over(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
