"Honeybee's full model, prompts and checkpoint adapter against the official code's numbers."

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoProcessor

from mllm_replica.data.language import byte_tokenizer
from mllm_replica.honeybee import prompts
from mllm_replica.honeybee.model import (
    HoneybeeModel,
    HoneybeeProcessor,
    convert_official,
    load_official,
    official_config,
    paper_config,
)
from mllm_replica.models.official import OfficialWeightsError, check_keys
from mllm_replica.models.vision import hidden_states

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / 'golden/honeybee'
TEXT = json.loads((GOLDEN / 'text_golden.json').read_text())
FULL = sorted(GOLDEN.glob('full_*.safetensors'))


def read(path):
    with safe_open(path, 'pt') as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return json.loads(file.metadata()['config']), tensors


def group(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def official_json(case):
    return {
        k: case[v]
        for k, v in dict(
            vision_config='vision_config', projector_config='projector_config', text_config='lm_config'
        ).items()
    }


def golden_model(path):
    case, tensors = read(path)
    model = HoneybeeModel(official_config(official_json(case))).eval()
    state = convert_official(group(tensors, 'w.'), model.config)
    check_keys(model.state_dict(), state)
    model.load_state_dict(state)
    return model, case, tensors


def close(found, expected, atol=1e-5, rtol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize('path', FULL, ids=lambda p: p.stem)
def test_full_model(path):
    model, case, t = golden_model(path)
    ids, mask, pixels = t['in.input_ids'], t.get('in.attention_mask'), t['in.pixel_values'].requires_grad_()
    close(torch.stack(hidden_states(model.vision_model, pixels, -1)), t['out.vision_hidden_states'])
    close(model.visual_features(pixels), t['out.visual_features'])
    close(model.visual_embeds(pixels), t['out.visual_embeds'])
    close(model.embed(ids, pixels), t['out.inputs_embeds'])
    merged = torch.ones_like(ids) if mask is None else mask
    assert torch.equal(merged.masked_fill(ids == -1, 1).float(), t['out.merged_attention_mask'])
    out = model(ids, mask, pixels, labels=t['in.labels'], return_logits=True)
    real = merged.bool() & (mask is not None or (ids != 0))
    close(out.logits[real], t['out.logits'][real])
    close(out.loss, t['out.loss'][0])
    out.loss.backward()
    close(pixels.grad, t['grad.in.pixel_values'], 1e-4, 1e-3)
    grads = convert_official({k: v for k, v in group(t, 'grad.w.').items()}, model.config)
    found = dict(model.named_parameters())
    assert grads and not set(grads) - set(found)
    for name, grad in grads.items():
        close(found[name].grad, grad, 1e-4, 1e-3)


@pytest.mark.parametrize('path', FULL, ids=lambda p: p.stem)
def test_generation(path):
    model, case, t = golden_model(path)
    ids = t['in.gen_input_ids']
    out = model.generate(
        ids,
        t['in.gen_attention_mask'],
        t['in.gen_pixel_values'],
        do_sample=False,
        max_new_tokens=case['generation']['max_new_tokens'],
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = out.sequences[:, ids.shape[1] :]
    assert torch.equal(new, t['out.generated_ids'][:, : new.shape[1]]) and bool(
        (t['out.generated_ids'][:, new.shape[1] :] == 0).all()
    )
    close(torch.stack(out.logits, 1), t['out.gen_scores'][:, : len(out.logits)])


@pytest.mark.parametrize('case', TEXT['encode'], ids=lambda c: f'{c["prompt"][-12:]!r}-{c["max_length"]}-{c["no_eos"]}')
def test_encode(case):
    ids, labels = prompts.encode_prompt(
        case['prompt'],
        byte_tokenizer(),
        case['num_visual_tokens'],
        max_length=case['max_length'],
        no_eos=case['no_eos'],
    )
    assert (ids, labels, len(ids)) == (case['input_ids'], case['labels'], case['seq_length'])
    assert case['attention_mask'] == [1] * len(ids)


def test_a_caption_is_cut_when_all_is_written():
    "As officially, so perhaps inside its image; a conversation stops before the image that does not fit."

    def read(prompt, **how):
        return prompts.encode_prompt(prompt, byte_tokenizer(), 6, max_length=3, **how)[0]

    assert read('[NO_PROMPT] <image> a') == [1, -1, -1, -1] and read('a<image>') == [1, 3 + ord('a')]
    assert prompts.encode_prompt('[NO_PROMPT] <image> a', byte_tokenizer(), 1, max_length=3, no_eos=True)[0] == [
        1,
        -1,
        3 + ord('a'),
    ]


def test_an_empty_answer_teaches_nothing():
    turns = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': ''}]
    assert not any(piece.supervised for piece in prompts.conversation_pieces(turns))


@pytest.mark.parametrize('case', TEXT['batch'])
def test_batch(case):
    batch = prompts.encode_batch(
        case['prompts'],
        byte_tokenizer(),
        case['num_visual_tokens'],
        max_length=case['max_length'],
        no_eos=case['no_eos'],
        pad_to_max=case['padding'] == 'max_length',
        padding_side=case['padding_side'],
    )
    assert all(batch[key].tolist() == case[key] for key in ('input_ids', 'labels', 'attention_mask', 'seq_length'))


@pytest.mark.parametrize('case', TEXT['templates'], ids=lambda c: f'{c["dataset"]}-{c["pattern_index"]}')
def test_templates(case):
    assert (
        prompts.templatize(case['dataset'], case['examples'], case['image_prompt'] is not None, case['pattern_index'])
        == case['text']
    )
    assert len(prompts.TEMPLATES[case['dataset']]) == case['num_patterns']


@pytest.mark.parametrize('case', TEXT['dedup'], ids=lambda c: f'{c["nturn"]}-{c["dedup"]}')
def test_dedup(case):
    rule = case['dedup'] or {'whitelist': 'all'}
    options = (
        {}
        if rule['whitelist'] == 'all'
        else dict(dedup_key=rule['key'], keep=rule['whitelist'] or (), online=rule.get('online', True))
    )
    assert [s | {'task_type': 'x'} for s in prompts.group_turns(case['raw'], case['nturn'], **options)] == case[
        'output'
    ]


def test_small_texts():
    names = {'include_answer_str': 'include_answer', 'sep': 'separator'}
    for c in TEXT['optionize']:
        assert prompts.optionize(c['options'], c['answer_idx'], **{names[k]: v for k, v in c['kwargs'].items()}) == (
            c['option_text'],
            c['answer_text'],
        )
    for c in TEXT['bbox']:
        assert prompts.bbox_text(c['xywh'], c['W'], c['H'], c['style']) == c['text']
    for c in TEXT['vsr_question']:
        assert prompts.vsr_question(c['caption']) == c['text']
    for c in TEXT['sqa_question']:
        assert prompts.sqa_question(c['question']) == c['parsed']
    for c in TEXT['sqa_answer']:
        assert prompts.sqa_answer(c['answer']) == c['parsed']


# official checkpoints


def paper_state(config):
    "Names and shapes of an official checkpoint at paper scale, as its sheet lists them, on the meta device."
    v, t = config.vision_config, config.text_config
    d, h = v.hidden_size, t.hidden_size

    def norm(name, width):
        return {f'{name}.{p}': [width] for p in ('weight', 'bias')}

    def linear(name, out, inner):
        return {f'{name}.weight': [out, inner], f'{name}.bias': [out]}

    shapes = {
        'embeddings.class_embedding': [d],
        'embeddings.patch_embedding.weight': [d, 3, 14, 14],
        'embeddings.position_embedding.weight': [config.num_patches + 1, d],
        'embeddings.position_ids': [1, config.num_patches + 1],
    }
    shapes |= norm('pre_layrnorm', d) | norm('post_layernorm', d)
    for i in range(24):
        layer = f'encoder.layers.{i}'
        for n in ('layer_norm1', 'layer_norm2'):
            shapes |= norm(f'{layer}.{n}', d)
        for n in 'qkv':
            shapes |= linear(f'{layer}.self_attn.{n}_proj', d, d)
        shapes |= (
            linear(f'{layer}.self_attn.out_proj', d, d)
            | linear(f'{layer}.mlp.fc1', 4096, d)
            | linear(f'{layer}.mlp.fc2', d, 4096)
        )
    shapes = {f'vision_model.vision_model.{k}': s for k, s in shapes.items()}
    text = {'model.embed_tokens.weight': [32000, h], 'model.norm.weight': [h], 'lm_head.weight': [32000, h]}
    for i in range(t.num_hidden_layers):
        layer = f'model.layers.{i}'
        text |= {f'{layer}.self_attn.{n}_proj.weight': [h, h] for n in 'qkvo'} | {
            f'{layer}.mlp.{n}_proj.weight': [t.intermediate_size, h] for n in ('gate', 'up')
        }
        text |= {
            f'{layer}.mlp.down_proj.weight': [h, t.intermediate_size],
            f'{layer}.input_layernorm.weight': [h],
            f'{layer}.post_attention_layernorm.weight': [h],
            f'{layer}.self_attn.rotary_emb.inv_freq': [64],
        }
    return shapes | {f'language_model.{k}': s for k, s in text.items()}


SHAPES = json.loads((GOLDEN / 'state_dict_shapes.json').read_text())


@pytest.mark.parametrize('name', SHAPES)
def test_paper_scale_keys(name):
    case = SHAPES[name]
    config = paper_config('13B' if '13B' in name else '7B', case['projector_config'])
    with torch.device('meta'):
        model = HoneybeeModel(config)
        state = {k: torch.empty(s) for k, s in (paper_state(config) | case['state_dict']).items()}
    assert sum(p.numel() for p in model.abstractor.parameters()) == case['parameters']
    assert config.visual_token_count() == case['projector_config']['num_query_tokens']
    check_keys(model.state_dict(), convert_official(state, config))
    del state['language_model.model.norm.weight']
    state['abstractor.surplus'] = torch.empty(2, device='meta')
    state['vision_model.vision_model.pre_layrnorm.bias'] = torch.empty(3, device='meta')
    with pytest.raises(OfficialWeightsError) as error:
        check_keys(model.state_dict(), convert_official(state, config))
    assert str(error.value).splitlines()[1:] == [
        f'missing     language_model.model.norm.weight [{config.text_config.hidden_size}]',
        'unexpected  abstractor.surplus [2]',
        'wrong shape vision_model.pre_layrnorm.bias: found [3], expected [1024]',
    ]


@pytest.fixture
def official_folder(tmp_path):
    case, tensors = read(GOLDEN / 'full_dabs_multi_image.safetensors')
    (tmp_path / 'config.json').write_text(
        json.dumps(official_json(case) | {'torch_dtype': 'float32', 'auto_map': {'AutoModel': 'evil.py'}})
    )
    return tmp_path, group(tensors, 'w.'), tensors


@pytest.mark.parametrize('form', ['safetensors', 'bin', 'sharded bin'])
def test_official_round_trip(official_folder, form):
    folder, weights, t = official_folder
    if form == 'safetensors':
        save_file(weights, folder / 'model.safetensors')
    elif form == 'bin':
        torch.save(weights, folder / 'pytorch_model.bin')
    else:
        halves = [dict(list(weights.items())[i::2]) for i in range(2)]
        names = [f'pytorch_model-0000{i + 1}-of-00002.bin' for i in range(2)]
        for half, name in zip(halves, names):
            torch.save(half, folder / name)
        (folder / 'pytorch_model.bin.index.json').write_text(
            json.dumps({'weight_map': {k: n for half, n in zip(halves, names) for k in half}})
        )
    model = load_official(folder)
    with torch.no_grad():
        logits = model(t['in.input_ids'], t['in.attention_mask'], t['in.pixel_values']).logits
    real = t['in.attention_mask'].bool()
    close(logits[real], t['out.logits'][real])
    model.save_pretrained(folder / 'ours')
    again = AutoModelForCausalLM.from_pretrained(folder / 'ours').eval()
    with torch.no_grad():
        assert torch.equal(again(t['in.input_ids'], t['in.attention_mask'], t['in.pixel_values']).logits, logits)


def test_half_precision_keeps_the_d_abstractor_exact(official_folder):
    folder, weights, t = official_folder
    save_file(
        {k: v if k.startswith('abstractor') else v.bfloat16() for k, v in weights.items()}, folder / 'model.safetensors'
    )
    model = load_official(folder, torch.bfloat16)
    assert model.language_model.lm_head.weight.dtype == model.vision_model.dtype == torch.bfloat16
    assert torch.equal(model.abstractor.reference_points, weights['abstractor.reference_points'])
    with torch.no_grad():
        close(model.visual_embeds(image_features=t['out.visual_features']), t['out.visual_embeds'])
        real = t['in.attention_mask'].bool()
        close(
            model(t['in.input_ids'], t['in.attention_mask'], t['in.pixel_values']).logits[real].float(),
            t['out.logits'][real],
            0.6,
            0.1,
        )


def test_official_folder_is_not_trusted(official_folder, tmp_path):
    folder, weights, _ = official_folder
    with pytest.raises(FileNotFoundError, match='no model.safetensors or pytorch_model.bin'):
        load_official(folder)
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': '../secret.safetensors'}}))
    with pytest.raises(FileNotFoundError, match='not files of'):
        load_official(folder)
    (folder / 'model.safetensors.index.json').unlink()

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / 'touched',))

    torch.save(weights | {'x': Evil()}, folder / 'pytorch_model.bin')
    with pytest.raises(Exception, match='[Ww]eights'):
        load_official(folder)
    assert not (tmp_path / 'touched').exists()


def test_old_position_table_and_config():
    case, tensors = read(GOLDEN / 'full_cabs_right_pad.safetensors')
    new = official_config(official_json(case))
    old_json = official_json(case)
    projector = old_json.pop('projector_config')
    old = official_config(
        old_json
        | dict(
            num_query_tokens=projector.pop('num_query_tokens'),
            hidden_size=40,
            visual_projector_config=projector | {'encoder_hidden_size': 32, 'use_cls': False},
        )
    )
    assert old.to_dict() == new.to_dict()
    weights = group(tensors, 'w.')
    table = weights['abstractor.pos_emb']
    old_weights = weights | {'abstractor.pos_emb': torch.cat([table[:, :1] + 7, table], 1)}
    assert torch.equal(convert_official(old_weights, old)['abstractor.pos_emb'], table)
    with pytest.raises(ValueError, match='text_config'):
        official_config({'vision_config': case['vision_config'], 'projector_config': case['projector_config']})
    with pytest.raises(ValueError, match=r"vision_config lacks \['patch_size'\]"):
        official_config(
            official_json(case)
            | {'vision_config': {k: v for k, v in case['vision_config'].items() if k != 'patch_size'}}
        )
    with pytest.raises(ValueError, match='encoder_type'):
        official_config(official_json(case) | {'vision_config': case['vision_config'] | {'encoder_type': 'eva'}})


def test_processor_round_trip(tmp_path):
    model, _, _ = golden_model(FULL[0])
    processor = HoneybeeProcessor.from_config(model.config, byte_tokenizer(), system='Talk.')
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    turns = [{'from': 'human', 'value': 'hi </s>'}, {'from': 'gpt', 'value': 'Üb'}]
    encoded = again.encode(dict(id='a', images=[], conversations=turns))
    assert vars(encoded) == vars(processor.encode(dict(id='a', images=[], conversations=turns)))
    assert [i for i in encoded.labels if i >= 0] == [3 + b for b in 'Üb'.encode()] + [2]
    assert encoded.input_ids.count(2) == 1  # the end token written as text stays text
