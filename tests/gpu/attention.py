"""Attention kernels against the plain one, on small models of every paper: outputs and gradients, in fp32 and under bf16
autocast, rows padded on the right; and mPLUG-Owl3 with 50 images in one prompt."""

import math

from . import shapes
import torch
from .parity import exact
from .record import Checks, Found, LeftOut
from torch import Tensor, nn

from mllm_replica.data.packing import collate

KERNELS = ('sdpa', 'flex_attention', 'flash_attention_2')
SINGLE = 1e-4  # relative error, root mean square, in fp32
WORSE = 2.0, 2e-3  # in bf16: so many times the error of the plain kernel in bf16, and so much


def run(checks: Checks) -> None:
    "Every kernel on every paper's model; flex last, for it is compiled."
    exact()
    for kernel in ('sdpa', 'flash_attention_2'):
        for paper in shapes.PAPERS:
            checks.run(f'{paper} {kernel}', agrees, paper, kernel, checks.device, budget=4)
    checks.run('owl3 50 images', many_images, checks.device, checks.tiny, budget=10)
    for paper in shapes.PAPERS:
        checks.run(f'{paper} text alone', text_alone, paper, checks.device, budget=4)
    for paper in shapes.PAPERS:
        checks.run(f'{paper} flex_attention', agrees, paper, 'flex_attention', checks.device, budget=25)


def usable(kernel: str, device: str) -> None:
    "Raise where a kernel cannot run."
    if kernel != 'flash_attention_2':
        return
    from transformers.utils import is_flash_attn_2_available

    if device != 'cuda':
        raise LeftOut('flash-attn needs a GPU')
    if not is_flash_attn_2_available():
        raise LeftOut('flash-attn is not installed')


def batch_of(model: nn.Module, device: str, shape: shapes.Shape, pad: int = 7) -> dict[str, Tensor]:
    "Rows of which the second is shorter."
    first, second, *others = shapes.samples_of(model.config, shape, shape.batch)
    second.input_ids, second.labels = second.input_ids[:-pad], second.labels[:-pad]
    batch = collate([first, second, *others], 0)
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}


def passes(model: nn.Module, batch: dict[str, Tensor], kernel: str, half: bool, device: str) -> dict[str, Tensor]:
    "Logits at real positions and all gradients, through a kernel; flex has no gradients on a CPU, nor does it need a compiler."
    model.set_attn_implementation(kernel)
    model.zero_grad(set_to_none=True)
    backward = device == 'cuda' or kernel != 'flex_attention'
    stance = 'default' if backward else 'force_eager'
    with torch.autocast(device, torch.bfloat16, enabled=half), torch.set_grad_enabled(backward):
        with torch.compiler.set_stance(stance):
            out = model(**batch)
    if backward:
        out.loss.float().backward()
    real = batch['attention_mask'].bool()
    gradients = {f'grad.{n}': p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return {'logits': out.logits.detach().float()[real]} | gradients


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    "Relative errors of the logits and of all gradients together."
    if len(found) > 1 and found.keys() != expected.keys():
        raise ValueError(f'gradients only on one side: {sorted(found.keys() ^ expected.keys())[:5]}')
    errors = {}
    for part in ('logits', 'grad.'):
        names = [name for name in expected if name.startswith(part) and name in found]
        if not names:
            continue
        apart = sum(float((found[name] - expected[name]).double().square().sum()) for name in names)
        errors[part.strip('.')] = math.sqrt(
            apart / sum(float(expected[name].double().square().sum()) for name in names)
        )
    return errors


def compared(model: nn.Module, batch: dict[str, Tensor], kernel: str, device: str) -> Found:
    "A kernel beside the plain one in both types; flash has no fp32."
    plain, rough = (passes(model, batch, 'eager', half, device) for half in (False, True))
    own, figures, fine = distance(rough, plain), {}, True
    if kernel != 'flash_attention_2':
        errors = distance(passes(model, batch, kernel, False, device), plain)
        figures |= {f'fp32 {part}': (error, 'relative') for part, error in errors.items()}
        fine &= all(error <= SINGLE for error in errors.values())
    errors = distance(passes(model, batch, kernel, True, device), plain)
    for part, error in errors.items():
        limit = WORSE[0] * own[part] + WORSE[1]
        figures |= {f'bf16 {part}': (error, 'relative'), f'bf16 {part}, eager': (own[part], 'relative')}
        fine &= error <= limit
    return Found(figures, fine, f'fp32 {SINGLE:g}; bf16 {WORSE[0]:g} × the error of eager + {WORSE[1]:g}')


def small(paper: str, device: str) -> nn.Module:
    "A small model on the device."
    with torch.device(device):
        return shapes.build(paper, tiny=True).eval()


def agrees(paper: str, kernel: str, device: str) -> Found:
    "One kernel, one paper."
    usable(kernel, device)
    torch.compiler.reset()  # each model has its own shapes, and compilation gives up after eight
    model = small(paper, device)
    return compared(model, batch_of(model, device, shapes.shape_of(paper, True)), kernel, device)


def many_images(device: str, tiny: bool, images: int = 50) -> Found:
    "All images of a prompt, seen through PyTorch's kernel and through the plain one; SigLIP's real number of patches on a GPU."
    model, figures = small('owl3', device), {}
    if not tiny:
        with torch.device(device):
            model = shapes.many_patches().eval()
    batch = batch_of(model, device, shapes.Shape(400, images, 2))
    found = compared(model, batch, 'sdpa', device)
    figures = {'images': (images, ''), 'patches of an image': (model.config.num_patches, '')}
    return Found(figures | found.figures, found.ok, found.bound)


def text_alone(paper: str, device: str) -> Found:
    "A micro-batch without images where other processes have some: a blank image counts zero."
    from mllm_replica.training.sharding import feeds_all

    model = small(paper, device).train()
    batch = batch_of(model, device, shapes.shape_of(paper, True))
    text = {name: batch[name][:, -20:] for name in ('input_ids', 'labels', 'attention_mask')}
    plain = model(**text).loss
    with feeds_all(model, True):
        loss = model(**text).loss
        loss.backward()
    apart = float((loss - plain).detach().abs())
    seen = next(model.connector.parameters()).grad is not None
    return Found({'loss, difference': (apart, '')}, apart <= 1e-5 and seen, 'loss as without the blank image, to 1e-5')
