"""The language of claims: closed, faithful to the papers' own numbers; verdicts: sound."""

import ast
import inspect
import random

import pytest
from scipy.special import stdtr

from mllm_replica.core.registry import PAPERS
from mllm_replica.tables import claims
from mllm_replica.tables.claims import ClaimError, comparisons, holds, parse
from mllm_replica.tables.published import Claim, Column, Reading, Replication, Scope, Table, load_table, tables_of
from mllm_replica.tables.verdicts import Interval, cell_verdict, interval, verdict

ALL = [(paper, key) for paper in PAPERS for key in tables_of(paper)]


def table_of(rows: dict, better='higher') -> Table:
    return Table(
        key='1',
        paper='owl2',
        table='1',
        arxiv='x',
        title='t',
        source='s',
        status='complete',
        columns=[Column(key='score', name='Score', better=better)],
        rows=[dict(key=k, label=k, params=dict(kind=k[0]), values=dict(score=v)) for k, v in rows.items()],
    )


def judged(test, samples, better='higher', scale='paper'):
    table = table_of({r: None for r in 'abcd'}, better)
    claim = Claim(id='c', statement='s', test=test, scales={'tiny': Scope(testable=True)})
    return verdict(claim, table, scale, {row: {'score': dict(enumerate(values))} for row, values in samples.items()})


def test_recorded_truths_are_the_evaluated_ones():
    wrong = []
    for paper, key in ALL:
        table = load_table(paper, key)
        for claim in table.claims:
            if claim.test is not None and holds(claim.test, table) is not claim.holds_on_published_numbers:
                wrong.append(f'{paper} {key} {claim.id}')
            restated = [scope.test for scope in claim.scales.values() if scope.test]
            wrong += [f'{paper} {key} {claim.id}: {test}' for test in restated if not comparisons(parse(test), table)]
    assert not wrong, '\n'.join(wrong)


def test_papers_that_contradict_themselves_are_recorded():
    false = {(p, k, c.id) for p, k in ALL for c in load_table(p, k).claims if c.holds_on_published_numbers is False}
    assert false == {
        ('mm1', 'fig4', 'type-little'),
        ('owl3', '4', 'mmvet-sota-text-claim'),
        ('owl3', '7', 'open-best-tr'),
    }


def test_an_altered_cell_is_noticed():
    table = load_table('honeybee', '3')
    rows = [r.model_dump() for r in table.rows]
    next(r for r in rows if r['key'] == 'cabs_144')['values']['avg_n'] = 40.0
    spoilt = Table(**{**table.model_dump(), 'rows': rows})
    assert [holds(c.test, spoilt) for c in spoilt.claims] == [False, True, False, True]


def judged_at_tiny(table):
    "Every claim of a table with the verdict on random results of all rows, and with those of the further readings."
    rng, measured = random.Random(0), table.measured('tiny')
    samples = {
        row.key: {c.key: {seed: rng.random() for seed in range(3)} for c in measured.columns} for row in table.rows
    }
    for claim in table.claims:
        again = {reading: verdict(claim, table, 'tiny', samples, reading=reading) for reading in measured.also}
        yield claim, verdict(claim, table, 'tiny', samples), again


def faults(table):
    "Claims that are not judged as their scope says, or by a column of the paper that we do not measure."
    printed = {c.key for c in table.columns} - {c.key for c in table.measured('tiny').columns}
    for claim, found, again in judged_at_tiny(table):
        testable = claim.scope('tiny').testable
        for reading, other in again.items():
            if (other.word == 'not testable at this scale') is testable:
                yield claim.id, reading, other.note
        if testable and found.word not in ('supported', 'counted', 'contradicted', 'inconclusive'):
            yield claim.id, found.word, found.note
        if not testable and not (found.word == 'not testable at this scale' and found.note):
            yield claim.id, found.word, found.note
        read = [e.text for e in found.evidence if any(f'.{column}' in e.text.split('.')[-1] for column in printed)]
        yield from ((claim.id, 'reads', text) for text in read)


def test_every_testable_claim_is_judged_once_all_rows_are_run():
    measured = [table for table in (load_table(*names) for names in ALL) if table.replication]
    assert measured and not [(table.paper, table.key, *fault) for table in measured for fault in faults(table)]


@pytest.mark.parametrize(
    'text',
    [
        '__import__("os").system("true") == 0',
        'open("x") == 1',
        'a.score.__class__ == 1',
        'a.__dict__ == 1',
        'eval("1") == 1',
        '(lambda: 1)() == 1',
        '9**9**9 > 1',
        '[x for x in rows] == 1',
        'a.score if 1 else 2',
        'a.score > 1 or a.score < 2',
        'not a.score > 1',
        'values["a"].score > 1',
        'a[0].score > 1',
        '(y := 3) > 1',
        'f"{a}" == 1',
        'a.score',
        '1',
        'max(a.score)',
        'a.score > b.score, 1',
        '*a',
        'a.score > 1; b',
        '',
        '(' * 300 + '1' + ')' * 300 + ' > 0',
        'a.score != 1',
        'a.score is 1',
        'True > False and None == 1',
        'rows.score > 1',
        'abs(a.score, b.score) > 1',
        'sum() > 1',
        'better(a.score, b.score, margin=1)',
        'better(a.score, b.score, b.score)',
        'better_everywhere(a, b, by=1)',
        'better_everywhere(a, 1)',
        'a > 1',
        '"x" > 1',
        '(a.score > 1) + 1 > 1',
        'a.score / 0 > 1 and where(kind > 1).score > 1',
        "monotone([a, b], score, 'upwards')",
        'mean(x=1) > 1',
    ],
)
def test_what_is_not_in_the_language_is_refused(text):
    with pytest.raises(ClaimError):
        comparisons(parse(text), table_of(dict(a=1, b=2)))


def test_nothing_is_evaluated_as_code():
    calls = {
        n.func.id
        for n in ast.walk(ast.parse(inspect.getsource(claims)))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    assert not calls & {'eval', 'exec', 'compile', '__import__', 'getattr'}


@pytest.mark.parametrize(
    'text, expected',
    [
        ('1 < 2 < 3', True),
        ('a.score == 1 and b.score >= 2', True),
        ('values[a].score < values[b].score', True),
        ('sum(rows.score) == 10', True),
        ('mean([a, d].score) == 2.5', True),
        ('median([a, b, d].score) == 2', True),
        ("max(where(kind == 'c').score) == 3", True),
        ('abs(a.score - b.score) < 1', False),
        ('abs(a.score - b.score) <= 1', True),
        ('a.score > min(b.score, c.score)', False),
        ('d.score > max(rows.score)', False),
        ("monotone([a, b, c], score, 'increasing')", True),
        ("monotone([c, a], score, 'increasing')", False),
        ("monotone([c, b, a], score, 'decreasing')", True),
        ('better(b.score, a.score)', True),
        ('better(b.score, a.score, by=1)', False),
        ('no_worse(a.score, b.score, by=1)', True),
        ('no_worse(a.score, c.score, by=1)', False),
        ('better_everywhere(b, a)', True),
        ('round(exp(log(2)), 6) == 2', True),
        ('-a.score * 2 + b.score / 2 == -1', True),
        ('0.1 + 0.2 == 0.3', True),
        ('a.score > 1', False),
        ('a.score > 0.1 + 0.9', False),
    ],
)
def test_language(text, expected):
    assert holds(text, table_of(dict(a=1, b=2, c=3, d=4))) is expected


def test_lower_is_better_turns_the_direction():
    table = table_of(dict(a=1, b=2), better='lower')
    assert holds('better(a.score, b.score)', table) and holds('better_everywhere(a, b)', table)
    assert not holds('no_worse(b.score, a.score, by=0.5)', table)


def test_missing_cells_are_not_a_verdict_on_the_paper():
    table = table_of(dict(a=1, b=None, c=3))
    assert (
        holds('a.score < b.score', table) is None and holds('a.score < b.score and a.score > c.score', table) is False
    )
    assert holds('sum(rows.score) > 0', table) is None and holds('better_everywhere(c, a)', table) is True


def test_interval_covers_the_truth():
    rng = random.Random(1)
    inside = sum(
        low <= 3 <= high for _, low, high, _ in (interval([rng.gauss(3, 2) for _ in range(5)]) for _ in range(4000))
    )
    assert 0.94 < inside / 4000 < 0.96


@pytest.mark.parametrize(
    'test, samples, word',
    [
        ('a.score > b.score', dict(a=[3, 3.1], b=[1, 1.1]), 'supported'),
        ('a.score > b.score', dict(a=[1, 1.1], b=[3, 3.1]), 'contradicted'),
        ('a.score > b.score', dict(a=[1, 3], b=[2, 2]), 'inconclusive'),
        ('a.score > b.score', dict(a=[3], b=[1]), 'inconclusive'),
        ('a.score > b.score', dict(a=[3, 3]), 'not run'),
        ('a.score > b.score', dict(a=[1, 1], b=[1, 1]), 'inconclusive'),
        ('a.score >= b.score', dict(a=[1, 1], b=[1, 1]), 'supported'),
        ('a.score < b.score', dict(a=[5, 5], b=[6, 6]), 'supported'),
        ('a.score == b.score', dict(a=[5, 5], b=[5, 5]), 'supported'),
        ('a.score == b.score', dict(a=[5, 5], b=[6, 6]), 'contradicted'),
        ('a.score > b.score + 1', dict(a=[3, 3.1, 3], b=[2.5, 2.6, 2.5]), 'contradicted'),
        ('abs(a.score - b.score) < 1', dict(a=[3, 3.1, 3], b=[2.5, 2.7, 2.6]), 'supported'),
        ('abs(a.score - b.score) < 1', dict(a=[3, 3.1, 3], b=[6, 6.2, 6.1]), 'contradicted'),
        ('abs(a.score - b.score) < 1', dict(a=[3, 3.1, 3], b=[1.9, 2.2, 2.1]), 'inconclusive'),
        ('no_worse(a.score, b.score, by=1)', dict(a=[2.5, 2.6, 2.5], b=[3, 3.1, 3]), 'supported'),
        ('a.score > b.score and c.score > b.score', dict(a=[1, 1.1], b=[3, 3.1]), 'contradicted'),
        ('a.score > b.score and c.score > b.score', dict(a=[4, 4.1], b=[3, 3.1]), 'not run'),
        ('c.score > max(a.score, b.score)', dict(a=[1, 1.1], b=[2, 3], c=[2.4, 2.6]), 'inconclusive'),
        ('a.score > b.score', dict(a=[1, 1.2, 0.9], b=[2, 1.7, 1.9]), 'contradicted'),  # p = 0.019 of one side
        ('a.score > max(b.score, c.score)', dict(a=[1, 1.2, 0.9], b=[2, 1.7, 1.9], c=[0, 0, 0.1]), 'inconclusive'),
        ('a.score > max(b.score, c.score)', dict(a=[1, 1.02, 0.9], b=[2, 2.04, 1.9], c=[0, 0, 0.1]), 'contradicted'),
        ('b.score > max(a.score, c.score)', dict(a=[1, 1.2, 0.9], b=[2, 1.7, 1.9], c=[0, 0, 0.1]), 'supported'),
    ],
)
def test_verdicts(test, samples, word):
    assert judged(test, samples).word == word


def test_a_count_is_no_finding_over_seeds():
    columns = [Column(key='own', name='own'), Column(key='cost', name='cost', counted=True)]
    measured = Replication(columns=columns, stands_for={'score': 'own'})
    table = table_of(dict(a=None, b=None)).model_copy(update={'replication': {'tiny': measured}})

    def word(test, own, cost):
        samples = {row: {'own': dict(enumerate(own[row])), 'cost': dict(enumerate(cost[row]))} for row in 'ab'}
        claim = Claim(id='c', statement='s', test=test, scales={'tiny': Scope(testable=True)})
        found = verdict(claim, table, 'tiny', samples)
        return found.word, found.chance

    clear, less, more = dict(a=[3, 3.1, 3.2], b=[1, 1, 1]), dict(a=[5], b=[9]), dict(a=[9], b=[5])
    assert word('a.cost < b.cost', clear, less) == ('counted', None)
    assert word('a.cost < b.cost', clear, more) == ('contradicted', None)
    assert word('a.score > b.score and a.cost < b.cost', clear, less)[0] == 'supported'
    assert word('a.score > b.score and a.cost < b.cost', clear, more)[0] == 'contradicted'
    assert word('a.score > b.score', clear, less)[1] == pytest.approx(2 * stdtr(2, -2.1 / (0.1 / 3**0.5)))


def test_differences_are_paired_by_seed():
    shift = [0.0, 5.0, 10.0]
    found = judged('a.score > b.score', dict(a=[x + 1 for x in shift], b=[x + 0.1 * i for i, x in enumerate(shift)]))
    assert found.word == 'supported' and found.evidence[0].difference.mean == pytest.approx(0.9)
    table = table_of(dict(a=None, b=None))
    claim = Claim(id='c', statement='s', test='a.score > b.score', scales={'tiny': Scope(testable=True)})
    only = verdict(
        claim, table, 'paper', {'a': {'score': {1: 3.0, 2: 3.0, 3: 3.1}}, 'b': {'score': {3: 1.0, 4: 9.0, 2: 1.0}}}
    )
    assert only.evidence[0].difference.n == 2 and only.word == 'supported'
    assert (
        verdict(claim, table, 'paper', {'a': {'score': {1: 3.0, 2: 3.0}}, 'b': {'score': {3: 1.0, 4: 1.0}}}).word
        == 'inconclusive'
    )


def test_rarely_wrong_when_nothing_differs():
    rng = random.Random(2)
    words = [
        judged('a.score > b.score', {r: [rng.gauss(0, 1) for _ in range(5)] for r in 'ab'}).word for _ in range(600)
    ]
    assert words.count('supported') / 600 < 0.05 and words.count('contradicted') / 600 < 0.05


@pytest.mark.parametrize(
    'test, a',
    [
        ('a.score > b.score', [float('nan'), 1]),
        ('a.score > b.score', [float('inf'), -float('inf')]),
        ('log(a.score - b.score) > 0', [1, 1]),
        ('round(a.score, 1.5) > b.score', [3, 3]),
        ('1 / (a.score - b.score) > 0', [1, 2]),
    ],
)
def test_what_cannot_be_computed_decides_nothing(test, a):
    found = judged(test, dict(a=a, b=[1, 2]))
    assert (found.word, found.evidence[0].difference) == ('inconclusive', None)
    with pytest.raises(ValueError, match='not all finite'):
        interval([float('nan'), 1.0])


@pytest.mark.parametrize(
    'text', ['log(a.score - b.score) > 0', 'round(a.score, 1.5) > 0', 'a.score / 0 > 1', 'exp(1000) > 1']
)
def test_a_printed_number_that_cannot_be_computed_is_a_wrong_claim(text):
    with pytest.raises(ClaimError, match='cannot be computed'):
        holds(text, table_of(dict(a=1, b=2)))


def test_scales():
    assert judged('a.score > b.score', dict(a=[3, 3], b=[1, 1]), scale='smoke').word == 'not testable at this scale'
    assert (
        judged('a.score > b.score', dict(a=[3, 3], b=[1, 1]), scale='tiny').word == 'not run'
    )  # no recipe measures anything at tiny


def test_a_further_reading_asks_its_own_measurements():
    columns = [Column(key=k, name=k) for k in ('own', 'other', 'third')]
    measured = Replication(
        columns=columns, stands_for={'score': 'own'}, also={'again': Reading(stands_for={'score': 'other'})}
    )
    table = Table(**table_of(dict(a=None, b=None)).model_dump() | {'replication': {'tiny': measured.model_dump()}})

    def claim(**scope):
        return Claim(id='c', statement='s', test='a.score > b.score', scales={'tiny': Scope(testable=True, **scope)})

    samples = {
        'a': {'own': {0: 2.0, 1: 2.1}, 'other': {0: 1.0, 1: 1.1}},
        'b': {'own': {0: 1.0, 1: 1.1}, 'other': {0: 2.0, 1: 2.1}},
    }

    def judge(claim, reading):
        return verdict(claim, table, 'tiny', samples, reading=reading)

    assert [judge(claim(), reading).word for reading in (None, 'again')] == ['supported', 'contradicted']
    restated = claim(stands_for={'score': 'third'})
    assert [judge(restated, reading).evidence[0].text for reading in (None, 'again')] == [
        'a.third > b.third',
        'a.other > b.other',
    ]
    with pytest.raises(KeyError, match="no reading 'never'; there is again"):
        judge(claim(), 'never')


def test_rows_that_do_not_solve_the_control_are_not_compared():
    measured = Replication(
        columns=[Column(key=k, name=k) for k in ('own', 'easy')], stands_for={'score': 'own'}, control='easy'
    )
    table = Table(
        **table_of(dict(a=None, b=None, c=None)).model_dump() | {'replication': {'tiny': measured.model_dump()}}
    )

    def claim(test):
        return Claim(id='c', statement='s', test=test, scales={'tiny': Scope(testable=True, test=test, note='n')})

    def judge(easy, test='a.score > b.score'):
        samples = {
            'a': {'own': {0: 2.0, 1: 2.1}, 'easy': {0: 1.0, 1: 1.0}},
            'b': {'own': {0: 1.0, 1: 1.1}, 'easy': dict(enumerate(easy))},
        }
        return verdict(claim(test), table, 'tiny', samples)

    assert (judge([0.99, 0.97]).word, judge([0.99, 0.97]).note) == ('supported', 'n')
    assert (judge([]).word, judge([]).note) == (
        'inconclusive',
        'control not measured: rows b, else it were supported. n',
    )
    assert judge([0.99, 0.97], 'b.score > a.score and a.score > c.score').word == 'contradicted'  # c has not run
    failed = judge([1.0, 0.6])
    assert (
        failed.word == 'inconclusive'
        and failed.note == 'the control is not solved by b (0.80), else it were supported. n'
        and failed.evidence
    )
    assert judge([0.6, 0.59], 'a.easy > b.easy').word == 'supported'  # the control itself may be compared


def test_cells_of_another_table():
    table = load_table('eagle', '6')
    claim = next(c for c in table.claims if c.id == 'prealign-final-gain')
    here = {'eagle_x5_pa_13b': {c: {0: 99.0, 1: 99.0} for c in ('ocrbench', 'chartqa', 'pope', 'mmb')}}
    there = {'eagle_x5_13b': {c: {0: 50.0, 1: 50.0} for c in ('ocrbench', 'chartqa', 'pope', 'mmbench')}}
    assert verdict(claim, table, 'paper', here).word == 'not run'
    assert verdict(claim, table, 'paper', here, {'6_released': there}).word == 'supported'


@pytest.mark.parametrize(
    'published, ours, word',
    [
        (53.5, 53.5, 'match'),
        (53.5, 54.0, 'match'),
        (70.1, 69.6, 'match'),
        (53.5, 54.01, 'near'),
        (53.5, 52.0, 'near'),
        (53.5, 55.01, 'differs'),
        (54, 54.5, 'match'),
        (0, -0.5, 'match'),
        (None, 1.0, 'not run'),
        (True, 1.0, 'not run'),
        ('AdamW', 1.0, 'not run'),
    ],
)
def test_cell_verdict(published, ours, word):
    assert cell_verdict(0.5, published, Interval(ours, None, None, 1)) == word


def test_no_cell_verdict_without_a_tolerance_or_a_run():
    assert cell_verdict(None, 53.5, Interval(53.5, None, None, 1)) == 'not run' == cell_verdict(0.5, 53.5, None)


def test_counts_at_the_published_sizes_stand_in_place_of_ours():
    same = table_of({r: None for r in 'abcd'}).model_dump()
    table = Table(**same | dict(replication=dict(tiny=dict(columns=[]))))

    def judged(test, **counted):
        counts = {row: dict(flop=value) for row, value in counted.items()}
        scope = Scope(testable=True, stands_for=dict(score='flop'), counted=counts)
        claim = Claim(id='c', statement='s', test=test, scales={'tiny': scope})
        return verdict(claim, table, 'tiny', {'a': {'score': dict.fromkeys(range(10, 15), 0.0)}}).word

    assert judged('a.score > b.score', a=2, b=1) == 'counted'
    assert judged('a.score > b.score', a=1, b=2) == 'contradicted'
    assert judged('a.score > b.score and c.score > b.score', a=2, b=1) == 'not run'
