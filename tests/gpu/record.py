"What a check found, and how it is kept: a line in a file as soon as it is done, whatever comes after it."

import contextlib
import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASS, FAIL, ERROR, MEMORY, LEFT_OUT, MEASURED = 'pass', 'FAIL', 'ERROR', 'out of memory', 'left out', 'measured'


class LeftOut(Exception):
    "A check that cannot be made here, and why."


@dataclass
class Found:
    """What a check gives back.

    figures: name -> (value, unit)
    ok: None: a measurement, nothing to pass
    bound: that `ok` stands for
    rows: details, one dict each, all with the same keys
    """

    figures: dict[str, tuple[Any, str]] = field(default_factory=dict)
    ok: bool | None = None
    bound: str = ''
    detail: str = ''
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Checks:
    """The checks of one job.

    device: 'cuda' or 'cpu'
    tiny: shapes of a few numbers
    until: `time.time()` after which no check begins
    file: gets a JSON line for each check
    folder: for whatever a check writes
    """

    job: str
    device: str
    tiny: bool
    until: float
    file: Path
    folder: Path

    def run(self, name: str, check: Callable[..., Found], *args: Any, budget: float = 0.0, **more: Any) -> None:
        """Make one check; nothing that happens in it stops the next.

        budget: seconds that it is expected to take: it does not begin with fewer left
        """
        started, left = time.time(), self.until - time.time()
        self.file.with_suffix('.now').write_text(name)
        found, status = Found(), LEFT_OUT
        if left < budget:
            found.detail = f'{left:.0f} s were left, it takes about {budget:.0f} s'
        else:
            try:
                found = check(*args, **more)
                status = MEASURED if found.ok is None else PASS if found.ok else FAIL
            except LeftOut as reason:
                found.detail = str(reason)
            except Exception as error:
                status = MEMORY if is_memory(error) else ERROR
                found.detail = ending(error)
        tidy(self.device)
        self.keep(name, status, found, time.time() - started)

    def keep(self, name: str, status: str, found: Found, seconds: float) -> None:
        "Write the line, and print it."
        line = dict(job=self.job, check=name, status=status, seconds=round(seconds, 2)) | asdict(found)
        with self.file.open('a') as file:
            file.write(json.dumps(plain(line)) + '\n')
        figures = ', '.join(f'{key} {shown(value)} {unit}'.strip() for key, (value, unit) in found.figures.items())
        said = '; '.join(part for part in (figures, found.detail.strip().splitlines()[-1:] and found.detail) if part)
        print(f'{status:13} {self.job}: {name} ({seconds:.1f} s)  {said}', flush=True)


def is_memory(error: Exception) -> bool:
    "Whether the device had no room."
    return type(error).__name__ == 'OutOfMemoryError' or 'out of memory' in str(error).lower()


def ending(error: Exception, lines: int = 6) -> str:
    "The last lines of a traceback."
    text = ''.join(traceback.format_exception(error)).strip().splitlines()
    return '\n'.join(line[:300] for line in text[-lines:])


def plain(value: Any) -> Any:
    "The value as JSON has it: no number that is none."
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any) -> str:
    "A figure as it is read: numbers to three digits."
    if value is None:
        return '—'
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    return f'{value:,.0f}' if isinstance(value, int) or abs(value) >= 1000 else f'{value:.3g}'


def tidy(device: str) -> None:
    "Leave no memory to the next check."
    import torch

    gc.collect()
    if device == 'cuda':
        with contextlib.suppress(Exception):  # of a device that an earlier failure left unusable
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def read(file: Path) -> Iterator[dict[str, Any]]:
    "The lines of a job; a last one that was cut off is not among them."
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(line)
