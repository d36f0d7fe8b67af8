"Plans: what is counted agrees with what runs, scales as it must, and costs nothing itself."

import json, resource, sys

import pytest
import torch
from typer.testing import CliRunner

from mllm_replica.cli import app
from mllm_replica.core.machine import Machine
from mllm_replica.core.registry import Chapter
from mllm_replica.core.recipe import Benchmark, Recipe, Source, Stage
from mllm_replica.mm1.experts import insert_experts
from mllm_replica.models.cost import count
from mllm_replica.models.configuration import VisionLanguageConfig
from mllm_replica.models.vlm import VisionLanguageModel
from mllm_replica.planning import plan as planning
from mllm_replica.planning.memory import gpu_of

SMALL = dict(
    vision_config=dict(
        model_type='clip_vision_model',
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    ),
    text_config=dict(
        model_type='llama',
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=100,
    ),
)
SEVEN_B = dict(
    vision_config=dict(
        model_type='clip_vision_model',
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    ),
    text_config=dict(
        model_type='llama',
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
    ),
)
NODE, GPU = Machine(devices=8, shard='fsdp', checkpointing=True), gpu_of()
ALIGN = Stage(
    name='align',
    trainable=('^connector',),
    mixture={'captions': 1.0},
    steps=100,
    batch_size=16,
    lr=1e-3,
    max_length=1024,
    precision='bf16',
)
TUNE = ALIGN.model_copy(update=dict(name='tune', trainable=('^connector', '^language_model')))


def make_recipe(
    row: str = 'a', scale: str = 'paper', seed: int = 10, sizes: dict = SMALL, stages=(ALIGN, TUNE)
) -> Recipe:
    return Recipe(
        paper='honeybee',
        table='3',
        row=row,
        scale=scale,
        seed=seed,
        model=sizes,
        stages=stages,
        sources={
            'captions': Source(kind='tar', name='captions', options={'mean_text_tokens': 24}),
            'asked': Source(kind='tar', name='asked', size=50),
        },
        benchmarks=(Benchmark(name='asked', source='asked'),),
        assumptions=('twenty-four text tokens a caption',),
    )


def build(recipe: Recipe):
    return VisionLanguageModel(VisionLanguageConfig(**recipe.model)), None


@pytest.fixture
def chapter(monkeypatch):
    "A chapter with three rows, two of them the same recipe, and a fourth that cannot run."

    def recipe(table, row, scale, seed):
        return make_recipe(
            row,
            scale,
            seed,
            SMALL if row != 'b' else {**SMALL, 'text_config': {**SMALL['text_config'], 'num_hidden_layers': 1}},
        )

    reasons = dict(a=None, b=None, same_as_a=None, d='its data was never published')
    module = Chapter(
        rows=lambda table, scale: reasons, tables=lambda scale: ['3'], recipe=recipe, build=build, measure=None
    )
    monkeypatch.setattr(planning, 'recipes_of', lambda paper: module)
    monkeypatch.setattr(planning, 'earlier_seconds', lambda *args: None)
    monkeypatch.setattr('mllm_replica.core.registry.recipes_of', lambda paper: module)
    return module


def test_rows_seeds_and_reasons(chapter):
    found = planning.plan('honeybee', '3', 'paper')
    assert [u.label for u in found.units] == ['honeybee/3/a/paper/10', 'honeybee/3/b/paper/10']
    assert (found.shared, found.seeds) == (1, 1) and found.skipped == {'3/d': 'its data was never published'}
    assert found.units[1].flops < found.units[0].flops
    assert 'twenty-four text tokens a caption' in found.assumptions and any(
        'every device holds the whole model' in a for a in found.assumptions
    )


@pytest.mark.parametrize('layers, every, counted', [(6, 2, [2, 4]), (9, 3, [3, 6]), (7, 3, [7]), (4, 2, [4])])
def test_layers_that_alternate_are_counted_by_the_round(layers, every, counted, monkeypatch):
    sizes = SMALL | dict(text_config=SMALL['text_config'] | dict(num_hidden_layers=layers))
    depths = []

    def build_sparse():
        "A model with experts in every second or third layer."
        model = VisionLanguageModel(VisionLanguageConfig(**sizes))
        insert_experts(model.language_model, every, num_experts=4)
        return model

    def noted(step, model):
        "How deep the decoder is that is counted."
        depths.append(len(model.get_decoder().layers))
        return count(step, model)

    monkeypatch.setattr(planning, 'count', noted)
    by_the_round = planning.stage_cost(build_sparse, TUNE, 64, 0, checkpointing=True)
    assert depths == 2 * counted
    monkeypatch.setattr(planning, '_period', len)
    for found, wanted in zip(by_the_round, planning.stage_cost(build_sparse, TUNE, 64, 0, checkpointing=True)[:2]):
        assert found[:2] == wanted[:2] and found.activations == pytest.approx(wanted.activations, rel=1e-3)


def test_linear_in_steps_and_samples():
    one = planning.plan_unit(make_recipe(), build, NODE, GPU)
    longer = planning.plan_unit(
        make_recipe(stages=(ALIGN.model_copy(update=dict(steps=300)), TUNE.model_copy(update=dict(batch_size=32)))),
        build,
        NODE,
        GPU,
    )
    assert longer.stages[0].flops == 3 * one.stages[0].flops and longer.stages[1].tokens == 2 * one.stages[1].tokens
    assert longer.stages[1].memory['activations'] == 2 * one.stages[1].memory['activations']
    assert longer.stages[1].memory['weights'] == one.stages[1].memory['weights']


def test_counts_what_a_training_step_executes():
    "The plan multiplies the output matrix at every position; a real step does so where there is an answer: here everywhere but at the last position."
    model = build(make_recipe())[0]
    model.vision_model.requires_grad_(False)
    ids = torch.full((1, 40), 5)
    ids[0, :16] = model.config.image_token_id
    real = count(
        lambda: model(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32), labels=ids.clamp(min=0)).loss, model
    )
    planned = planning.stage_cost(
        lambda: build(make_recipe())[0], TUNE.model_copy(update=dict(precision='fp32')), 40, 1
    )[0]
    assert planned.forward + planned.backward == pytest.approx(real.forward + real.backward, rel=0.02)


def test_a_unit_takes_its_start_beside_what_it_took_before():
    units = [planning.plan_unit(make_recipe(), build, NODE, GPU, earlier=earlier) for earlier in (None, 40.0)]
    rate = 8 * GPU.tflops * 1e12 * GPU.utilisation
    assert [u.seconds for u in units] == [
        pytest.approx(planning.STARTUP + units[0].flops / rate),
        planning.STARTUP + 40,
    ]


def test_equal_layers_are_counted_once_and_multiplied():
    "Five layers, each of them run, cost what one and two of them say."
    deep = {**SMALL, 'text_config': {**SMALL['text_config'], 'num_hidden_layers': 5}}
    model = build(make_recipe(sizes=deep))[0]
    model.vision_model.requires_grad_(False)
    whole = count(lambda: model.planned_step(40, 1), model)
    planned = planning.stage_cost(
        lambda: build(make_recipe(sizes=deep))[0], TUNE.model_copy(update=dict(precision='fp32')), 40, 1
    )[0]
    assert (planned.forward, planned.backward) == (whole.forward, whole.backward)


def test_checkpointing_trades_memory_for_one_more_decoder_pass():
    plain, again, _ = planning.stage_cost(lambda: build(make_recipe())[0], TUNE, 40, 1, checkpointing=True)
    layers = sum(p.numel() for p in build(make_recipe())[0].language_model.model.layers.parameters())
    assert again.activations < plain.activations and again.forward == plain.forward
    assert again.backward - plain.backward == pytest.approx(2 * layers * 40, rel=0.1)


def test_seven_billion_parameters_cost_no_memory():
    "LLaVA-sized: 6 FLOPs per decoder parameter and position when it is trained, 4 when gradients only pass through."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = planning.plan_unit(make_recipe(sizes=SEVEN_B), build, NODE, GPU)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * (
        1024 if sys.platform != 'darwin' else 2**20
    )
    decoder = 6738415616 - 32000 * 4096
    align, tune = unit.stages
    assert tune.length == 256 + 24 and tune.trained == 6738415616 + 1024 * 4096 + 4096
    assert 1 < tune.flops / (6 * decoder * tune.tokens) < 1.1 and 1 < align.flops / (4 * decoder * align.tokens) < 1.1
    encoder = unit.parameters - tune.trained  # never trained: bf16, and whole where nothing is shared out
    assert tune.memory['weights'] == pytest.approx((4 * tune.trained + 2 * encoder) / 8e9, rel=0.01)
    assert unit.fits_with == ''


@pytest.mark.parametrize('row', ['cabs_144', 'linear_256', 'resampler_256'])
def test_published_step_times(row):
    """Honeybee prints the seconds of a pre-training step on eight A100. One number is fitted, and it is the same for all rows:
    180 text positions per sample, padding included. Then 40 % of the peak gives the published seconds."""
    from mllm_replica.core.registry import recipes_of
    from mllm_replica.tables.published import load_table

    recipes, published = recipes_of('honeybee'), load_table('honeybee', '3')
    recipe = recipes.recipe('3', row, 'paper', 10)
    cost = planning.stage_cost(
        lambda: recipes.build(recipe)[0], recipe.stages[0], published.row(row).params['num_visual_tokens'] + 180, 1
    )[0]
    seconds = (cost.forward + cost.backward) * recipe.stages[0].batch_size / (8 * GPU.tflops * 1e12 * GPU.utilisation)
    assert seconds == pytest.approx(published.cell(row, 's_per_step'), rel=0.05)


def test_command_prints_stages_memory_and_assumptions(chapter):
    out = CliRunner().invoke(app, ['plan', 'honeybee', '3', '--scale', 'paper', '--gpu', 'H100-80GB', '--gpus', '4'])
    assert out.exit_code == 0, out.output
    for text in (
        'align',
        'tune',
        'GPU-hours',
        'GB per device',
        'tokens',
        'checkpoints; data and features come on top',
        '4 × H100-80GB',
        'not planned: 3/d: its data was never published',
    ):
        assert text in out.output
    data = json.loads(CliRunner().invoke(app, ['plan', 'honeybee', '3', '--scale', 'paper', '--json']).output)
    assert {s['stage'] for u in data['units'] for s in u['stages']} == {'align', 'tune'}
    assert set(data['units'][0]['stages'][0]['memory']) == {
        'weights',
        'gradients',
        'optimizer',
        'buffers',
        'activations',
    }


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['3', '--row', 'cabs'], "no row of table 3 'cabs'"),
        (['3', '--row', 'd'], 'never published'),
        (['--row', 'a'], '--row needs a TABLE'),
        (['--gpu', 'A1000', '--scale', 'paper'], "no GPU 'A1000'"),
        (['--scale', 'huge'], "no scale 'huge'"),
        (['--gpus', '0'], 'greater than or equal to 1'),
        (['--shard', 'zero'], "no sharding 'zero'"),
        (['--utilisation', '0'], 'greater than or equal to 0.01'),
        (['--utilisation', '1.1'], 'less than or equal to 1'),
    ],
)
def test_wrong_arguments(chapter, arguments, message):
    out = CliRunner().invoke(app, ['plan', 'honeybee', *arguments])
    assert out.exit_code == 2 and message in ' '.join(out.output.replace('│', '').split())
