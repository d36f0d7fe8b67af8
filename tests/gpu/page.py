"The page that people read: what it ran on, what agreed, what was measured beside what was planned."

from typing import Any

from .record import ERROR, FAIL, LEFT_OUT, MEMORY, shown

Line = dict[str, Any]


def table(head: list[str], rows: list[list[Any]]) -> str:
    "A Markdown table; figures to three digits."
    cells = [[shown(cell).replace('|', '\\|').replace('\n', '<br>') for cell in row] for row in rows]
    lines = [' | '.join(row) for row in ([*map(str, head)], ['---'] * len(head), *cells)]
    return '\n'.join(f'| {line} |' for line in lines) + '\n'


def value(line: Line | None, name: str) -> Any:
    "A figure of a check; None where it has none."
    return (line or {}).get('figures', {}).get(name, (None,))[0]


def find(lines: list[Line], job: str, check: str) -> Line | None:
    "A check by name."
    return next((line for line in lines if (line['job'], line['check']) == (job, check)), None)


def training(lines: list[Line], planned: dict[str, Any]) -> list[Line]:
    "Each measured step beside its plan: MFU against the maker's rate and against a large matrix product here."
    stated = value(find(lines, 'device', 'what it is'), 'published rate')
    product = value(find(lines, 'device', 'rates'), 'matrix product, bfloat16')
    rows = []
    for line in (line for line in lines if line['job'].startswith('train')):
        plan, seconds = planned.get(line['check'], {}), value(line, 'step')
        rate = plan['flops'] / seconds / 1e12 if plan and seconds else None
        memory, peak = sum(plan['memory'].values()) if plan else None, value(line, 'peak memory')
        rows.append(
            {
                'step of': line['check'],
                'status': line['status'],
                'tokens a second': value(line, 'tokens'),
                'step, s': seconds,
                'TFLOP/s': rate,
                'MFU, stated rate': rate / stated if rate and stated else None,
                'MFU, matrix product': rate / product if rate and product else None,
                'peak, GB': peak,
                'planned, GB': memory,
                'peak ÷ planned': peak / memory if peak and memory else None,
            }
        )
    return rows


def head(found: dict[str, Any]) -> list[str]:
    "The first lines say what the figures are of."
    on = value(find(found['results'], 'device', 'what it is'), 'device')
    if found['device'] == 'cuda':
        return [f'# GPU check on {on}' if on else '# GPU check, not run: no GPU was found', '']
    return [
        '**Run on a CPU, with shapes of a few numbers: this shows that the script runs. No figure here is of a GPU.**',
        '',
        '# GPU check, not run on a GPU',
        '',
    ]


def section(title: str, lines: list[Line], job: str) -> list[str]:
    "The checks of a job that came to figures, those of one bound in one table."
    those = [line for line in lines if line['job'] == job and line['figures']]
    bounds = dict.fromkeys(line['bound'] for line in those)
    tables = [columns_of([line for line in those if line['bound'] == bound]) for bound in bounds]
    return [f'## {title}', '', *tables] if tables else []


def columns_of(lines: list[Line]) -> str:
    "Checks whose figures have the same names, one to a column; their bound below."
    names = list(dict.fromkeys(name for line in lines for name in line['figures']))
    units = {name: unit for line in lines for name, (_, unit) in line['figures'].items()}
    heads = [name + f', {units[name]}' * bool(units[name]) for name in names]
    rows = [[line['check'], line['status'], *(value(line, name) for name in names)] for line in lines]
    bound = lines[0]['bound']
    return table(['check', 'status', *heads], rows) + f'\nBound: {bound}.\n' * bool(bound)


def figures_of(line: Line) -> str:
    "All figures in a row."
    return ', '.join(f'{name} {shown(v)} {unit}'.strip() for name, (v, unit) in line['figures'].items())


def troubles(lines: list[Line]) -> list[str]:
    "What failed, and what was left out, with its last lines."
    parts = []
    for line in lines:
        if line['status'] in (FAIL, ERROR, MEMORY):
            said = line['detail'] or f'found {figures_of(line)}; bound: {line["bound"]}'
            parts += [f'**{line["job"]}: {line["check"]}** — {line["status"]}', '', '```', said, '```', '']
    out = [f'- {line["job"]}: {line["check"]}: {line["detail"]}' for line in lines if line['status'] == LEFT_OUT]
    return parts + out + [''] * bool(out)


def page(found: dict[str, Any]) -> str:
    "The whole page."
    lines, parts = found['results'], head(found)
    counts = {
        status: sum(line['status'] == status for line in lines)
        for status in dict.fromkeys(line['status'] for line in lines)
    }
    parts += [
        f'{found["made"]}, {found["seconds"]:.0f} s: ' + ', '.join(f'{n} {s}' for s, n in counts.items()) + '.',
        '',
    ]
    parts += [f'- {name} is not installed: {what}' for name, what in found['missing'].items()] + ['']
    if said := troubles(lines):
        parts += ['## What failed or was left out', '', *said]
    parts += section('Agreement with the official code', lines, 'parity')
    parts += section('Attention kernels against the plain one', lines, 'attention')
    if steps := found['training']:
        parts += ['## Training steps', '', table(list(steps[0]), [list(row.values()) for row in steps])]
        parts += ['MFU: FLOPs that the model needs (`planning.plan`, recomputed layers not counted) ÷ time ÷ rate.', '']
    parts += section('A compiled step', lines, 'compile') + section('The loader alone', lines, 'loader')
    for line in (line for line in lines if line['job'] == 'device' and line['figures']):
        rows = [[name, shown(v) + f' {unit}' * bool(unit)] for name, (v, unit) in line['figures'].items()]
        parts += [f'## Device: {line["check"]}', '', table(['', ''], rows)]
    return '\n'.join(parts)
