"""Registers our model type with transformers as soon as transformers' auto classes are imported.

`import moesvd_quant` must stay cheap (the command line answers in milliseconds), so the auto classes are
not imported here: a finder waits for them.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any

TRIGGER = "transformers.models.auto.modeling_auto"


def register() -> None:
    importlib.import_module("moesvd_quant.runtime.modeling_moesvd")


class _AfterAutoClasses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            register()

        spec.loader.exec_module = exec_module
        return spec


if TRIGGER in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _AfterAutoClasses())
