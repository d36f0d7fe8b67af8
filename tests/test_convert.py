"Official checkpoint folders of every released form, converted on disk: the same bits, little memory, and nothing written where something is wrong."

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from mllm_replica.cli import app
from mllm_replica.core.settings import Trouble
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.eagle import released as eagle
from mllm_replica.eagle.golden import settings_of
from mllm_replica.honeybee import model as honeybee
from mllm_replica.honeybee.prompts import SYSTEM_DETAIL
from mllm_replica.models import convert as converting
from mllm_replica.models.convert import FORMS, TYPES, convert, recognise
from mllm_replica.models.official import StoredWeights
from mllm_replica.owl2 import released as owl2
from mllm_replica.owl3 import released as owl3

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / 'golden'
FILES = {
    'owl2': 'owl2/model',
    'owl21': 'owl2/owl21_model',
    'honeybee c-abs': 'honeybee/full_cabs_right_pad',
    'honeybee d-abs': 'honeybee/full_dabs_multi_image',
    'honeybee linear': 'honeybee/full_linear',
    'eagle': 'eagle/full_model',
    'owl3 adaptive': 'owl3/full_model',
    'owl3 static': 'owl3/full_model',
}
LOADERS = {'owl2': owl2, 'honeybee': honeybee, 'eagle': eagle, 'owl3': owl3}
LAYOUTS = ('safetensors', 'safetensors shards', 'bin', 'bin shards', 'wrapped bin', 'old bin')


class Official:
    "A released model in small: config.json, tensors, and what the chapter is told beside them."

    def __init__(self, form):
        self.form, self.paper = form, 'owl2' if form == 'owl21' else form.split()[0]
        with safe_open(GOLDEN / f'{FILES[form]}.safetensors', 'pt') as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = dict(file.metadata())
        self.state = {name[2:]: tensor for name, tensor in self.tensors.items() if name.startswith('w.')}
        self.settings, case = {}, json.loads(metadata['config'])
        getattr(self, f'as_{self.paper}')(case, metadata)
        self.config['auto_map'] = {'AutoModel': 'stranger.py'}

    def as_owl2(self, case, _):
        visual = dict(visual_model=case['vision'], visual_abstractor=case['abstractor'])
        self.config = case['llm'] | dict(visual_config=visual, model_type='mplug_owl2')

    def as_honeybee(self, case, _):
        parts = {'vision_config': 'vision_config', 'projector_config': 'projector_config', 'text_config': 'lm_config'}
        self.config = {ours: case[theirs] for ours, theirs in parts.items()} | {'architectures': ['HoneybeeForX']}

    def as_eagle(self, case, _):
        mixture = case['fusion']
        names = dict(mm_vision_tower=mixture['towers'], mm_projector_type=case['projector'])
        self.config = case['llm'] | names | {'model_type': 'eagle_llama'}
        self.settings = dict(experts=settings_of(mixture), image_size=mixture['input_size'], grid=mixture['grid'])

    def as_owl3(self, case, metadata):
        self.config, self.placeholder = case | {'model_type': 'mplugowl3'}, json.loads(metadata['placeholder_ids'])
        if self.form == 'owl3 static':  # as the 1B and 2B models: one gate a channel, a tied output matrix
            for name in [name for name in self.state if '.self_attn.gate_proj.0.' in name]:
                gate = name.rpartition('.gate_proj')[0] + '.gate'
                self.state[gate] = torch.linspace(-1, 1, case['hidden_size'])
                del self.state[name]
            del self.state['language_model.lm_head.weight']
            self.config |= {'tie_word_embeddings': True}

    def write(self, folder, layout='safetensors', **changes):
        "The folder as it is downloaded; a change to None takes a tensor away."
        folder.mkdir(exist_ok=True)
        (folder / 'config.json').write_text(json.dumps(self.config))
        state = {name: t.contiguous() for name, t in (self.state | changes).items() if t is not None}
        if layout == 'safetensors':
            save_file(state, folder / 'model.safetensors')
        elif layout.endswith('shards'):
            write_shards(folder, state, layout.split()[0])
        else:
            content = {'state_dict': state, 'epoch': 3} if layout == 'wrapped bin' else state
            torch.save(content, folder / 'pytorch_model.bin', _use_new_zipfile_serialization=layout != 'old bin')
        return folder

    def load(self, folder, dtype=None):
        return LOADERS[self.paper].load_official(folder, dtype, **self.settings)

    @torch.no_grad()
    def logits(self, model):
        "The model's logits of the recorded case."
        t = self.tensors
        if self.paper == 'owl2':
            seen = t['out.one_image.modality_indicators'].long()
            return model(inputs_embeds=t['out.one_image.inputs_embeds'], modality_indicators=seen).logits
        ids, mask = t['in.input_ids'], t.get('in.attention_mask')
        if self.paper == 'eagle':
            return model(**model.official_inputs(ids, t['in.images'], mask)).logits
        if self.paper == 'owl3':
            model.config.placeholder_ids = self.placeholder
        return model(ids, mask, t['in.pixel_values']).logits

    def recorded(self):
        "The official logits, and where they mean something; None where the case was changed here."
        if self.form in ('owl3 static', 'owl21', 'owl2'):
            return (None, None) if self.form == 'owl3 static' else (self.tensors['out.one_image.logits'], slice(None))
        t, mask = self.tensors, self.tensors.get('in.attention_mask')
        mask = t.get('out.attention_mask', mask) if self.paper == 'eagle' else mask
        return t['out.logits'], (t['in.input_ids'] != 0 if mask is None else mask.bool())


def write_shards(folder, state, kind):
    stem = {'bin': 'pytorch_model', 'safetensors': 'model'}[kind]
    files = {f'{stem}-{k + 1}-of-3.{kind}': list(state)[k::3] for k in range(3)}
    for file, names in files.items():
        part = {name: state[name] for name in names}
        torch.save(part, folder / file) if kind == 'bin' else save_file(part, folder / file)
    places = {name: file for file, names in files.items() for name in names}
    (folder / f'{stem}.{kind}.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': places}))


def call(*words):
    return CliRunner().invoke(app, ['convert', *map(str, words)])


def one_line(result):
    "The single line of a command that could not go on."
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    (line,) = [line for line in result.output.splitlines() if line]
    assert line.startswith('Error: ')
    return line


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def plain(config):
    "What a configuration says of the model."
    of_files = ('architectures', 'dtype', 'transformers_version', '_name_or_path')
    return {name: value for name, value in config.to_dict().items() if name not in of_files}


# --- the same model -----------------------------------------------------------------------------------------------------
def converts(form, layout, folder):
    official = Official(form)
    source, target = official.write(folder / 'official', layout), folder / 'ours'
    if official.settings:
        made = convert(source, target, max_shard_size='40KB', **official.settings)
    else:
        result = call(source, target, '--max-shard-size', '40KB')
        assert result.exit_code == 0, result.output
    shards = sorted(path.name for path in target.glob('model-*'))
    assert shards == [f'model-{k:05d}-of-{len(shards):05d}.safetensors' for k in range(1, len(shards) + 1)]
    index = json.loads((target / 'model.safetensors.index.json').read_text())
    held = {name: shard for shard in shards for name in load_file(target / shard)}
    assert index['weight_map'] == held and len(shards) > 1
    expected, found = official.load(source), AutoModelForImageTextToText.from_pretrained(target)
    assert type(found) is type(expected) and not found.training
    same(found.state_dict(), expected.state_dict())
    assert plain(found.config) == plain(expected.config)
    logits = official.logits(found)
    assert torch.equal(logits, official.logits(expected))
    recorded, real = official.recorded()
    if recorded is not None:
        torch.testing.assert_close(logits[real], recorded[real], rtol=1e-4, atol=5e-5)
    config = json.loads((target / 'config.json').read_text())
    assert (config['dtype'], config['architectures']) == ('float32', [type(found).__name__])
    if official.settings:
        assert (
            made.kind is type(found) and len(made.files) == len(shards) and made.size == index['metadata']['total_size']
        )


PAIRS = [(form, LAYOUTS[k % len(LAYOUTS)]) for k, form in enumerate(FILES)]


@pytest.mark.parametrize('form, layout', PAIRS)
def test_every_released_form(form, layout, tmp_path):
    converts(form, layout, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('form', FILES)
def test_every_form_in_every_layout(form, layout, tmp_path):
    if (form, layout) not in PAIRS:
        converts(form, layout, tmp_path)


def test_what_the_file_has_besides(tmp_path):
    "Rotary tables, a class row, a head that nothing reads: compared, changed or left out, and a tied matrix written once."
    official = Official('honeybee c-abs')
    table = official.state['abstractor.pos_emb']
    first = dict(visual_projector_config=official.config.pop('projector_config'), model_type='mllm', num_query_tokens=4)
    official.config |= first
    more = {'language_model.model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(5)}
    source = official.write(
        tmp_path / 'official', **more, **{'abstractor.pos_emb': torch.cat([table[:, :1] + 7, table], 1)}
    )
    made = convert(source, tmp_path / 'ours')
    assert made.unused == list(more) and torch.equal(load_file(made.files[0])['abstractor.pos_emb'], table)
    source = Official('owl3 static').write(tmp_path / 'tied')
    result = call(source, tmp_path / 'untied')
    assert '11 tensors that nothing reads were left out, like vision_model.head.' in result.output
    (file,) = (tmp_path / 'untied').glob('model-*')
    assert 'language_model.lm_head.weight' not in load_file(file)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_types(dtype, tmp_path, monkeypatch):
    "All weights change their type but a D-Abstractor, in pieces as at once; the model is that of `load_official`."
    monkeypatch.setattr(converting, '_PIECE', 7)
    official = Official('honeybee d-abs')
    source, target = official.write(tmp_path / 'official'), tmp_path / 'ours'
    assert call(source, target, '--dtype', dtype).exit_code == 0
    (file,) = target.glob('model-*')
    kinds = {name.split('.')[0]: tensor.dtype for name, tensor in load_file(file).items()}
    assert kinds == dict(vision_model=TYPES[dtype], language_model=TYPES[dtype], abstractor=torch.float32)
    found, expected = AutoModelForImageTextToText.from_pretrained(target), official.load(source, TYPES[dtype])
    same(found.state_dict(), expected.state_dict())
    assert torch.equal(official.logits(found), official.logits(expected))


def test_types_stay_as_they_are_stored(tmp_path):
    official = Official('honeybee d-abs')
    names = sorted(official.state, reverse=True)  # the first weight says what the model computes in
    official.state = {name: official.state[name].bfloat16() for name in names if not name.startswith('abstractor')} | {
        name: official.state[name] for name in names if name.startswith('abstractor')
    }
    source, target = official.write(tmp_path / 'official', 'bin'), tmp_path / 'ours'
    convert(source, target)
    found, expected = AutoModelForImageTextToText.from_pretrained(target), official.load(source)
    assert found.language_model.dtype == torch.bfloat16
    same(found.state_dict(), expected.state_dict())
    with pytest.raises(Trouble, match='lm_head.weight has numbers beyond torch.float16'):
        huge = official.write(tmp_path / 'huge', **{'language_model.lm_head.weight': torch.full((72, 40), 1e20)})
        convert(huge, tmp_path / 'half', dtype='float16')


def test_tensors_lie_as_they_like(tmp_path):
    "Transposed, repeated, parts of one storage, parameters: what counts is the numbers."
    official = Official('owl2')
    expected, weight = dict(official.state), official.state['model.layers.0.mlp.up_proj.weight']
    both = torch.stack([official.state[f'model.layers.{i}.self_attn.q_proj.weight'] for i in (0, 1)])
    odd = {f'model.layers.{i}.self_attn.q_proj.weight': both[i] for i in (0, 1)}
    odd |= {'model.layers.0.mlp.up_proj.weight': weight.T.contiguous().T}
    odd |= {
        'model.norm.weight': torch.ones(1).expand(48),
        'lm_head.weight': torch.nn.Parameter(expected['lm_head.weight']),
    }
    source = official.write(tmp_path / 'official', 'bin')
    torch.save(official.state | odd, source / 'pytorch_model.bin')
    made = load_file(convert(source, tmp_path / 'ours').files[0])
    expected = owl2.convert_official(expected | {'model.norm.weight': torch.ones(48)}, official.load(source).config)
    same(made, expected)


def test_the_tokenizer_comes_along(tmp_path):
    source = Official('owl2').write(tmp_path / 'official')
    for name in ('tokenizer.model', 'tokenizer_config.json', 'stranger.py', 'generation_config.json'):
        (source / name).write_text(name)
    convert(source, tmp_path / 'ours')
    made = content(tmp_path / 'ours')
    assert made['tokenizer.model'] == b'tokenizer.model' and 'tokenizer_config.json' in made
    assert not {'stranger.py', 'generation_config.json'} & made.keys() and b'auto_map' not in made['config.json']


@pytest.mark.parametrize('form', ['owl2', 'honeybee c-abs', 'owl3 adaptive'])
def test_the_processor_and_its_template_come_along(form, tmp_path):
    official = Official(form)
    source, tokenizer = official.write(tmp_path / 'official'), byte_tokenizer()
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>', '<|endoftext|>']})
    tokenizer.save_pretrained(source)
    assert not convert(source, tmp_path / 'ours').missing
    processor = AutoProcessor.from_pretrained(tmp_path / 'ours')
    said = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]}]
    start = {'owl2': 'USER: <|image|>', 'honeybee': SYSTEM_DETAIL, 'owl3': '<|im_start|>system'}[official.paper]
    written = processor.apply_chat_template(said, add_generation_prompt=True)
    assert written.startswith(start)
    assert processor(Image.new('RGB', (8, 8)), written, return_tensors='pt')['pixel_values'].shape[0] == 1
    assert not convert(source, tmp_path / 'ours').missing  # again: everything is there


def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path):
    source = Official('owl2').write(tmp_path / 'official')
    assert 'none of tokenizer.json' in convert(source, tmp_path / 'none').missing
    (source / 'tokenizer.json').write_text('{}')
    assert 'no processor was written' in convert(source, tmp_path / 'damaged').missing


# --- memory -------------------------------------------------------------------------------------------------------------
class Alive:
    "Bytes of the tensors that were handed out and are still held."

    def __init__(self):
        self.now = self.most = 0

    def watch(self, tensor):
        fresh = tensor.clone()
        size = fresh.untyped_storage().nbytes()
        self.now, self.most = self.now + size, max(self.most, self.now + size)
        weakref.finalize(fresh.untyped_storage(), self.forget, size)
        return fresh

    def forget(self, size):
        self.now -= size


@pytest.mark.parametrize('form', ['owl2', 'owl21', 'honeybee d-abs', 'eagle', 'owl3 static'])
def test_one_tensor_is_held_at_a_time(form, tmp_path, monkeypatch):
    official, alive, read = Official(form), Alive(), StoredWeights.__getitem__
    source = official.write(tmp_path / 'official', 'bin shards')
    monkeypatch.setattr(StoredWeights, '__getitem__', lambda self, name: alive.watch(read(self, name)))
    convert(source, tmp_path / 'ours', dtype='bfloat16', **official.settings)
    largest = max(tensor.nbytes for tensor in official.state.values())
    assert largest <= alive.most <= 1.01 * largest and alive.now == 0


@pytest.mark.parametrize('layout', ['safetensors', 'bin'])
def test_what_was_read_does_not_stay_mapped(layout, tmp_path, monkeypatch):
    "A file is mapped anew before more of it than the largest tensor holds is in memory."
    from mllm_replica.models import official as reading

    official, opened, opening = Official('owl2'), [], reading._tensors
    monkeypatch.setattr(reading, '_tensors', lambda path: opened.append(path) or opening(path))
    stored = StoredWeights(official.write(tmp_path / 'official', layout))
    largest, read, times = max(t.nbytes for t in stored.meta.values()), 0, len(opened)
    for name, meta in stored.meta.items():
        stored[name]
        if len(opened) > times:
            read, times = 0, len(opened)
        read += meta.nbytes
        assert read <= largest
    assert times > 3


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from mllm_replica.models import convert as c
from mllm_replica.models.official import Plan, StoredWeights
import mllm_replica.owl2.released
source, target = map(Path, sys.argv[1:])
stored = StoredWeights(source)
plan = Plan(None, None, stored.meta)
for name in stored: plan.take(name, name)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
target.mkdir()
before = peak()
for name, shard in c.shards_of(plan.shapes, 10**9).items():
    c.write_shard(target / name, shard, plan, stored)
print(peak() - before, max(t.nbytes for t in stored.meta.values()))
"""


@pytest.mark.nightly
@pytest.mark.parametrize('layout', ['safetensors', 'bin'])
def test_resident_memory_is_twice_the_largest_tensor(layout, tmp_path):
    "640 MB in a process of its own; tensors of 32 MB."
    official = SimpleNamespace(config={}, state={f'w{i}': torch.zeros(2**23) for i in range(20)})
    source = Official.write(official, tmp_path / 'official', layout)
    said = subprocess.run(
        [sys.executable, '-c', MEASURE, str(source), str(tmp_path / 'ours')], capture_output=True, text=True, check=True
    )
    grown, largest = map(int, said.stdout.split())
    assert grown < 2.6 * largest


# --- interrupted --------------------------------------------------------------------------------------------------------
class Stop(BaseException):
    "As Ctrl-C."


@pytest.fixture
def two(tmp_path):
    "A source, where it goes, and the whole conversion to compare with."
    source = Official('owl2').write(tmp_path / 'official')
    convert(source, tmp_path / 'whole', max_shard_size='100KB')
    return source, tmp_path / 'ours', content(tmp_path / 'whole')


def stop_after(source, target, files):
    def said(done, total):
        if done == files:
            raise Stop

    with pytest.raises(Stop):
        convert(source, target, max_shard_size='100KB', said=said)


def test_an_interrupted_conversion_goes_on(two):
    source, target, whole = two
    stop_after(source, target, 2)
    shards = sorted(name for name in whole if name.startswith('model-'))
    assert sorted(content(target)) == ['conversion.json', *shards[:2]] and len(shards) > 3
    (target / f'.{shards[2]}.99999.1').write_bytes(b'half')  # of a process that was killed
    (target / shards[1]).write_bytes(whole[shards[1]][:-4])  # cut since
    kept, seen = (target / shards[0]).stat(), []
    convert(source, target, max_shard_size='100KB', said=lambda *done: seen.append(done))
    assert content(target) == whole and seen == [(k, len(shards)) for k in range(2, len(shards) + 1)]
    assert ((target / shards[0]).stat().st_ino, (target / shards[0]).stat().st_mtime_ns) == (
        kept.st_ino,
        kept.st_mtime_ns,
    )
    convert(source, target, max_shard_size='100KB', said=lambda *done: pytest.fail('all was done'))


def test_a_half_written_file_is_gone(two, monkeypatch):
    source, target, whole = two
    append = converting._append

    def stop(file, name, *rest):
        append(file, name, *rest)
        if name.endswith('lm_head.weight'):
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(converting, '_append', stop)
        convert(source, target, max_shard_size='100KB')
    assert not list(target.glob('.*')) and content(target).items() <= whole.items()
    convert(source, target, max_shard_size='100KB')
    assert content(target) == whole


@pytest.mark.parametrize('finished', [False, True])
def test_other_options_or_weights_are_refused(two, finished):
    source, target, whole = two
    convert(source, target, max_shard_size='100KB') if finished else stop_after(source, target, 1)
    before = content(target)
    for words, what in ((['--dtype', 'bfloat16'], 'dtype'), (['--max-shard-size', '90KB'], 'max_shard_size')):
        line = one_line(call(source, target, '--max-shard-size', '100KB', *words))
        assert f'conversion with other {what}; remove it' in line and str(target) in line
    Official('owl2').write(source, **{'lm_head.weight': torch.zeros(97, 48)})
    line = one_line(call(source, target, '--max-shard-size', '100KB'))
    assert 'conversion with other source; remove it' in line and content(target) == before


def test_two_at_once(two):
    source, target, _ = two
    target.mkdir()
    other = os.open(target, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert 'another conversion is writing' in one_line(call(source, target))
    os.close(other)
    assert call(source, target).exit_code == 0


# --- the disk -----------------------------------------------------------------------------------------------------------
def test_a_full_disk_is_a_line(two, monkeypatch):
    source, target, whole = two
    full = OSError(errno.ENOSPC, 'No space left on device')
    stop_after(source, target, 2)
    kept = content(target)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', lambda fd: (_ for _ in ()).throw(full))
        line = one_line(call(source, target, '--max-shard-size', '100KB'))
    assert 'No space left on device; free some space and convert again' in line and content(target) == kept
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=10**5))
        line = one_line(call(source, target, '--max-shard-size', '100KB'))
        assert '0.0 GB of space left' in line and content(target) == kept
        call(source, target.with_name('other'))
        assert not content(target.with_name('other'))
    assert call(source, target, '--max-shard-size', '100KB').exit_code == 0 and content(target) == whole


def test_a_place_that_cannot_be_written(two, tmp_path, monkeypatch):
    source, target, _ = two
    (tmp_path / 'file').touch()
    for place in (tmp_path / 'file', tmp_path / 'file' / 'ours'):
        assert 'give a folder that can be written' in one_line(call(source, place))
    target.mkdir()

    def read_only(path, *mode, **options):
        if str(target) in str(path):
            raise OSError(errno.EROFS, 'Read-only file system', str(path))
        return opened(path, *mode, **options)

    opened = open
    monkeypatch.setattr('builtins.open', read_only)
    assert 'Read-only file system; give a folder that can be written' in one_line(call(source, target))
    assert not content(target)


def test_strangers_files_stay(two):
    source, target, _ = two
    target.mkdir()
    (target / 'thesis.tex').write_text('x')
    (target / 'config.json').write_text('{}')
    line = one_line(call(source, target))
    assert 'ours holds config.json, thesis.tex, which no conversion left there' in line
    before = content(source)
    assert 'holds config.json, model.safetensors' in one_line(call(source, source)) and content(source) == before
    shutil.rmtree(target)
    stop_after(source, target, 1)
    (target / 'notes.txt').write_text('mine')
    assert 'ours holds notes.txt' in one_line(call(source, target, '--max-shard-size', '100KB'))
    (target / 'notes.txt').unlink()
    (target / 'conversion.json').write_text('{"paper"')
    assert 'conversion.json is damaged' in one_line(call(source, target, '--max-shard-size', '100KB'))


# --- what does not fit --------------------------------------------------------------------------------------------------
class Code:
    def __reduce__(self):
        return (os.mkdir, ('touched',))


def refused(source, *words):
    "The line; nothing was written."
    target = source.parent / 'ours'
    line = one_line(call(source, target, *words))
    assert not target.exists() and not Path('touched').exists()
    return line


def test_all_keys_that_do_not_fit_are_named(tmp_path):
    wrong = {f'model.layers.{i}.self_attn.q_proj.weight': None for i in range(3)}
    wrong |= {'lm_head.weight': torch.zeros(95, 48), 'model.norm.weight': torch.zeros(48, dtype=torch.int8)}
    line = refused(Official('owl2').write(tmp_path / 'official', **wrong, **{'model.more': torch.zeros(2)}))
    at = 'language_model.model.layers.'
    for part in [f'missing {at}{i}.self_attn.q_proj.weight [48, 48]' for i in range(3)] + [
        '6 keys do not fit, nothing was loaded: missing',
        'unexpected language_model.model.more [2]',
        'wrong shape language_model.lm_head.weight: found [95, 48], expected [97, 48]',
        'wrong type language_model.model.norm.weight: found torch.int8',
    ]:
        assert part in line


@pytest.mark.parametrize('shape', [(), (1,), (97, 32)])
def test_a_fused_matrix_that_cannot_be_cut(shape, tmp_path):
    name = 'transformer.h.0.attn.c_attn.multiway.0.weight'
    line = refused(Official('owl21').write(tmp_path / 'official', **{name: torch.zeros(shape)}))
    assert 'self_attn.q_proj.multiway.0.weight: found' in line


@pytest.mark.parametrize(
    'form, name', [('owl2', 'model.layers.0.self_attn.rotary_emb.inv_freq'), ('honeybee c-abs', '')]
)
def test_other_tables(form, name, tmp_path):
    if name:
        for table in (torch.ones(6), torch.ones(())):
            line = refused(Official(form).write(tmp_path / 'official', **{name: table}))
            assert f'{name} is not the fixed table' in line
    else:
        line = refused(Official(form).write(tmp_path / 'official', **{'abstractor.pos_emb': torch.zeros(3)}))
        assert 'wrong shape abstractor.pos_emb: found [3]' in line


def test_other_rotations(tmp_path):
    official, name = Official('eagle'), 'model.vision_tower.vision_towers.3.vision_tower.rope_glb.freqs_cos'
    for table in (torch.ones(16, 8), torch.ones(())):
        source = official.write(tmp_path / 'official', **{name: table})
        with pytest.raises(Trouble, match='is not our rotation'):
            convert(source, tmp_path / 'ours', **official.settings)
    assert not (tmp_path / 'ours').exists()


def both_prefixes(folder, state):
    save_file(state | {'vision_model.pre_layrnorm.bias': torch.zeros(32)}, folder / 'model.safetensors')


def with_index(change):
    def write(folder, state):
        write_shards(folder, state, 'bin')
        file = folder / 'pytorch_model.bin.index.json'
        index = json.loads(file.read_text())
        change(folder, index['weight_map'])
        file.write_text(json.dumps(index))

    return write


def lost(folder, places):
    (folder / 'pytorch_model-2-of-3.bin').unlink()


def outside(folder, places):
    shutil.copy(folder / 'pytorch_model-2-of-3.bin', folder.parent / 'secret.bin')
    places['x'] = '../secret.bin'


def twice(folder, places):
    torch.save(torch.load(folder / 'pytorch_model-1-of-3.bin'), folder / 'pytorch_model-2-of-3.bin')


def elsewhere(folder, places):
    places[next(iter(places))] = 'pytorch_model-3-of-3.bin'


def saved(made):
    return lambda folder, state: torch.save(made(state), folder / 'pytorch_model.bin')


def torn(folder, state):
    torch.save(state, folder / 'pytorch_model.bin')
    file = folder / 'pytorch_model.bin'
    file.write_bytes(file.read_bytes()[:-5000])


def bytes_of(name, data):
    return lambda folder, state: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    'write, message',
    [
        (lambda folder, state: None, 'no model.safetensors or pytorch_model.bin'),
        (with_index(lost), "names ['pytorch_model-2-of-3.bin'], which are not files of its folder"),
        (with_index(outside), "names ['../secret.bin'], which are not files of its folder"),
        (with_index(twice), 'occurs in two files'),
        (with_index(elsewhere), 'where they are not'),
        (bytes_of('model.safetensors.index.json', b'{"weight_map": ["a"]}'), 'is damaged: expected weight_map'),
        (bytes_of('model.safetensors.index.json', b'\xff'), 'index.json is damaged'),
        (saved(list), 'holds a list; expected tensors by name'),
        (saved(lambda state: {}), 'holds a dict; expected tensors by name'),
        (saved(lambda state: {'model': state, 'ema': state}), 'holds a dict with model (dict), ema (dict)'),
        (saved(lambda state: state | {'step': 3}), 'holds a dict with step (int)'),
        (saved(lambda state: {'model': state, 'extra': torch.ones(1)}), 'holds a dict with model (dict)'),
        (saved(lambda state: state | {'code': Code()}), 'asks to run posix.mkdir, which is never done'),
        (saved(lambda state: {'model': state, 'code': Code()}), 'asks to run posix.mkdir'),
        (saved(lambda state: state | {'s': torch.eye(3).to_sparse()}), "['s'] are no plain tensors"),
        (torn, 'pytorch_model.bin cannot be read'),
        (bytes_of('pytorch_model.bin', b''), 'pytorch_model.bin cannot be read'),
        (bytes_of('pytorch_model.bin', b'abc' * 99), 'pytorch_model.bin cannot be read'),
        (bytes_of('model.safetensors', b'abc' * 99), 'model.safetensors cannot be read'),
        (both_prefixes, 'would all become vision_model.pre_layrnorm.bias; keep one'),
    ],
)
def test_weights_that_are_not_read(write, message, tmp_path):
    official, source = Official('honeybee linear'), tmp_path / 'official'
    official.write(source)
    (source / 'model.safetensors').unlink()
    write(source, official.state)
    line = refused(source)
    assert message in line and 'size mismatch' not in line


def test_code_in_the_old_format_is_not_run_either(tmp_path):
    source = Official('owl2').write(tmp_path / 'official')
    (source / 'model.safetensors').unlink()
    torch.save({'a': Code()}, source / 'pytorch_model.bin', _use_new_zipfile_serialization=False)
    assert 'asks to run posix.mkdir' in refused(source)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'hidden_size': None}, "config.json lacks ['hidden_size']"),
        ({'hidden_size': 'wide'}, ''),
        ({'num_attention_heads': 0}, ''),
        ({'visual_config': ['visual_abstractor']}, ''),
        ({'visual_config': {'visual_model': None, 'visual_abstractor': {}}}, ''),
        ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'no released model has it'),
    ],
)
def test_a_configuration_that_describes_no_model(change, message, tmp_path):
    official = Official('owl2')
    official.config |= change
    line = refused(official.write(tmp_path / 'official'))
    assert message in line and str(tmp_path / 'official') in line


# --- whose it is --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'config, paper',
    [
        ({'model_type': 'mplug_owl2'}, 'owl2'),
        ({'architectures': ['MPLUGOwl2QWenForCausalLM']}, 'owl2'),
        ({'model_type': 'mplug_owl_2_1'}, 'owl2'),
        ({'model_type': 'llama', 'visual_config': {'visual_model': {}, 'visual_abstractor': {}}}, 'owl2'),
        ({'model_type': 'mllm', 'visual_projector_config': {}}, 'honeybee'),
        ({'projector_config': {'projector_type': 'd-abs'}}, 'honeybee'),
        ({'model_type': 'eagle_llama', 'mm_vision_tower': 'clip-448;convnext-1024'}, 'eagle'),
        ({'mm_vision_tower': 'clip-448;convnext-1024'}, 'eagle'),
        ({'model_type': 'mplugowl3', 'vision_config': {}}, 'owl3'),
        ({'architectures': ['mPLUGOwl3Model']}, 'owl3'),
        ({'hyper_layers': [1, 9]}, 'owl3'),
    ],
)
def test_recognised(config, paper):
    assert recognise(config) == paper


@pytest.mark.parametrize(
    'config',
    [
        {},
        {'model_type': 'llava_llama', 'mm_vision_tower': 'openai/clip-vit-large-patch14-336'},
        {'model_type': 3, 'architectures': [None]},
        {'model_type': 'mplugowl3', 'architectures': ['EagleLlamaForCausalLM']},
        {'hyper_layers': [1], 'projector_config': {'projector_type': 'mlp'}},
    ],
)
def test_not_recognised(config, tmp_path):
    source = Official('owl2').write(tmp_path / 'official')
    (source / 'config.json').write_text(json.dumps(config))
    line = refused(source)
    assert all(paper in line for paper in FORMS) and all(key in line for key in config) and '--paper' in line


def test_said_or_impossible(tmp_path):
    official = Official('owl2')
    official.config['model_type'] = 'something'
    del official.config['visual_config']['visual_abstractor']
    source = official.write(tmp_path / 'official')
    assert 'is of no released model' in refused(source)
    assert 'expected visual_model and visual_abstractor' in refused(source, '--paper', 'owl2')
    for words, message in (
        (['--paper', 'mm1'], 'There are: owl2, honeybee, eagle, owl3'),
        (['--dtype', 'int8'], 'There are: float32, float16, bfloat16'),
    ):
        result = call(source, tmp_path / 'ours', *words)
        assert result.exit_code == 2 and message in ' '.join(result.output.split())
    for size in ('0GB', '-1GB', 'much', '5', 'nanGB', '5 XB', ''):
        assert 'is no size' in refused(source, f'--max-shard-size={size}')
    with pytest.raises(Trouble, match="--paper 'mm1': nothing is released"):
        convert(source, tmp_path / 'ours', 'mm1')


def test_no_folder_of_a_checkpoint(tmp_path):
    source = tmp_path / 'official'
    assert 'no such folder; download the checkpoint' in refused(source)
    source.mkdir()
    assert 'config.json: No such file' in refused(source)
    for text, message in (('{', 'is damaged'), ('[1]', 'holds a list; expected an object'), ('', 'is damaged')):
        (source / 'config.json').write_text(text)
        assert message in refused(source)
    official = Official('owl2').write(source)
    convert(official, tmp_path / 'mine')
    assert 'our owl2 already; load it with from_pretrained' in refused(tmp_path / 'mine')
