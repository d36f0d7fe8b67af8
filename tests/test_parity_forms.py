"""Golden files in forms that the recorded ones do not have: a cache before the tokens, chunks, clips, crops, padding on
either side, cut rows, text alone. What they expect is cut out of the official files, or computed without these forms."""

import json, re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mllm_replica.models import parity
from mllm_replica.models.forms import cache_of, chunk_lengths, media_of, setting, shown

GOLDEN = Path(__file__).parent / 'golden'
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def golden(name):
    return parity.read_golden(GOLDEN / f'{name}.safetensors')


def weights(file):
    return {name: tensor for name, tensor in file.tensors.items() if name.startswith('w.')}


def inputs(file, part=''):
    return {name: tensor for name, tensor in file.tensors.items() if name.startswith(f'in.{part}')}


@torch.enable_grad()
def agrees(folder, file, tensors, config=None, notes=None):
    "A file with these inputs and outputs agrees, and each of its outputs is missed once it is another."
    kept = {name: value for name, value in file.config.items() if name != 'metadata'}
    metadata = {name: json.dumps(value) for name, value in file.config['metadata'].items()}
    metadata['config'] = json.dumps(kept | {'kind': file.kind} | (config or {}))
    path, paper, everything = folder / file.path.name, file.path.parent.name, weights(file) | tensors

    def checked(**changed):
        written = {name: t.detach().contiguous().clone() for name, t in (everything | changed).items()}
        save_file(written, path, metadata)
        return parity.check_file(path, paper)

    report, outputs = checked(), {name: t for name, t in tensors.items() if name.startswith(('out.', 'grad.'))}
    assert not report.problems, report.problems
    assert {c.name for c in report.compared} == set(outputs)
    assert notes is None or any(re.search(notes, note) for note in report.notes), report.notes
    others = {name: t + (0.1 * (1 + t.abs()) if t.is_floating_point() else 1) for name, t in outputs.items()}
    assert {c.name for c in checked(**others).compared if c.problem} == set(outputs)


# settings and names


def test_where_a_setting_stands():
    assert setting({'tokenizer_model_max_length': 5, 'metadata': {}}, 'max_length') == 5
    assert setting({'max_length': None, 'metadata': {'tokenizer_padding_side': 'left'}}, 'padding_side') == 'left'
    assert setting({'llm': {'max_length': 20, 'padding_side': 'left'}}, 'max_length') is None


@pytest.mark.parametrize(
    'said, length, expected',
    [
        ({'chunk_size': 4}, 10, [4, 4, 2]),
        ({'prefill_chunks': [3, 7]}, 10, [3, 7]),
        ({'chunk_boundaries': [3, 7]}, 11, [3, 4, 4]),
        ({'chunk_boundaries': [0, 3, 10]}, 10, [3, 7]),
        ({'metadata': {'chunk_len': 20}}, 10, [10]),
        ({'chunked_prefill': True}, 7, [3, 4]),
        ({'chunked_prefill': False}, 7, None),
        ({}, 7, None),
    ],
)
def test_how_long_chunks_are(said, length, expected):
    assert chunk_lengths(said, {}, length) == expected


@pytest.mark.parametrize('sizes', [[5, 5, 5], [8, 3], [4, 20]])
def test_chunks_that_do_not_make_up_the_prompt(sizes):
    with pytest.raises(ValueError, match='of a prompt of 12; expected lengths'):
        chunk_lengths({'chunks': sizes}, {}, 12)


def test_media_of_any_grouping():
    pictures = torch.randn(4, 3, 2, 2)
    for given, counts in (
        ({'in.images': pictures}, [1, 1, 1, 1]),
        ({'in.images': pictures.unflatten(0, (2, 2))}, [2, 2]),
        ({'in.images.0': pictures[:3], 'in.images.1': pictures[3]}, [3, 1]),
        ({'in.images.0': pictures}, [4]),
    ):
        found = media_of(given)
        assert [len(entry) for entry in found] == counts and torch.equal(torch.cat(found), pictures)
    assert shown(range(5), [1, 0, 2, 0]) == [0, 2, 3] and shown(range(3), [1, 0, 2, 0]) == [0, 1, 2]


def test_a_cache_must_have_keys_for_all_values():
    table = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError):
        cache_of({'in.past_key.0': table, 'in.past_value.0': table, 'in.past_key.1': table})
    assert cache_of({'in.past_length': torch.tensor(3)}) is None


# mPLUG-Owl2


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_owl2_dispatch_among_n_copies(n, tmp_path):
    file, x = golden('owl2/multiway_network'), torch.randn(2, 7, 10)
    tensors = {
        'in.hidden_states': x,
        'in.mixed.indices': torch.randint(n, (2, 7)) if n > 1 else torch.ones(2, 7).long(),
    }
    copies = {f'w.square.multiway.{i}.weight': torch.randn(10, 10) for i in range(n)}
    norms = {f'w.norm.multiway.{i}.weight': torch.randn(10) for i in range(n)}
    routes = [(tensors['in.mixed.indices'] == i)[..., None] if n > 1 else True for i in range(n)]
    expected = sum(route * (x @ w.T) for route, w in zip(routes, copies.values()))
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    by_norm = sum(route * (normed * w) for route, w in zip(routes, norms.values()))
    tensors |= copies | norms | {'out.mixed.square': expected, 'out.mixed.norm': by_norm}
    agrees(tmp_path, file._replace(tensors={}), tensors)


def test_owl2_index_without_a_copy_in_a_file(tmp_path):
    file = golden('owl2/multiway_network')
    indices = file.tensors['in.mixed.indices'].clone()
    indices[0, 3] = 2
    report = parity.check(file._replace(kind='multiway', tensors=file.tensors), parity.cases_of('owl2').parity_cases)
    assert not report.problems
    with pytest.raises(ValueError, match='index 2, which has no copy'):
        parity.check(
            file._replace(kind='multiway', tensors=file.tensors | {'in.mixed.indices': indices}),
            parity.cases_of('owl2').parity_cases,
        )


PAST_NAMES = [
    ('in.past_key', 'in.past_value'),
    ('in.past_key_values.0.key', 'in.past_key_values.0.value'),
    ('in.past_key_values.0', 'in.past_key_values.1'),
    ('in.key_cache', 'in.value_cache'),
    ('in.past_k', 'in.past_v'),
]


@pytest.mark.parametrize('names', PAST_NAMES, ids=lambda names: names[0])
@pytest.mark.parametrize('mask', ['whole', 'new'])
def test_owl2_layer_with_a_cache(names, mask, tmp_path):
    "The official run, its first tokens taken as read."
    file, past = golden('owl2/multiway_decoder_layer')._replace(kind='layer'), 4
    given, cut = file.tensors, ('in.hidden_states', 'in.modality_indicators', 'in.position_ids', 'in.loss_weight')
    tensors = {name: given[name][:, past:] for name in cut}
    tensors['in.attention_mask_2d'] = given['in.attention_mask_2d'][:, past if mask == 'new' else 0 :]
    tensors |= {name: given[f'out.{part}_cache'][:, :, :past] for name, part in zip(names, ('key', 'value'))}
    late = ('input_layernorm', 'q_proj', 'k_proj', 'v_proj', 'self_attn', 'post_attention_layernorm', 'hidden_states')
    tensors |= {f'out.{name}': given[f'out.{name}'][:, past:] for name in late}
    tensors |= {f'out.{name}_cache': given[f'out.{name}_cache'] for name in ('key', 'value')}
    tensors['out.attn_probs'] = given['out.attn_probs'][:, :, past:]
    agrees(tmp_path, file, tensors)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_owl2_layer_is_compared_at_real_positions(side, tmp_path):
    file, pad = golden('owl2/multiway_decoder_layer')._replace(kind='layer'), 3
    widths = (pad, 0) if side == 'left' else (0, pad)
    given, tensors = file.tensors, {}
    for name in ('in.hidden_states', 'in.loss_weight', 'out.hidden_states', 'out.self_attn', 'out.k_proj'):
        tensors[name] = F.pad(given[name], (0, 0, *widths), value=0.5)
    for name in ('in.modality_indicators', 'in.attention_mask_2d', 'in.position_ids'):
        tensors[name] = F.pad(given[name], widths)
    tensors['out.attn_probs'] = F.pad(given['out.attn_probs'], (*widths, *widths), value=0.0)
    agrees(tmp_path, file, tensors, notes='hidden_states only at real positions')


def owl2_case(file, case, **changes):
    "Inputs of a case of the model file under another name, `None` takes one away."
    renamed = {name.split('.', 2)[2]: tensor for name, tensor in inputs(file, f'{case}.').items()} | changes
    return {f'in.new.{name}': tensor for name, tensor in renamed.items() if tensor is not None}


def owl2_model(file):
    from mllm_replica.owl2.model import Owl2Model
    from mllm_replica.owl2.released import convert_official, official_config

    visual = dict(visual_model=file.config['vision'], visual_abstractor=file.config['abstractor'])
    config = official_config(file.config['llm'] | {'visual_config': visual})
    model = Owl2Model(config).eval()
    model.load_state_dict(convert_official({n.removeprefix('w.'): t for n, t in weights(file).items()}, config))
    return model


@pytest.mark.parametrize(
    'names, config',
    [
        (('chunked_prefill_logits',), {'chunk_size': 4}),
        (('chunk.0.logits', 'chunk.1.logits'), {}),
        (('chunk_logits.0', 'chunk_logits.1'), {'prefill_chunks': [9, 5]}),
        (('last_chunk_logits',), {'chunks': [9, 5]}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else '',
)
@pytest.mark.parametrize('kind', ['model', 'owl21_model'])
def test_owl2_prompt_in_chunks(kind, names, config, tmp_path):
    file = golden(f'owl2/{kind}')._replace(kind='model')
    logits = file.tensors['out.one_image.logits']
    parts = logits.split([9, logits.shape[1] - 9], 1) if len(names) == 2 else [logits]
    parts = [logits[:, -1]] if names[0].startswith('last') else parts
    config = config | ({'chunks': [9, logits.shape[1] - 9]} if 'chunks' in config else {})
    config = {'prefill_chunks': [9, logits.shape[1] - 9]} if 'prefill_chunks' in config else config
    tensors = owl2_case(file, 'one_image', labels=None)
    agrees(tmp_path, file, tensors | {f'out.new.{name}': part for name, part in zip(names, parts)}, config)


@torch.no_grad()
def test_owl2_model_with_a_cache(tmp_path):
    file, past = golden('owl2/model')._replace(kind='model'), 3
    ids, cache = file.tensors['in.text_only.input_ids'], DynamicCache()
    owl2_model(file)(ids[:, :past], past_key_values=cache, use_cache=True)
    tensors = {'in.new.input_ids': ids[:, past:], 'in.new.attention_mask': torch.ones_like(ids)}
    tensors['out.new.logits'] = file.tensors['out.text_only.logits'][:, past:]
    answered = {name: file.tensors[f'out.text_only.{name}'] for name in ('greedy_new_ids', 'greedy_step_logits')}
    tensors |= {f'out.new.{name}': tensor for name, tensor in answered.items()}
    for i, layer in enumerate(cache.layers):
        tensors |= {f'in.new.past_key_values.{i}.0': layer.keys, f'in.new.past_key_values.{i}.1': layer.values}
    agrees(tmp_path, file, tensors)


@torch.no_grad()
@pytest.mark.parametrize('form', ['stacked', 'numbered'])
def test_owl2_several_clips(form, tmp_path):
    "Two clips in one sample, none in the next, whose own clip nobody sees, and one in the last."
    file, tokens = golden('owl2/model')._replace(kind='model'), 7
    frames = [2, 2, 2, 2] if form == 'stacked' else [3, 1, 2, 2]
    clips = [torch.randn(n, 3, 16, 16) for n in frames]
    ids = torch.tensor([[1, -200, 20, -200, 21], [1, 30, 31, 32, 33], [1, -200, 40, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    tensors = {'in.new.input_ids': ids, 'in.new.attention_mask': real}
    tensors |= (
        {'in.new.images': torch.stack(clips)}
        if form == 'stacked'
        else {f'in.new.images.{i}': clip for i, clip in enumerate(clips)}
    )
    model, visible = owl2_model(file), [clips[0], clips[1], clips[3]]
    rows = [[1, *[-1] * (frames[0] * tokens), 20, *[-1] * (frames[1] * tokens), 21]]
    rows += [[1, 30, 31, 32, 33], [1, *[-1] * (frames[3] * tokens), 40]]
    alone = [torch.cat(visible[:2]), None, visible[2]]
    logits = [model(torch.tensor([row]), pixel_values=pixels).logits[0] for row, pixels in zip(rows, alone)]
    tensors['out.new.logits'] = torch.nn.utils.rnn.pad_sequence(logits, True, padding_value=9.0)
    tensors['out.new.image_features'] = model.visual_embeds(torch.cat(clips))
    agrees(tmp_path, file, tensors, notes='logits only at real positions')


@pytest.mark.parametrize('config', [{}, {'padding_side': 'left'}], ids=['by its mask', 'by its setting'])
def test_owl2_padded_on_the_left(config, tmp_path):
    "The official batch, its padding moved to the front: what counts stays."
    file = golden('owl2/model')._replace(kind='model')
    given, moved = file.tensors, {}
    mask, wide = given['in.batch_padded.attention_mask'], given['out.batch_padded.expanded_attention_mask']
    for name in ('input_ids', 'attention_mask', 'labels'):
        moved[name] = left(given[f'in.batch_padded.{name}'], mask)
    tensors = owl2_case(file, 'batch_padded', **moved)
    for name in ('logits', 'expanded_labels', 'expanded_attention_mask', 'hidden_states.1'):
        tensors[f'out.new.{name}'] = left(given[f'out.batch_padded.{name}'], wide)
    tensors['out.new.loss'] = given['out.batch_padded.loss']
    agrees(tmp_path, file, tensors, config, notes='logits only at real positions')


def left(tensor, mask):
    "Rows padded on the right, padded on the left."
    return torch.stack([row.roll(int((1 - m.long()).sum()), 0) for row, m in zip(tensor, mask)])


# mPLUG-Owl3


def owl3_layer(file):
    from mllm_replica.owl3.components import HyperLayer

    known = {k: v for k, v in file.config.items() if k not in ('vision_config', 'hyper_layers', 'metadata')}
    layer = HyperLayer(Qwen2Config(**known, attn_implementation='sdpa'), 0, 'adaptive').eval()
    layer.load_state_dict({name.removeprefix('w.'): t for name, t in weights(file).items()})
    return layer


@pytest.mark.parametrize('new', [1, 5])
@pytest.mark.parametrize('offsets', ['new', 'whole', 'none'])
def test_owl3_layer_with_a_cache(new, offsets, tmp_path):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    file = golden('owl3/hatb_layer')._replace(kind='layer')
    given, layer, cache = file.tensors, owl3_layer(file), DynamicCache()
    x, past = given['in.hidden_states'], given['in.hidden_states'].shape[1] - new
    angles = Qwen2RotaryEmbedding(layer.self_attn.config)(x, given['in.position_ids'])
    with torch.no_grad():  # keys and values of text do not depend on images
        layer(x, position_embeddings=angles, attention_mask=None, past_key_values=cache)
    tensors = {name: given[name][:, past:] for name in ('in.hidden_states', 'in.position_ids', 'in.cotangent')}
    tensors |= {
        name: t for name, t in inputs(file).items() if name.startswith(('in.media_starts', 'in.num', 'in.image'))
    }
    tensors['in.attention_mask'] = given['in.attention_mask']
    if offsets != 'none':
        tensors['in.media_offset'] = given['in.media_offset'][:, past if offsets == 'new' else 0 :]
    tensors |= {f'in.past_{n}s': getattr(cache.layers[0], f'{n}s')[:, :, :past] for n in ('key', 'value')}
    tensors['out.hidden_states'] = given['out.hidden_states'][:, past:]
    agrees(tmp_path, file, tensors)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_owl3_padding_and_crops(side, tmp_path):
    "Padding changes nothing where the mask is 1; pictures come one by one, as crops, or numbered."
    file, pad = golden('owl3/full_model')._replace(kind='full'), 3
    given, widths = file.tensors, (pad, 0) if side == 'left' else (0, pad)
    moved = {
        n: F.pad(given[f'in.{n}'], widths, value=-100 * (n == 'labels'))
        for n in ('input_ids', 'attention_mask', 'labels')
    }
    tensors = inputs(file) | {f'in.{n}': t for n, t in moved.items()}
    tensors.pop('in.media_offset', None)
    for b in range(2):
        tensors[f'in.media_starts.{b}'] = given[f'in.media_starts.{b}'] + widths[0]
    if 'in.pixel_values' in tensors:
        pictures = tensors.pop('in.pixel_values')
        tensors |= {'in.pixel_values': pictures[:, None]} if side == 'left' else {'in.pixel_values.0': pictures}
    for out in ('logits', 'hidden.1', 'greedy_ids', 'greedy_step_logits', 'loss', 'cached_decode_logits'):
        if f'out.{out}' in given:
            full = given[f'out.{out}']
            tensors[f'out.{out}'] = F.pad(full, (0, 0, *widths), value=5.0) if out in ('logits', 'hidden.1') else full
    agrees(tmp_path, file, tensors, notes='logits only at real positions')


@pytest.mark.parametrize('config', [{'chunk_size': 7}, {'chunks': [10, 14]}, {'metadata_chunks': [2, 22]}])
def test_owl3_prompt_in_chunks(config, tmp_path):
    "An image stands in a later chunk, too; all images go with the first."
    file = golden('owl3/full_model')._replace(kind='full')
    tensors = inputs(file) | {'out.chunked_prefill_logits': file.tensors['out.logits']}
    tensors['out.chunked_last_logits'] = file.tensors['out.logits'][:, -1]
    agrees(tmp_path, file, tensors, config)


@torch.no_grad()
@pytest.mark.parametrize('past', [0, 4])
@pytest.mark.parametrize('said', [True, False])
def test_owl3_text_alone(past, said, tmp_path):
    "Qwen2's own numbers, with a cache before the tokens or without; a file may be silent about images."
    file, cache = golden('owl3/full_model')._replace(kind='full'), DynamicCache()
    fields = {k: v for k, v in file.config.items() if k not in ('vision_config', 'hyper_layers', 'metadata')}
    model, start = Qwen2ForCausalLM(Qwen2Config(**fields)).eval(), 'w.language_model.'
    own = {n.removeprefix(start): t for n, t in weights(file).items() if n.startswith(start)}
    model.load_state_dict({n: t for n, t in own.items() if 'v_kv_proj' not in n and 'self_attn.gate' not in n})
    ids = torch.randint(10, 90, (2, 11))
    tensors = {'in.input_ids': ids[:, past:], 'out.logits': model(ids).logits[:, past:]}
    if past:
        model(ids[:, :past], past_key_values=cache, use_cache=True)
        for i, layer in enumerate(cache.layers):
            tensors |= {f'in.past_key.{i}': layer.keys, f'in.past_value.{i}': layer.values}
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **GREEDY)
    tensors |= {'out.greedy_ids': answer.sequences[:, 11:], 'out.greedy_step_logits': torch.stack(answer.logits, 1)}
    if said:
        tensors |= {f'in.media_starts.{b}': torch.zeros(0, dtype=torch.long) for b in range(2)}
        tensors |= {'in.num_images': torch.zeros(2, dtype=torch.long), 'in.attention_mask': torch.ones_like(ids)}
    agrees(tmp_path, file, tensors)


# Honeybee


def honeybee_text(file):
    "The language model alone."
    model = LlamaForCausalLM(LlamaConfig(**file.config['lm_config'])).eval()
    start = 'w.language_model.'
    model.load_state_dict({n.removeprefix(start): t for n, t in weights(file).items() if n.startswith(start)})
    return model


@torch.no_grad()
def test_honeybee_text_with_a_cache_and_an_answer(tmp_path):
    file, past = golden('honeybee/full_linear'), 4
    model, ids, cache = honeybee_text(file), torch.randint(3, 70, (2, 9)), DynamicCache()
    model(ids[:, :past], past_key_values=cache, use_cache=True)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **GREEDY)
    tensors = {'in.input_ids': ids[:, past:], 'in.gen_input_ids': ids, 'out.logits': model(ids).logits[:, past:]}
    tensors |= {'out.generated_ids': answer.sequences[:, 9:], 'out.gen_scores': torch.stack(answer.logits, 1)}
    tensors['in.past_key'], tensors['in.past_value'] = (
        torch.stack([getattr(layer, name) for layer in cache.layers]) for name in ('keys', 'values')
    )
    generation = file.config['generation'] | dict(max_new_tokens=5, eos_token_id=None)
    agrees(tmp_path, file, tensors, {'generation': generation})


@pytest.mark.parametrize('name', ['full_cabs_right_pad', 'full_dabs_multi_image'])
def test_honeybee_chunks_and_crops(name, tmp_path):
    "The official files, pictures in another grouping, read in chunks."
    file = golden(f'honeybee/{name}')
    given = file.tensors
    mask = given.get('in.attention_mask', (given['in.input_ids'] != 0).long())
    tensors = inputs(file) | {'in.attention_mask': mask}
    tensors['in.pixel_values'] = given['in.pixel_values'][None]
    tensors['in.gen_pixel_values.0'] = tensors.pop('in.gen_pixel_values')
    tensors |= {
        f'out.{n}': given[f'out.{n}'] for n in ('logits', 'loss', 'visual_embeds', 'generated_ids', 'gen_scores')
    }
    tensors |= {'out.chunk.0.logits': given['out.logits'][:, :6], 'out.chunk.1.logits': given['out.logits'][:, 6:]}
    agrees(tmp_path, file, tensors, notes='chunk.1.logits only at real' if 'dabs' in name else None)


@torch.no_grad()
def test_honeybee_padded_on_the_left(tmp_path):
    file = golden('honeybee/full_dabs_multi_image')
    given, mask = file.tensors, file.tensors['in.attention_mask']
    tensors = inputs(file) | {
        f'in.{n}': left(given[f'in.{n}'], mask) for n in ('input_ids', 'attention_mask', 'labels')
    }
    tensors |= {'out.logits': left(given['out.logits'], mask), 'out.loss': given['out.loss']}
    agrees(tmp_path, file, tensors, {'padding_side': 'left'}, notes='logits only')


# Eagle


def laid_out(ids, mask, labels, visual, table, side, limit):
    "The official splice, sample by sample."
    rows, entry = [], 0
    for b in range(len(ids)):
        embeds, label = [], []
        found = 0
        for t in range(ids.shape[1]):
            if not mask[b, t]:
                continue
            if ids[b, t] == -200:
                embeds += [*visual[entry]]
                label += [-100] * len(visual[entry])
                entry, found = entry + 1, found + 1
            else:
                embeds.append(table[ids[b, t]])
                label.append(int(labels[b, t]))
        entry += not found
        rows.append((torch.stack(embeds)[:limit], torch.tensor(label)[:limit]))
    ones = [torch.ones(len(label), dtype=torch.long) for _, label in rows]
    padded = [([e for e, _ in rows], 0.0), (ones, 0), ([label for _, label in rows], -100)]
    return [torch.nn.utils.rnn.pad_sequence(part, True, value, side) for part, value in padded]


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('limit', [12, 64])
@pytest.mark.parametrize('crops', ['one', 'same', 'each'])
def test_eagle_splice(side, limit, crops, tmp_path):
    file = golden('eagle/splice_right_pad')
    given, tokens = file.tensors, file.tensors['in.image_tokens']
    visual = {
        'one': list(tokens),
        'same': [torch.cat([t, t + 1]) for t in tokens],
        'each': [torch.cat([t + i for i in range(n)]) for n, t in enumerate(tokens, 1)],
    }[crops]
    tensors = inputs(file)
    tensors.pop('in.image_tokens')
    if crops == 'same':
        tensors['in.image_tokens'] = torch.stack([tokens, tokens + 1], 1)
    else:
        tensors |= {
            f'in.image_tokens.{i}': v if crops == 'one' else v.unflatten(0, (-1, 5)) for i, v in enumerate(visual)
        }
    parts = [given[f'in.{n}'] for n in ('input_ids', 'attention_mask', 'labels')]
    made = laid_out(*parts, visual, given['in.embed_table'], side, limit)
    tensors |= {f'out.full.{n}': t for n, t in zip(('inputs_embeds', 'attention_mask', 'labels'), made)}
    names = {'max_length': limit, 'padding_side': side}
    if limit == 12:  # under the names of an official config.json
        names = {'max_length': None, 'tokenizer_model_max_length': limit, 'tokenizer_padding_side': side}
    agrees(tmp_path, file, tensors, names)


def eagle_text(file):
    "The language model alone."
    model = LlamaForCausalLM(LlamaConfig(**file.config['llm'])).eval()
    model.load_state_dict(
        {n[2:]: t for n, t in weights(file).items() if not n.startswith(('w.model.vision', 'w.model.mm_projector'))}
    )
    return model


@torch.no_grad()
@pytest.mark.parametrize('past', [0, 3])
def test_eagle_text_alone(past, tmp_path):
    "No pictures, labels or mask; an answer to text; with a cache before the tokens or without."
    file = golden('eagle/full_model')
    model, ids, cache = eagle_text(file), torch.randint(3, 60, (2, 8)), DynamicCache()
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **GREEDY)
    tensors = {'in.input_ids': ids[:, past:], 'in.gen_input_ids': ids, 'out.logits': model(ids).logits[:, past:]}
    tensors |= {'out.generated_ids': answer.sequences[:, 8:], 'out.gen_step_logits': torch.stack(answer.logits, 1)}
    if past:
        model(ids[:, :past], past_key_values=cache, use_cache=True)
        for i, layer in enumerate(cache.layers):
            tensors |= {f'in.past.{i}.key': layer.keys, f'in.past.{i}.value': layer.values}
    agrees(tmp_path, file, tensors)


@torch.no_grad()
@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('limit', [64, 14])
def test_eagle_crops_padding_and_length(side, limit, tmp_path):
    "Two crops a picture, rows cut and padded on either side, an answer after padding; all put together by hand."
    from mllm_replica.eagle.golden import settings_of
    from mllm_replica.eagle.model import EagleModel
    from mllm_replica.eagle.released import convert_official, official_config

    file = golden('eagle/full_model')
    mixture, text, pictures = file.config['fusion'], eagle_text(file), torch.randn(2, 2, 3, 64, 64)
    fields = dict(mm_vision_tower=mixture['towers'], mm_projector_type=file.config['projector'])
    settings = settings_of(mixture), mixture['input_size'], mixture['grid']
    model = EagleModel(official_config(file.config['llm'] | fields, *settings)).eval()
    model.load_state_dict(convert_official({n[2:]: t for n, t in weights(file).items()}, model))
    visual = [torch.cat([model.visual_embeds(crop[None])[0] for crop in crops]) for crops in pictures]
    parts = [file.tensors[f'in.{n}'] for n in ('input_ids', 'attention_mask', 'labels')]
    embeds, mask, labels = laid_out(*parts, visual, text.model.embed_tokens.weight, side, limit)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = text(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, labels=labels)
    tensors = inputs(file) | {'in.images': pictures, 'in.gen_images': pictures, 'in.gen_input_ids': parts[0]}
    tensors |= {'in.gen_attention_mask': parts[1], 'out.logits': out.logits, 'out.loss': out.loss[None]}
    tensors |= {'out.attention_mask': mask, 'out.image_tokens': torch.stack(visual)}
    order = mask.argsort(dim=1, stable=True)
    prompts = embeds.gather(1, order[..., None].expand_as(embeds)), mask.gather(1, order)
    answer = text.generate(inputs_embeds=prompts[0], attention_mask=prompts[1], max_new_tokens=3, **GREEDY)
    tensors |= {'out.generated_ids': answer.sequences, 'out.gen_step_logits': torch.stack(answer.logits, 1)}
    agrees(tmp_path, file, tensors, {'max_length': limit, 'padding_side': side}, 'logits only')


def test_eagle_prompt_in_chunks(tmp_path):
    file = golden('eagle/full_model')
    logits = file.tensors['out.logits']
    tensors = {name: t for name, t in inputs(file).items() if '.gen_' not in name}
    tensors |= {'out.chunked_logits': logits, 'out.logits': logits}
    agrees(tmp_path, file, tensors, {'chunk_size': 5}, notes='chunked_logits only at real positions')
