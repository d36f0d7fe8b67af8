"What a common CUDA image has not: the package needs a single function of fastcore there, which is given here."

import sys
import types
from collections.abc import Callable
from importlib.util import find_spec

NEEDED = ('torch', 'transformers', 'accelerate', 'safetensors', 'tokenizers', 'numpy', 'PIL', 'pydantic', 'psutil')
HELPFUL = ('flash_attn', 'triton', 'fastcore')
THEIR_NAMES = {'PIL': 'pillow', 'flash_attn': 'flash-attn'}
WITHOUT = {  # what becomes of the checks
    'flash-attn': 'the checks of flash_attention_2 are left out',
    'triton': 'nothing is compiled by it, so flex_attention and the compiled step fail on a GPU',
    'fastcore': 'its `patch`, the one function that models use of it, is given by the script',
    'accelerate': 'training steps and the compiled step are left out',
    'psutil': 'training steps and the compiled step are left out',
}


def patch(function: Callable) -> Callable:
    "As fastcore's, for what this package does with it: a function becomes a method of the class that its first parameter names."
    kind = next(iter(function.__annotations__.values()))
    setattr(kind, function.__name__, function)
    return function


def missing() -> list[str]:
    "Packages that are not installed."
    return [
        THEIR_NAMES.get(name, name)
        for name in (*NEEDED, *HELPFUL)
        if sys.modules.get(name) is None and not find_spec(name)
    ]


def needed(job: str, absent: list[str]) -> list[str]:
    "Those of the absent packages without which a job cannot be done."
    steps = job.startswith('train') or job == 'compile'
    more = {'flash-attn', 'triton', 'fastcore'} | (set() if steps else {'accelerate', 'psutil'})
    return [name for name in absent if name not in more]


def stand_in() -> None:
    "Give what can be given."
    if 'fastcore' in missing():
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
