"The loader by itself: pictures of 336 pixels from JPEG files to batches, with 0, 2, 4, 8 processes that read ahead."

import io
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from .record import Checks, Found

SIDE, BATCH = 336, 32
WORKERS = 0, 2, 4, 8


def run(checks: Checks) -> None:
    "Decoding alone, then the loader with more and more processes."
    files = write(checks.folder / 'pictures', 8 if checks.tiny else 256)
    checks.run('decoding alone', decoding, files, 16 if checks.tiny else 256)
    for workers in WORKERS[:2] if checks.tiny else WORKERS:
        checks.run(f'{workers} workers', loader, files, workers, checks.device, 4 if checks.tiny else 40, budget=5)


def write(folder: Path, count: int) -> list[Path]:
    "Photograph-like files: waves of colour with some noise, 40 to 60 kB each."
    folder.mkdir(parents=True, exist_ok=True)
    draw, grid = np.random.default_rng(0), np.mgrid[0:SIDE, 0:SIDE] / SIDE
    files = []
    for n in range(count):
        waves = [
            np.sin(draw.uniform(5, 60) * (grid[0] * np.cos(a) + grid[1] * np.sin(a))) for a in draw.uniform(0, 6, 3)
        ]
        pixels = 128 + 80 * np.stack(waves, -1) + draw.normal(0, 12, (SIDE, SIDE, 3))
        files.append(folder / f'{n}.jpg')
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def decoding(files: list[Path], count: int) -> Found:
    "JPEG to pixels by Pillow, one process: no loader can be faster."
    contents = [path.read_bytes() for path in files]
    start = time.perf_counter()
    for n in range(count):
        Image.open(io.BytesIO(contents[n % len(contents)])).convert('RGB').load()
    rate = count / (time.perf_counter() - start)
    return Found({'rate': (rate, 'pictures a second'), 'file': (sum(map(len, contents)) / len(contents) / 1e3, 'kB')})


def samples_of(files: list[Path]) -> list[dict[str, Any]]:
    "A question and an answer to each picture, undecoded."
    return [
        {
            'id': path.stem,
            'images': [{'bytes': None, 'path': str(path)}],
            'conversations': [
                {'from': 'human', 'value': f'<image>\nWhat is to be seen in picture {n}, and where?'},
                {
                    'from': 'gpt',
                    'value': f'Waves of three colours, from the upper left to the lower right of {n}. ' * 3,
                },
            ],
            'document': '',
        }
        for n, path in enumerate(files)
    ]


def steps_ahead(files: list[Path], workers: int, steps: int, pinned: bool = False) -> Iterator[Any]:
    "Batches of a stage as the loop gets them: read, encoded, resized, normalised, collated."
    from mllm_replica.data.language import byte_tokenizer
    from mllm_replica.data.mixture import Mixture
    from mllm_replica.data.packing import EncodedLater, collate
    from mllm_replica.honeybee.model import HoneybeeProcessor
    from mllm_replica.models.image_processing import VisionLanguageImageProcessor
    from mllm_replica.training.loading import Steps, read_ahead

    processor = HoneybeeProcessor(VisionLanguageImageProcessor(SIDE), byte_tokenizer(), 144)
    encoded = {'a': EncodedLater(samples_of(files), processor.encode, 2048)}
    together = partial(collate, pad_token_id=0, image_tensor=processor.image_tensor)
    order = Mixture({'a': len(files)}, {'a': 1.0}, 0)
    return read_ahead(Steps(order, encoded, together, steps, BATCH, loaders=workers), 0, pinned)


def loader(files: list[Path], workers: int, device: str, steps: int) -> Found:
    "How many samples a second it gives."
    ahead = steps_ahead(files, workers, steps, device == 'cuda')
    start = time.perf_counter()
    _, batches = next(ahead)  # processes start, and fill their queues
    began = time.perf_counter()
    seen = sum(1 for _ in ahead)
    rate = seen * BATCH / (time.perf_counter() - began)
    pixels = batches[0]['pixel_values']
    figures = {
        'rate': (rate, 'samples a second'),
        'first batch': (began - start, 's'),
        'samples of a batch': (BATCH, ''),
    }
    return Found(figures, tuple(pixels.shape) == (BATCH, 3, SIDE, SIDE), f'pixels are [{BATCH}, 3, {SIDE}, {SIDE}]')
