"""The official scorers give the recorded official results, and keep their quirks on random answers."""

import json, random
from pathlib import Path

import pytest

from mllm_replica.scoring import official_scorers as b

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'honeybee' / 'scorers.json').read_text())


def test_mme():
    expected = GOLDEN['mme']['output']
    found = b.mme(GOLDEN['mme']['input'])
    for half in ('Perception', 'Cognition'):
        assert list(found[half]) == list(expected[half])
        for task, numbers in expected[half].items():
            assert found[half][task] == pytest.approx(numbers, abs=1e-9), task
    assert found['Total'] == pytest.approx(expected['Total'], abs=1e-9)


def test_pope():
    case = GOLDEN['pope']
    assert b.pope(case['preds'], case['labels']) == pytest.approx(case['output'], abs=1e-15)


def test_seed():
    found = b.seed(GOLDEN['seed']['input'])
    assert found == GOLDEN['seed']['output'] and list(found) == list(GOLDEN['seed']['output'])


def test_mmbench():
    assert b.mmbench(GOLDEN['mmb']['input']) == GOLDEN['mmb']['output']


def test_scienceqa():
    case = GOLDEN['sqa_score']
    assert b.scienceqa(case['problems'], case['preds']) == case['output']


@pytest.mark.parametrize('case', GOLDEN['infer'], ids=lambda c: c['answer'])
def test_infer(case):
    assert (b.infer(case['answer'], case['choices']) or False) == case['result']


@pytest.mark.parametrize('case', GOLDEN['mmmu_open'], ids=lambda c: c['response'])
def test_mmmu_open(case):
    parsed = b.mmmu_parse(case['response'])
    assert set(parsed) == set(case['parsed']) and len(parsed) == len(case['parsed'])
    assert b.mmmu_open(case['gold'], parsed) == case['correct']


def test_the_mmbench_draw_depends_on_the_order_of_questions_only():
    "Unreadable answers use one random stream, seeded once: the same results give the same score, whatever was drawn before."
    unreadable = [row | {'pred': '?'} for row in GOLDEN['mmb']['input']]
    random.seed(1)
    first = b.mmbench(unreadable)
    random.seed(2)
    second = b.mmbench(unreadable)
    assert first == second and first['total_corrects'] < first['total_samples']


def test_scores_do_not_depend_on_the_order_of_rows():
    rows = GOLDEN['seed']['input'][:]
    random.Random(0).shuffle(rows)
    assert b.seed(rows) == b.seed(GOLDEN['seed']['input'])


def test_scienceqa_reads_the_last_option_and_draws_the_rest():
    problems = {str(i): dict(choices=['north', 'south', 'east'], answer=2) for i in range(300)}

    def says(text):
        return b.scienceqa(problems, [dict(question_id=k, pred=text, image_path=None) for k in problems])['acc']

    assert says('north, then east.') == 100 and says('(C).') == 100 and says('A') == 0
    assert 20 < says('nothing of that') < 47 and 20 < says('E') < 47  # E is no option here


def test_mmmu_numbers():
    assert b.mmmu_parse('The total is 1,234 or -2e3 or .5')[:3] == ['1,234 or -2e3 or .5', 1234.0, -2000.0]
    assert b.mmmu_open('3.14159', b.mmmu_parse('pi is 3.14'))
    assert not b.mmmu_open('3.2', b.mmmu_parse('pi is 3.14'))


def test_mmmu_tails():
    assert b.mmmu_parse('so it is \nthe answer is 7') == [7.0]  # an empty tail hides its line
    assert b.mmmu_parse('x = 3\ny = 4') == [4.0]  # '=' counts in the last line only
    assert b.mmmu_parse('Red. Blue is right') == ['right']  # after lower-casing no full stop ends a sentence
