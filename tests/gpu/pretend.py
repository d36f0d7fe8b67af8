"""A device that is none: its tensors say that they lie on `pretend:0`, lie on the CPU, and refuse what a GPU refuses: a
partner on the CPU, a generator of the CPU. Shows without a GPU where a tensor is made on the wrong device.

    python3 tests/gpu/pretend.py            golden files in fp32, sdpa, text alone, a training step; ends with 1 where one fails

PyTorch's experimental backend in Python carries it (2.13); what C++ makes from lists (`torch.tensor`) goes by the CPU."""

import contextlib
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

sys.path[:] = [place for place in sys.path if Path(place or '.').resolve() != Path(__file__).resolve().parent]
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils import backend_registration  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

NAME = 'pretend'
MOVES = ('aten::copy_', 'aten::_to_copy', 'aten::_foreach_copy_')
INDEXING = ('aten::index.Tensor', 'aten::index_put')


class Module(backend_registration._DummyBackendModule):
    "What PyTorch asks of a kind of device."

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        "Of autocast."
        return [torch.bfloat16]

    def manual_seed(self, seed: int) -> None:
        "Numbers are drawn by the CPU."
        torch.default_generator.manual_seed(seed)

    def get_rng_state(self, *_: Any) -> Tensor:
        "None of its own."
        return torch.zeros(8, dtype=torch.uint8, device='cpu')

    def set_rng_state(self, *_: Any) -> None:
        "None of its own."

    def _is_in_bad_fork(self) -> bool:
        return False


class Away(Tensor):
    "A tensor on the device."

    @staticmethod
    def __new__(cls, inner: Tensor) -> 'Away':
        form = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        return Tensor._make_wrapper_subclass(cls, inner.size(), device=torch.device(NAME, 0), **form)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        "Numbers, as any tensor gives."
        return self.inner.tolist()

    def __getitem__(self, key: Any) -> Tensor:
        parts = key if isinstance(key, tuple) else (key,)
        return super().__getitem__(tuple(torch.tensor(p, device='cpu') if isinstance(p, list) else p for p in parts))

    def __repr__(self, **_: Any) -> str:
        return f'Away({self.inner})'

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return done(function, args, kwargs or {})


class Pretend(TorchDispatchMode):
    "Whatever is made on the device meanwhile is made."

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return done(function, args, kwargs or {})


def refuse(name: str, here: list[Tensor], away: list[Away], made_away: bool, args: tuple, leaves: list[Any]) -> None:
    "Raise where a GPU would."
    if name.startswith(INDEXING):
        wrong = bool(away) and not isinstance(args[0], Away)
    else:
        wrong = bool(away) and any(tensor.dim() for tensor in here) and not name.startswith(MOVES)
    if wrong:
        raise RuntimeError(f'{name}: tensors on {NAME} and on the CPU, the latter {[tuple(t.shape) for t in here]}')
    if made_away and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f'{name}: a generator of the CPU for a tensor on {NAME}')


def done(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    "An operation, by the CPU; its results are where they would be."
    name, leaves, device = function.name(), tree_leaves((args, kwargs)), kwargs.get('device')
    away = [leaf for leaf in leaves if isinstance(leaf, Away)]
    here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Away)]
    made_away = bool(away) if device is None else torch.device(device).type == NAME
    refuse(name, here, away, made_away, args, leaves)
    if name == 'aten::_fused_sdp_choice':
        return 0  # plain products
    inner_args, inner = tree_map(lambda x: x.inner if isinstance(x, Away) else x, (args, kwargs))
    if device is not None:
        inner['device'] = torch.device('cpu')
    if name.startswith('aten::add_.') and away and threading.current_thread() is not threading.main_thread():
        args[0].inner = args[0].inner + inner_args[1]  # the backward pass adds in place what it takes to be its own
        return args[0]
    if name == 'aten::_conj' and away:
        return Away(inner_args[0].conj_physical())  # no lazy one: the bit would be lost
    out = function(*inner_args, **inner)
    if name.partition('.')[0].endswith('_') and args and isinstance(args[0], Tensor):
        return args[0]
    return tree_map(lambda x: Away(x) if made_away and isinstance(x, Tensor) else x, out)


def from_lists() -> None:
    "What C++ fills with numbers is filled on the CPU and moved."
    plain = torch.tensor

    def tensor(data: Any, dtype: Any = None, device: Any = None, **more: Any) -> Tensor:
        "As PyTorch's."
        place = torch.empty(0).device if device is None else torch.device(device)
        made = plain(data, dtype=dtype, device='cpu', **more)
        return made if place.type == 'cpu' else made.to(place)

    def new_tensor(self: Tensor, data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        "As PyTorch's."
        return tensor(data, dtype or self.dtype, device or self.device)

    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        "As PyTorch's."
        return data.to(dtype=dtype, device=device) if isinstance(data, Tensor) else tensor(data, dtype, device)

    torch.tensor, torch.as_tensor, Tensor.new_tensor = tensor, as_tensor, new_tensor


def main() -> int:
    "The checks; 1 where one fails."
    from gpu.record import ERROR, FAIL, Checks, read

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    from_lists()
    from accelerate.state import PartialState
    from gpu import attention, parity, shapes, steps

    torch.autocast = lambda *args, **more: contextlib.nullcontext()  # it knows no such device
    steps.types_of = lambda model, stages: {name: torch.float32 for name, _ in model.named_parameters()}
    PartialState.default_device = property(lambda self: torch.device(NAME))
    with tempfile.TemporaryDirectory() as folder, Pretend():
        checks = Checks('pretend', NAME, True, float('inf'), Path(folder) / 'lines.jsonl', Path(folder))
        for paper in shapes.PAPERS:
            checks.run(f'{paper} fp32', parity.single, paper, NAME)
            checks.run(f'{paper} sdpa', attention.agrees, paper, 'sdpa', NAME)
            checks.run(f'{paper} text alone', attention.text_alone, paper, NAME)
            checks.run(f'{paper} step', steps.one, paper, True, NAME, Path(folder), False, True)
        return int(any(line['status'] in (FAIL, ERROR) for line in read(checks.file)))


if __name__ == '__main__':
    sys.exit(main())
