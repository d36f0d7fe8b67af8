"""The parity command finds every recorded number again and notices a single altered one."""

import json, runpy, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_replica.core.registry import Cases
from mllm_replica.models import parity

GOLDEN = sorted((Path(__file__).parent / 'golden' / 'honeybee').glob('*.safetensors'))
FULL = [path for path in GOLDEN if path.stem.startswith('full_')]
PARTS = [path for path in GOLDEN if path not in FULL]
NAMES = dict(ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def altered(golden, name, seed=0, by=1e-2):
    "The file with one number of one tensor changed by a hundredth of the tensor's largest (whole numbers by more); of a weight, one that matters."
    tensor, gradient = golden.tensors[name].clone(), golden.tensors.get(f'grad.{name}')
    position = int(
        torch.randint(tensor.numel(), (), generator=torch.Generator().manual_seed(seed))
        if gradient is None
        else gradient.abs().argmax()
    )
    flat = tensor.view(-1)
    if tensor.is_floating_point():
        flat[position] += by * max(1e-2, float(tensor.abs().max()))
    else:
        flat[position] = flat[position] + 1 if tensor.dtype != torch.uint8 else (int(flat[position]) + 128) % 256
    return golden._replace(tensors=golden.tensors | {name: tensor})


def cases(path):
    golden = parity.read_golden(path)
    return golden, parity.cases_of(parity.paper_of(golden)).parity_cases


@pytest.mark.parametrize('path', GOLDEN, **NAMES)
def test_every_recorded_tensor_is_found_again(path):
    report = parity.check_file(path)
    recorded = [name for name in load_file(path) if name.split('.')[0] in ('out', 'grad')]
    assert not report.problems, report.problems
    assert [c.name for c in report.compared] == sorted(recorded)
    assert max((c.error for c in report.compared if c.sort == 'out'), default=0) <= 1e-5
    assert max((c.error for c in report.compared if c.sort == 'grad'), default=0) <= 1e-4


@pytest.mark.parametrize('path', PARTS, **NAMES)
def test_one_altered_number_is_noticed(path):
    "In every tensor of the file: outputs, gradients, inputs, weights (but for key biases, which have no influence: their gradient is zero)."
    golden, known = cases(path)
    once = known[golden.kind](golden.config, parity.Given(golden.tensors))

    def recalled(config, tensors):
        return once if all(tensors[name] is not None for name in list(tensors)) else {}

    for i, name in enumerate(golden.tensors):
        gradient = golden.tensors.get(f'grad.{name}')
        if gradient is not None and gradient.abs().max() < 1e-5:
            continue
        if name.startswith('w.') and gradient is None:
            pytest.fail(f'{name} has no recorded gradient')
        same_input = name.startswith(('out.', 'grad.'))  # nothing to compute anew
        assert parity.check(altered(golden, name, seed=i), {golden.kind: recalled} if same_input else known).problems, (
            name
        )


@pytest.mark.parametrize('path', FULL, **NAMES)
def test_one_altered_number_is_noticed_in_full_models(path):
    golden, known = cases(path)
    weights = [
        'w.vision_model.vision_model.encoder.layers.0.mlp.fc1.weight',
        'w.language_model.model.layers.1.self_attn.v_proj.weight',
        'w.language_model.lm_head.weight',
        next(name for name in golden.tensors if name.startswith('w.abstractor.')),
    ]
    inputs = [name for name in golden.tensors if name.startswith('in.') and golden.tensors[name].is_floating_point()]
    outputs = [name for name in golden.tensors if name.startswith(('out.', 'grad.'))]
    report = parity.check(golden, known)
    assert any('logits only' in note for note in report.notes)
    for name in weights + inputs:
        assert parity.check(altered(golden, name), known).problems, name
    found = {c.name for c in report.compared}
    assert set(outputs) <= found


@pytest.mark.parametrize('path', FULL[:1], **NAMES)
def test_ids_and_labels_matter(path):
    golden, known = cases(path)
    for name in ('in.input_ids', 'in.labels', 'in.gen_input_ids'):
        tensor = golden.tensors[name].clone()
        tensor[0, -2] = (tensor[0, -2] + 1) % 70 + 1
        assert parity.check(golden._replace(tensors=golden.tensors | {name: tensor}), known).problems, name
    ids = golden.tensors['out.generated_ids'].clone()
    ids[0, 3] += 1
    report = parity.check(golden._replace(tensors=golden.tensors | {'out.generated_ids': ids}), known)
    assert (
        report.problems == ['out.generated_ids: 1 of %d ids differ' % ids.numel()] and 'tokens differ' in report.line()
    )


@pytest.fixture
def toy(monkeypatch):
    "A chapter with two kinds of cases, beside another that knows one of them."

    def double(config, tensors):
        return {'out.y': tensors['in.x'] * 2}

    def ignores(config, tensors):
        return {'out.y': torch.zeros(2)}

    def fails(config, tensors):
        raise RuntimeError('no such layer')

    chapters = dict(
        toy=Cases(ORIGIN='someone/toy', parity_cases=dict(double=double, ignores=ignores, fails=fails)),
        other=Cases(ORIGIN='someone/other', parity_cases=dict(double=ignores)),
    )
    monkeypatch.setattr(parity, 'PAPERS', {name: name for name in chapters})
    monkeypatch.setattr(parity, 'cases_of', chapters.__getitem__)


def write(path, tensors=None, metadata=None, **config):
    path.parent.mkdir(exist_ok=True)
    tensors = tensors or {'in.x': torch.ones(2), 'out.y': torch.full((2,), 2.0)}
    config = dict(kind='double', official={'repo': 'someone/toy@1234'}) | config
    save_file(tensors, path, metadata if metadata is not None else {'config': json.dumps(config)})
    return str(path)


def test_exit_code_and_lines(toy, tmp_path, capsys):
    good = write(tmp_path / 'good.safetensors')
    bad = write(tmp_path / 'bad.safetensors', {'in.x': torch.ones(2), 'out.y': torch.tensor([2.0, 2.01])})
    assert parity.main([good]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert (
        line.startswith('ok ')
        and 'good.safetensors' in line
        and '1 tensors' in line
        and 'worst 0.0e+00' in line
        and 'tokens none' in line
    )
    assert parity.main([bad, good]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('FAILED') and 'out.y: 1 of 2 numbers differ, by up to 0.01' in lines[1]
    assert lines[2].startswith('ok') and lines[-1].startswith('1 of 2 files')


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(kind='triple'), "unknown kind of case 'triple'"),
        (dict(kind='fails'), 'RuntimeError: no such layer'),
        (dict(kind='ignores'), 'in.x: in the file but never used'),
        (dict(kind=None), 'names no kind of case'),
    ],
    ids=['kind', 'exception', 'unused', 'no kind'],
)
def test_cases_that_cannot_pass(toy, tmp_path, capsys, change, message):
    assert parity.main([write(tmp_path / 'a.safetensors', **change)]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    'tensors, message',
    [
        (
            {'in.x': torch.ones(2), 'out.y': torch.full((2,), 2.0), 'out.z': torch.ones(1)},
            'out.z: recorded but not computed',
        ),
        (
            {'in.x': torch.ones(2), 'out.y': torch.full((2,), 2.0), 'w.z': torch.ones(1)},
            'w.z: in the file but never used',
        ),
        ({'in.x': torch.ones(2), 'out.y': torch.full((2, 1), 2.0)}, 'shape [2], recorded [2, 1]'),
        ({'in.x': torch.ones(2)}, 'records no output'),
        ({'y': torch.ones(2)}, 'unknown sort'),
        ({'in.x': torch.ones(2), 'out.y': torch.tensor([2.0, float('nan')])}, 'not finite'),
    ],
    ids=range(6),
)
def test_tensors_that_are_left_over_or_wrong(toy, tmp_path, capsys, tensors, message):
    assert parity.main([write(tmp_path / 'a.safetensors', tensors)]) == 1
    assert message in capsys.readouterr().out


def test_files_that_are_no_golden_files(toy, tmp_path, capsys):
    (tmp_path / 'text.safetensors').write_text('hello')
    for path in (
        tmp_path / 'text.safetensors',
        tmp_path / 'missing.safetensors',
        write(tmp_path / 'plain.safetensors', metadata={'a': 'b'}),
        tmp_path,
    ):
        assert parity.main([str(path)]) == 1
    with pytest.raises(SystemExit) as stop:
        parity.main([])
    assert stop.value.code == 2


def test_whose_file_it_is(toy, tmp_path, capsys):
    nameless = {'config': json.dumps(dict(kind='double'))}
    assert parity.main([write(tmp_path / 'toy' / 'a.safetensors', metadata=nameless)]) == 0  # by folder
    assert (
        parity.main([write(tmp_path / 'copies' / 'a.safetensors', metadata=nameless)]) == 1
    )  # two chapters know the kind
    assert "claimed by ['toy', 'other']" in capsys.readouterr().out
    assert parity.main([str(tmp_path / 'copies' / 'a.safetensors'), '--paper', 'toy']) == 0


def test_the_command(monkeypatch, capsys):
    "As `python -m` runs it, in this process."
    monkeypatch.setattr(sys, 'argv', ['parity', str(PARTS[0]), __file__])
    monkeypatch.delitem(sys.modules, 'mllm_replica.models.parity')
    with pytest.raises(SystemExit) as stop:
        runpy.run_module('mllm_replica.models.parity', run_name='__main__')
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and lines[0].startswith('ok')
    assert lines[1].startswith('FAILED') and 'no safetensors file' in lines[2]


def test_a_first_release_position_table(tmp_path):
    "Old C-Abstractor checkpoints hold a position for the class token too: it is dropped, and everything else agrees."
    path = next(path for path in FULL if 'cabs' in path.stem)
    golden, known = cases(path)
    table = golden.tensors['w.abstractor.pos_emb']
    old = torch.cat([torch.randn_like(table[:, :1]), table], 1)
    report = parity.check(golden._replace(tensors=golden.tensors | {'w.abstractor.pos_emb': old}), known)
    assert not report.problems, report.problems


def test_a_batch_of_text():
    "A file without images, labels or answers is computed as far as it goes: it is the language model's own reading."
    golden, known = cases(FULL[0])
    words, weights = (
        torch.randint(3, 20, (2, 7)),
        {name: t for name, t in golden.tensors.items() if name.startswith('w.')},
    )
    computed = known['full'](golden.config, parity.Given(weights | {'in.input_ids': words}))
    assert set(computed) == {'out.inputs_embeds', 'out.logits', 'out.merged_attention_mask'}
    alone = LlamaForCausalLM(LlamaConfig(**golden.config['lm_config'])).eval()
    alone.load_state_dict(
        {
            name.removeprefix('w.language_model.'): t
            for name, t in weights.items()
            if name.startswith('w.language_model.')
        }
    )
    torch.testing.assert_close(computed['out.logits'].value, alone(words).logits, rtol=1e-5, atol=1e-5)
    assert (
        torch.equal(computed['out.inputs_embeds'], alone.model.embed_tokens(words))
        and computed['out.merged_attention_mask'].all()
    )


def test_a_file_known_by_its_parts_alone(tmp_path, capsys):
    "MM1's file under another name, in another folder, with nothing but its configuration; with a capacity, the gates stay and the places are said."
    path = GOLDEN[0].parents[1] / 'mm1' / 'connectors_moe.safetensors'
    golden, tensors = parity.read_golden(path), load_file(path)
    config = {name: value for name, value in golden.config.items() if name != 'metadata'}
    save_file(
        tensors,
        tmp_path / 'a.safetensors',
        {
            'config': json.dumps(
                {k: v for k, v in config.items() if k not in ('top_k', 'lb_coef', 'z_coef', 'capacity')}
            )
        },
    )
    save_file(tensors | {'foo.in.x': torch.zeros(1)}, tmp_path / 'b.safetensors', {'config': json.dumps(config)})
    assert parity.main([str(tmp_path / 'a.safetensors')]) == 0 and parity.main([str(tmp_path / 'b.safetensors')]) == 1
    assert 'unknown kind of case' in capsys.readouterr().out
    free, few = (
        parity.cases_of('mm1').parity_cases['parts'](config | {'capacity': c}, parity.Given(golden.tensors))
        for c in (None, 1)
    )
    assert torch.equal(few['out.moe.gate1'], free['out.moe.gate1']) and not few['out.moe.kept_top1'].all()
    assert torch.equal(few['out.moe.combine_gate2'], few['out.moe.gate2'] * few['out.moe.kept_top2'])


@pytest.mark.parametrize(
    'largest, scale, passes, fails',
    [(1.0, 1.0, 9e-5, 2e-4), (1e-3, 1e-3, 1.9e-6, 3e-6), (1e-6, 50.0, 4e-5, 7e-5), (1e-6, 0.5, 4e-6, 1e-5)],
    ids=['usual', 'small', 'zero', 'small and no zero'],
)
def test_gradients_are_measured_by_their_file(largest, scale, passes, fails):
    recorded = torch.tensor([largest, -largest / 2])

    def problem(by):
        return parity.compare('grad.x', recorded, recorded + by, scale).problem

    assert not problem(passes) and problem(fails)


def test_weights_that_do_not_fit_are_named():
    golden, known = cases(FULL[0])
    tensors = {name: tensor for name, tensor in golden.tensors.items() if not name.endswith('readout.2.bias')}
    with pytest.raises(ValueError, match='abstractor.readout.2.bias'):
        parity.check(golden._replace(tensors=tensors), known)
