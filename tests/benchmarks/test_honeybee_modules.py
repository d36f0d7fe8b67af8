"Honeybee's projectors at paper scale: as fast as the official code was and near their own FLOPs."

from itertools import product

import pytest
from fullsize.honeybee import MODULES, build, step, work
from timing import SLACK


@pytest.mark.parametrize('name,kernel,backward', list(product(MODULES, ('oneDNN', 'BLAS'), (False, True))))
def test_projector(name, kernel, backward, use, ratio, judge, twice_as_fast):
    use(kernel)
    (projector, features), official, flops = build(name), MODULES[name][3 if backward else 2], work(name, backward)
    clearly_faster = kernel == 'oneDNN' and twice_as_fast and name in ('D-Abstractor', 'resampler')
    aim = min((0.7 if clearly_faster else 1.0) * official, 1.3 * flops) * SLACK
    judge(
        name,
        lambda: ratio(lambda: step(projector, features, backward), 3 if backward else 5),
        aim,
        kernel,
        backward,
        official,
        flops,
    )
