"What a common CUDA image has not: the package needs a single function of fastcore there, which is given here."

import importlib
import sys
import types
from collections.abc import Callable

NEEDED = ('torch', 'transformers', 'accelerate', 'safetensors', 'tokenizers', 'numpy', 'PIL', 'pydantic', 'psutil')
HELPFUL = ('flash_attn', 'triton', 'fastcore')
THEIR_NAMES = {'PIL': 'pillow', 'flash_attn': 'flash-attn'}


def patch(function: Callable) -> Callable:
    "As fastcore's, for what this package does with it: a function becomes a method of the class that its first parameter names."
    kind = next(iter(function.__annotations__.values()))
    setattr(kind, function.__name__, function)
    return function


def stand_in() -> list[str]:
    "Give what can be given; returns the names of packages that are not installed."
    missing = []
    for name in (*NEEDED, *HELPFUL):
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(THEIR_NAMES.get(name, name))
    if 'fastcore' in missing:
        basics = types.ModuleType('fastcore.basics')
        basics.patch = patch
        package = types.ModuleType('fastcore')
        package.basics = basics
        sys.modules |= {'fastcore': package, 'fastcore.basics': basics}
    return missing


def third_party() -> list[str]:
    "Packages that were imported so far, of those that an environment installs."
    tops = {name.partition('.')[0] for name, module in list(sys.modules.items()) if 'site-packages' in place_of(module)}
    return sorted(top for top in tops if not top.startswith('_'))


def place_of(module: types.ModuleType) -> str:
    "File of a module, '' where it has none."
    return getattr(module, '__file__', None) or ''
