"""Metrics on random answers: bounds and symmetries; the bootstrap interval covers as often as it says."""

import random

import numpy as np
import pytest

from mllm_replica.core.metrics import METRICS, bootstrap, metric, token_f1, vqa_accuracy, yes_no

WORDS = 'red blue yes no a b dog 7 ? .'.split()


@pytest.mark.parametrize('name', METRICS)
def test_bounds_and_the_answer_itself(name):
    rng, answers = (
        random.Random(0),
        {'yes_no': ['yes', 'no'], 'letter': ['A', 'b']}.get(name, ['red dog', 'b 7', 'yes']),
    )
    assert metric(name).__doc__ and '\n' not in metric(name).__doc__
    for answer in answers:
        assert metric(name)(f'  {answer.upper()} ', answer) == 1
        for _ in range(100):
            assert 0 <= metric(name)(' '.join(rng.choices(WORDS, k=rng.randrange(5))), answer) <= 1


def test_token_f1_is_symmetric():
    rng = random.Random(1)
    for _ in range(100):
        a, b = (' '.join(rng.choices(WORDS, k=rng.randrange(6))) for _ in range(2))
        assert token_f1(a, b) == token_f1(b, a)


def test_vqa_accuracy_equals_its_definition():
    rng = random.Random(2)
    for _ in range(50):
        people = rng.choices(['red', 'blue', 'green'], k=10)
        subsets = [people[:i] + people[i + 1 :] for i in range(10)]
        assert vqa_accuracy('red', people) == pytest.approx(np.mean([min(1, s.count('red') / 3) for s in subsets]))


def test_one_person_and_one_text_are_the_same():
    assert vqa_accuracy('red', ['red']) == vqa_accuracy('red', 'red') == 1


def test_yes_no_takes_whole_words():
    assert yes_no('Nobody knows', 'no') == 0 and yes_no('eyes: yes', 'yes') == 1


def test_bootstrap_covers_the_true_mean():
    "Over 200 data sets of 50 coin tosses the 95 % interval holds the true mean in 90 to 98 % of the cases."
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        low, high = bootstrap(rng.random(50) < 0.7, n=300, seed=i)
        inside += low <= 0.7 <= high
    assert 180 <= inside <= 196


def test_clusters_of_one_change_nothing_and_big_clusters_widen():
    values = (np.random.default_rng(3).random(120) < 0.5).astype(float)
    assert bootstrap(values, clusters=range(120)) == bootstrap(values)
    same = np.repeat([0.0, 1.0], 60)
    assert np.diff(bootstrap(same, clusters=[i // 20 for i in range(120)])) > 2 * np.diff(bootstrap(same))
