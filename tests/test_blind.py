"""What benchmarks give without pictures, and rows that have learnt no more."""

import pytest

from mllm_replica.core.metrics import exact_match, word_accuracy
from mllm_replica.core.recipe import Source
from mllm_replica.core.registry import PAPERS, recipes_of
from mllm_replica.data.worlds import pictures
from mllm_replica.data.worlds.making import samples
from mllm_replica.data.worlds.table import WORLDS
from mllm_replica.scoring.unseen import WAYS, Guesser, Turn, apart, turns_of
from mllm_replica.tables import blinding
from mllm_replica.tables.blind import NAME, blind_line, learnt, read_blind
from mllm_replica.core.settings import CONFIRMING
from mllm_replica.tables.blinding import blind_lines, write_blind
from mllm_replica.tables.plain import as_json
from mllm_replica.tables.published import Claim, Column, Replication, Scope, Table, load_table, tables_of
from mllm_replica.tables.report import table_frame
from mllm_replica.tables.results import read_results, results_path
from mllm_replica.tables.verdicts import verdict

REPLICATED = [(p, t) for p in PAPERS for t in tables_of(p) if results_path(p, t, 'tiny').is_file()]


def cells(paper, table, scale):
    "Row and column of all that can be measured."
    running = [row for row, reason in recipes_of(paper).rows(table, scale).items() if reason is None]
    measured = load_table(paper, table).measured(scale)
    return [(row, c) for row in running for c in (measured.columns if measured else [])]


@pytest.mark.parametrize('paper', PAPERS)
def test_every_cell_has_a_number_or_a_reason(paper):
    lines = read_blind(paper)
    wanted = [
        (t, s, row, c.key) for t in tables_of(paper) for s in CONFIRMING for row, c in cells(paper, t, s)
    ]  # in the order of the file
    assert list(lines) == wanted
    assert all(line.how and line.commit and (line.value is None or 0 <= line.value < 1) for line in lines.values())


@pytest.mark.parametrize('paper, table', REPLICATED)
def test_a_line_says_by_how_many_questions_and_seeds_and_only_scores_have_one(paper, table):
    seeds = ' '.join(map(str, sorted({r.seed for r in read_results(paper, table, 'tiny')})))
    for row, column in cells(paper, table, 'tiny'):
        line = read_blind(paper)[table, 'tiny', row, column.key]
        if line.value is None:
            assert line.questions is None and not line.seeds
        else:
            assert line.questions >= 300 and line.seeds == seeds and column.max == 1 and not column.counted


@pytest.mark.parametrize('paper, table', REPLICATED)
def test_means_that_chapters_measure_are_those_of_the_parts_that_their_columns_name(paper, table):
    records = {(r.row, r.seed, r.metric): r.value for r in read_results(paper, table, 'tiny')}
    named = {c.key: c.blind_parts for c in load_table(paper, table).measured('tiny').columns if c.blind_parts}
    for (row, seed, metric), value in records.items():
        if parts := named.get(metric):
            mean = sum(factor * records[row, seed, part] for part, factor in parts.items()) / len(parts)
            assert value == pytest.approx(mean, abs=1e-12), (row, seed, metric)


def test_the_lines_of_known_benchmarks():
    assert blind_line('honeybee', '3', 'tiny', 'cabs_144', 'easy_vqa') == pytest.approx(0.67, abs=0.015)
    assert blind_line('honeybee', '3', 'tiny', 'cabs_144', 'control') == pytest.approx(1 / 2, abs=0.03)
    assert blind_line('owl3', 'fig4', 'tiny', 'owl3', 'control') == pytest.approx(1 / 4, abs=0.03)  # the listed ones
    assert blind_line('eagle', '2', 'tiny', 'clip448_unfrozen', 'place') == pytest.approx(1 / 3, abs=0.02)
    for paper, table, row, column in (
        ('mm1', '1', 'clip_h_336_dfn_5b', 'fact'),
        ('owl2', '5', 'mam_both', 'text_item'),
        ('honeybee', '3', 'cabs_144', 'gflop_step'),
        ('owl3', '8', 'hyper', 'drop'),
        ('eagle', '2', 'no such row', 'place'),
    ):
        assert blind_line(paper, table, 'tiny', row, column) is None


def test_a_sample_measured_again_is_equal():
    for line in blind_lines('owl2', '6', 'tiny', ['frozen']):
        kept = read_blind('owl2')['6', 'tiny', 'frozen', line.column]
        assert line == kept.model_copy(update={'commit': ''})


@pytest.mark.nightly
@pytest.mark.parametrize('paper', PAPERS)
def test_everything_measured_again_is_equal(paper):
    found = [line for t in tables_of(paper) for scale in CONFIRMING for line in blind_lines(paper, t, scale)]
    assert found == [line.model_copy(update={'commit': ''}) for line in read_blind(paper).values()]


def test_the_same_lines_keep_their_commit_and_others_get_the_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(blinding, 'blind_path', lambda paper: tmp_path / 'blind.csv')
    monkeypatch.setattr(blinding, 'tables_of', lambda paper: ['8'])
    monkeypatch.setattr(blinding, 'read_results', lambda *given: [])  # one seed
    old = [line.model_copy(update={'commit': 'old'}) for line in blind_lines('owl2', '8', 'tiny', ['r224'])]
    old[1] = old[1].model_copy(update={'value': 0.9})
    known = {(line.table, line.scale, line.row, line.column): line for line in old}
    monkeypatch.setattr(blinding, 'read_blind', lambda paper: known)
    written = [write_blind('owl2', commit).read_bytes() for commit in ('new', 'new')]
    assert written[0] == written[1]
    ends = [line.rpartition(',')[2] for line in written[0].decode().splitlines()]
    assert ends[:3] == ['commit', 'old', 'new']


@pytest.mark.parametrize('name', WORLDS)
def test_worlds_are_asked_what_their_samples_ask(name, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, 'place_of', lambda part: tmp_path / part)
    pictures.draw_letters(tmp_path)
    options = dict(tasks=['ground', 'sign'] if name == 'pages' else list(WORLDS[name].tasks)[:2])
    said = [s for sample in samples(name, 'test', 7, 5, **options) for s in sample['conversations']]
    found = turns_of(Source(kind='world', name=name, split='test', size=5, options=options), 7)
    if not any(turn.task == 'document' for turn in found):
        bare = [turn['value'].rpartition('\n')[2] for turn in said]
        assert [text for turn in found for text in turn[:2]] == bare


def test_a_wording_that_gives_the_answer_away_is_found():
    turns = [Turn(f'is it {word}', answer, 't') for word, answer in zip('abcd', 'yyny') for _ in range(9)]
    guesser = Guesser(turns, exact_match)
    assert guesser.points(turns, 'question') == 1 and guesser.points(turns, 'task') == 0.75
    assert guesser.guess(Turn('is it c', '', 't', ('y', 'z')), 'question') == 'y'  # what is possible
    assert guesser.guess(Turn('what else', '', 'u', ('p', 'q')), 'question') == 'p'  # nothing like it was seen
    held = apart(turns, [Turn('never seen', '', 't')])[1]
    assert len(held) == -(-len(turns) // 5)


def test_the_answers_of_the_test_are_not_looked_at():
    turns = [Turn(f'of {a} {b} the first', a, 't', (a, b)) for a in 'pqrs' for b in 'pqrs' if a != b]
    for way in WAYS:
        guesser = Guesser(turns[::2], exact_match)
        hidden = [turn._replace(answer='?') for turn in turns]
        assert [guesser.guess(turn, way) for turn in turns] == [guesser.guess(turn, way) for turn in hidden]
    assert apart(turns, turns) == apart(turns, hidden)


def test_lists_are_answered_word_by_word():
    turns = [Turn('name', answer, 't') for answer in ('a x z', 'a y z', 'b x q', 'c x z')]
    assert Guesser(turns, word_accuracy).guess(turns[0], 'question') == 'a x z'


TABLE = Table(
    key='1',
    paper='owl2',
    table='1',
    arxiv='x',
    title='t',
    source='s',
    status='complete',
    columns=[Column(key='score', name='Score', better='higher'), Column(key='s', name='s per step')],
    rows=[dict(key=k, label=k, params={}, values=dict(score=None, s=None)) for k in 'abcd'],
    replication={
        'tiny': Replication(
            columns=[Column(key='own', name='own'), Column(key='cost', name='own cost', counted=True)],
            stands_for={'score': 'own', 's': 'cost'},
        )
    },
)


def judged(test, line=0.25, **rows):
    "Verdict on rows' scores; the cost of every row is its mean."
    runs = {
        row: {'own': dict(enumerate(values)), 'cost': dict.fromkeys(range(3), sum(values))}
        for row, values in rows.items()
    }
    claim = Claim(id='c', statement='s', test=test, scales={'tiny': Scope(testable=True, note='A note.')})
    blind = {'own': line}
    return verdict(claim, TABLE, 'tiny', runs, blind=lambda paper, table, scale, row, column: blind.get(column))


HIGH, LOW, FAIR, DULL = [0.9, 0.91, 0.92], [0.5, 0.51, 0.52], [0.36, 0.37, 0.38], [0.25, 0.26, 0.27]


@pytest.mark.parametrize(
    'test, rows, word, note',
    [
        ('a.score > b.score', dict(a=HIGH, b=LOW), 'supported', ''),
        ('a.score > b.score', dict(a=HIGH, b=FAIR), 'supported', ''),
        ('a.score > b.score', dict(a=HIGH, b=DULL), 'inconclusive', 'b'),
        ('a.score > b.score', dict(a=DULL, b=HIGH), 'inconclusive', 'a'),
        ('a.score > b.score and a.score > c.score', dict(a=HIGH, b=LOW, c=DULL), 'inconclusive', 'c'),
        ('a.score > b.score and a.score > c.score', dict(a=LOW, b=HIGH, c=DULL), 'contradicted', 'c'),
        ('a.score > max(b.score, c.score, d.score)', dict(a=HIGH, b=DULL, c=LOW, d=DULL), 'inconclusive', 'b, d'),
        ('a.score - b.score > 2 * (c.score - b.score)', dict(a=HIGH, b=DULL, c=LOW), 'inconclusive', 'b'),
        ('a.score >= b.score - 0.05', dict(a=DULL, b=DULL), 'inconclusive', 'a, b'),
        ('a.s > b.s', dict(a=HIGH, b=DULL), 'counted', ''),
        ('a.score > c.score and a.s > b.s', dict(a=HIGH, b=DULL, c=LOW), 'supported', ''),
        ('a.score > b.score and a.s < b.s', dict(a=HIGH, b=DULL), 'contradicted', 'b'),
        ('a.score > d.score', dict(a=DULL), 'not run', 'a'),
    ],
)
def test_what_has_not_learnt_neither_wins_nor_loses(test, rows, word, note):
    found = judged(test, **rows)
    assert (found.word, found.note) == (word, f'not learnt: {note}. A note.' if note else 'A note.')
    assert not note or word == 'contradicted' or found.chance in (None, 1.0) or found.chance > 0.05


def test_without_a_line_nothing_changes():
    for rows in dict(a=HIGH, b=DULL), dict(a=DULL, b=HIGH):
        alike = judged('a.score > b.score', line=None, **rows)
        assert alike.word in ('supported', 'contradicted') and alike.note == 'A note.' and alike.chance < 0.05


@pytest.mark.parametrize('mean, word', [(0.349, False), (0.35, True), (0.351, True)])
def test_a_tenth_above_is_learnt(mean, word):
    assert learnt([mean - 0.1, mean + 0.1], 0.25) is word


def test_reports_show_the_line_and_who_is_below(monkeypatch):
    monkeypatch.setattr('mllm_replica.tables.plain.tables_of', lambda paper: ['9'])
    frame = table_frame('honeybee', '9', 'tiny')
    found = as_json('honeybee')['honeybee']['tables']['9']['replicated']['tiny']['cells']
    assert list(frame.index).count(NAME) == 1 and frame.index[-1] == NAME
    assert float(frame.loc[NAME, ('replicated at tiny', 'spatial mean')]) == pytest.approx(
        found['resampler']['spatial']['blind'], abs=5e-4
    )
    shown = [cell.endswith('not learnt') for cell in frame['replicated at tiny', 'spatial mean']][:-1]
    assert shown == [not found[row.key]['spatial']['learnt'] for row in load_table('honeybee', '9').rows]
    assert frame.loc[NAME, ('replicated at tiny', 'GFLOP per step')] == '–'
