"""MM1's learning-rate law against every worked number, and its intervals against an independent computation."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from mllm_replica.mm1.law import PUBLISHED, fit_law, optimal_rate, weight_decay
from mllm_replica.mm1.presets import published_stages
from mllm_replica.training.optimiser import lr_at

LAW = yaml.safe_load((Path(__file__).parent / 'golden' / 'mm1' / 'lr_law.yaml').read_text())


def near(value):
    return pytest.approx(value, rel=1e-8)  # the file has nine digits


def test_published_law():
    assert PUBLISHED == (LAW['law']['slope'], LAW['law']['intercept'])
    for row in LAW['evaluate']:
        assert PUBLISHED.rate(row['N']) == near(row['lr']) and weight_decay(PUBLISHED.rate(row['N'])) == near(
            row['weight_decay']
        )
    for factor in (2, 10):
        assert PUBLISHED.rate(7e7 * factor) / PUBLISHED.rate(7e7) == near(LAW['scaling_identity'][f'r{factor}'])


def test_fit_and_predictions():
    example = LAW['fit_example']
    fit = fit_law(example['N'], example['lr'])
    assert fit.law.slope == near(example['slope']) and fit.law.intercept == near(example['intercept'])
    for row in example['predict']:
        assert fit.predict(row['N'])[0] == near(row['lr'])


def test_intervals():
    rng = np.random.default_rng(0)
    sizes = np.array([6e3, 25e3, 98e3, 393e3, 1.5e6])
    rates = np.exp(-0.4 * np.log(sizes) + 0.3 + 0.2 * rng.standard_normal(5))
    fit, reference = fit_law(sizes, rates), stats.linregress(np.log(sizes), np.log(rates))
    half = stats.t.ppf(0.975, 3) * reference.stderr
    assert fit.slope_interval == pytest.approx((reference.slope - half, reference.slope + half))
    x = np.stack([np.ones(5), np.log(sizes)], 1)
    new = np.array([1, math.log(6e6)])
    error = np.log(rates) - x @ [reference.intercept, reference.slope]
    half = stats.t.ppf(0.975, 3) * math.sqrt(error @ error / 3 * (1 + new @ np.linalg.inv(x.T @ x) @ new))
    rate, low, high = fit.predict(6e6)
    assert (math.log(low), math.log(high)) == pytest.approx((math.log(rate) - half, math.log(rate) + half))


def test_schedule():
    "After the warm-up, which here begins at the floor, not at zero."
    settings, stage = LAW['schedule'], published_stages('mm1-3b')[0]
    peak, floor = settings['peak'], settings['peak'] * settings['floor_ratio']
    assert (stage.lr, stage.min_lr, stage.warmup_steps, stage.steps) == (
        peak,
        pytest.approx(floor),
        settings['warmup'],
        settings['total'],
    )
    later = [point for point in settings['points'] if point['step'] >= settings['warmup']]
    assert len(later) > 2
    for point in later:
        assert lr_at(point['step'], peak, floor, settings['warmup'], settings['total']) == near(point['lr'])


@pytest.mark.parametrize('best', [3e-4, 7e-4, 1.1e-3])
def test_optimum_lies_between_grid_points(best):
    grid = [1e-4 * 2**i for i in range(6)]
    assert optimal_rate(grid, [2 + 0.3 * math.log(lr / best) ** 2 for lr in grid]) == pytest.approx(best)


def test_refusals():
    with pytest.raises(ValueError, match='edge of the grid, at 0.0001'):
        optimal_rate([1e-4, 2e-4, 4e-4], [1, 2, 3])
    assert optimal_rate([1e-4, 2e-4, 4e-4], [2, 1, math.inf]) == 2e-4  # the neighbour diverged
    with pytest.raises(ValueError, match='positive rate'):
        fit_law([1e6, 2e6, 3e6], [1e-3, 0, 1e-4])
    with pytest.raises(ValueError, match='of different sizes'):
        fit_law([1e6] * 3, [1e-3] * 3)
    with pytest.raises(ValueError, match='positive rate for each'):
        fit_law([1e6, 2e6, 4e6], [1e-3] * 2)
