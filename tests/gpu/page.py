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
        return [f'# GPU check on {on}', '']
    return [
        '**Run on a CPU, with shapes of a few numbers: this shows that the script runs. No figure here is of a GPU.**',
        '',
        '# GPU check, not run on a GPU',
        '',
    ]


def figures_of(lines: list[Line]) -> str:
    "Checks with all their figures, one to a row."
    rows = []
    for line in lines:
        told = ', '.join(f'{name} {shown(v)} {unit}'.strip() for name, (v, unit) in line['figures'].items())
        rows.append([line['check'], line['status'], told, line['bound']])
    return table(['check', 'status', 'figures', 'bound'], rows)


def columns_of(lines: list[Line]) -> str:
    "Checks whose figures have the same names, one to a column."
    names = list(dict.fromkeys(name for line in lines for name in line['figures']))
    units = {name: unit for line in lines for name, (_, unit) in line['figures'].items()}
    heads = [name + f', {units[name]}' * bool(units[name]) for name in names]
    rows = [[line['check'], line['status'], *(value(line, name) for name in names)] for line in lines]
    bounds = sorted({line['bound'] for line in lines if line['bound']})
    return table(['check', 'status', *heads], rows) + ''.join(f'\nBound: {bound}.\n' for bound in bounds)


def troubles(lines: list[Line]) -> list[str]:
    "What failed, and what was left out, with its last lines."
    parts = []
    for line in lines:
        if line['status'] in (FAIL, ERROR, MEMORY):
            parts += [f'**{line["job"]}: {line["check"]}** — {line["status"]}', '', '```', line['detail'], '```', '']
    out = [f'- {line["job"]}: {line["check"]}: {line["detail"]}' for line in lines if line['status'] == LEFT_OUT]
    return parts + out + [''] * bool(out)


def page(found: dict[str, Any]) -> str:
    "The whole page."
    lines, parts = found['results'], head(found)
    counts = {status: sum(line['status'] == status for line in lines) for status in dict.fromkeys(l['status'] for l in lines)}
    parts += [f'{found["made"]}, {found["seconds"]:.0f} s: ' + ', '.join(f'{n} {s}' for s, n in counts.items()) + '.', '']
    if found['missing']:
        parts += [f'Not installed here: {", ".join(found["missing"])}.', '']
    if said := troubles(lines):
        parts += ['## What failed or was left out', '', *said]
    sections = {
        'Agreement with the official code': [l for l in lines if l['job'] == 'parity'],
        'Attention kernels against the plain one': [l for l in lines if l['job'] == 'attention'],
    }
    for title, those in sections.items():
        if those:
            parts += [f'## {title}', '', columns_of(those)]
    if steps := found['training']:
        parts += ['## Training steps', '', table(list(steps[0]), [list(row.values()) for row in steps])]
        parts += ['MFU: FLOPs that the model needs (`planning.plan`, recomputed layers not counted) ÷ time ÷ rate.', '']
    for job, title in (('compile', 'A compiled step'), ('loader', 'The loader alone')):
        if those := [l for l in lines if l['job'] == job]:
            parts += [f'## {title}', '', columns_of(those)]
    if those := [l for l in lines if l['job'] == 'device']:
        parts += ['## What it ran on', '', figures_of(those)]
    return '\n'.join(parts)
