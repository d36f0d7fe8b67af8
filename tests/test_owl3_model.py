"mPLUG-Owl3's model: parity, causality, padding, cache, beams, checkpoints and wrong input."

import json, re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2ForCausalLM

from mllm_replica.models import parity
from mllm_replica.models.configuration import VisionLanguageConfig
from mllm_replica.owl3.components import GATES, HyperAttention
from mllm_replica.owl3.media import Media, Sight, image_attention
from mllm_replica.owl3.model import ConcatModel, Owl3Config, Owl3Model
from mllm_replica.owl3.released import convert_official, gate_of, load_official, official_config, paper_config

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / 'golden/owl3'
IMAGE = [3, 4, 5, 4, 6]
VARIANTS = [dict(gate=gate) for gate in GATES] + [
    dict(shared_norm=False, mi_rope=False),
    dict(fusion='pre_cross'),
    dict(fusion='post_cross'),
]
VISION = dict(
    hidden_size=24, image_size=42, intermediate_size=32, num_attention_heads=2, num_hidden_layers=3, patch_size=14
)
TEXT = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
ROWS = [[10, 11, *IMAGE, 12, 13, *IMAGE, 14, 15], [20, *IMAGE, 21], [30, 31, 32]]
COUNTS = [2, 1, 0]


def build(**changes):
    torch.manual_seed(0)
    model = Owl3Model(
        Owl3Config(vision_config=VISION, text_config=TEXT, hyper_layers=[0, 2], placeholder_ids=IMAGE, **changes)
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith('.gate'):
            torch.nn.init.constant_(parameter, 0.7)  # scales that start at zero would hide the images
    return model


def pixels():
    return torch.randn(3, 3, 42, 42, generator=torch.Generator().manual_seed(1))


def padded(rows, side):
    width = max(map(len, rows))

    def pad(row, fill):
        return fill + row if side == 'left' else row + fill

    ids = torch.tensor([pad(row, [0] * (width - len(row))) for row in rows])
    return ids, torch.tensor([pad([1] * len(row), [0] * (width - len(row))) for row in rows])


def alone(row):
    "Input of one sample: ids and its pixels."
    first = sum(COUNTS[:row])
    return torch.tensor([ROWS[row]]), (pixels()[first : first + COUNTS[row]] if COUNTS[row] else None)


@pytest.mark.parametrize('path', sorted(GOLDEN.glob('*.safetensors')), ids=lambda p: p.stem)
def test_official_numbers(path):
    report = parity.check_file(path)
    assert not report.problems and report.compared, report


def test_an_altered_number_is_noticed(tmp_path):
    golden = parity.read_golden(GOLDEN / 'hyper_attention.safetensors')
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in golden.config.pop('metadata').items()}
    tensors = {**golden.tensors, 'out.visual_kv_proj': golden.tensors['out.visual_kv_proj'].clone()}
    tensors['out.visual_kv_proj'][0, 0, 0] += 1e-3
    save_file(tensors, tmp_path / 'a.safetensors', metadata | {'config': json.dumps(golden.config)})
    problems = parity.check_file(tmp_path / 'a.safetensors').problems
    assert len(problems) == 1 and problems[0].startswith('out.visual_kv_proj: 1 of')


@pytest.mark.parametrize('changes', VARIANTS, ids=str)
@torch.no_grad()
def test_batches_and_padding_give_the_single_answer(changes):
    model = build(**changes)
    for side in ('left', 'right'):
        ids, mask = padded(ROWS, side)
        logits = model(ids, mask, pixels()).logits
        for row in range(3):
            one, images = alone(row)
            assert torch.allclose(logits[row][mask[row].bool()], model(one, None, images).logits[0], atol=2e-5)


@pytest.mark.parametrize('limit', (0, 2**22), ids=('runs', 'padded'))
@pytest.mark.parametrize('changes', VARIANTS, ids=str)
@torch.no_grad()
def test_an_image_changes_nothing_before_it(changes, limit, monkeypatch):
    monkeypatch.setattr('mllm_replica.owl3.media._DENSE', limit)
    model, (ids, images) = build(**changes), alone(0)
    other = images.clone()
    other[1] += 1
    same = (model(ids, None, images).logits == model(ids, None, other).logits).all(-1)[0]
    assert same[:10].all() and not same[10:].any()  # the second placeholder starts at token 9
    other = images.clone()
    other[0] += 1
    assert (model(ids, None, images).logits == model(ids, None, other).logits).all(-1)[0].sum() == 3


@pytest.mark.parametrize('changes', VARIANTS, ids=str)
def test_decoding_with_cache_beams_and_any_padding(changes):
    model, options = build(**changes), dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    for beams in (1, 3):
        one = torch.cat(
            [
                model.generate(ids, None, images, num_beams=beams, **options)[:, -6:]
                for ids, images in map(alone, range(3))
            ]
        )
        for side in ('left', 'right'):
            ids, mask = padded(ROWS, side)
            assert torch.equal(model.generate(ids, mask, pixels(), num_beams=beams, **options)[:, -6:], one)
    ids, images = alone(0)
    slow, fast = (model.generate(ids, None, images, use_cache=cached, **options) for cached in (False, True))
    assert torch.equal(slow, fast)


@pytest.mark.parametrize('gate', GATES)
@pytest.mark.parametrize('limit', (0, 2**22))
def test_mixed_precision(gate, limit, monkeypatch):
    monkeypatch.setattr('mllm_replica.owl3.media._DENSE', limit)
    model, (ids, mask) = build(gate=gate), padded(ROWS, 'right')
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(ids, mask, pixels(), labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    assert torch.allclose(loss, model(ids, mask, pixels(), labels=ids.masked_fill(mask == 0, -100)).loss, rtol=0.02)


@pytest.mark.parametrize('changes', [{}, dict(mi_rope=False), dict(fusion='pre_cross')], ids=str)
def test_images_projected_in_parts_give_the_same_results(changes, monkeypatch):
    found, parts = [], []
    for at_once in (2**23, 1):  # all, and one image
        monkeypatch.setattr('mllm_replica.owl3.media._AT_ONCE', at_once)
        model, (ids, mask) = build(**changes), padded(ROWS, 'right')
        layer = model.get_decoder().layers[0]
        (layer.cross_attn.kv_proj if 'fusion' in changes else layer.self_attn.v_kv_proj).register_forward_hook(
            lambda _, given, __: parts.append(len(given[0]))
        )
        model(ids, mask, pixels(), labels=ids).loss.backward()
        with torch.no_grad():
            logits = model(ids, mask, pixels()).logits[mask.bool()]
        assert torch.allclose(
            logits, model(ids, mask, pixels()).logits[mask.bool()], atol=1e-5
        )  # written in place, or joined for the gradients
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {'logits': logits})
    assert parts == [3] * 3 + [1] * 9
    assert found[0].keys() == found[1].keys() and all(
        torch.allclose(found[0][n], found[1][n], atol=1e-5) for n in found[0]
    )


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize('limit', (0, 2**22), ids=('runs', 'padded'))
def test_gradient_checkpointing_changes_nothing(limit, dtype, monkeypatch):
    monkeypatch.setattr('mllm_replica.owl3.media._DENSE', limit)
    monkeypatch.setattr('mllm_replica.owl3.media._AT_ONCE', 1)
    model, (ids, mask) = build().train(), padded(ROWS, 'right')
    found, calls, states = [], [], HyperAttention.visual_states
    monkeypatch.setattr(
        HyperAttention, 'visual_states', lambda self, *args: calls.append(self.layer_idx) or states(self, *args)
    )
    for used in (False, True):
        if used:
            model.gradient_checkpointing_enable({'use_reentrant': False})
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(ids, mask, pixels(), labels=ids).loss
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert sorted(calls) == [0] * 3 + [2] * 3  # forward, forward, and once more when checkpoints are recomputed


@pytest.mark.parametrize('limit', [0, 2**22])
@pytest.mark.parametrize(
    'kind, stance',
    [
        ('eager', 'default'),
        ('flex_attention', 'force_eager'),
        pytest.param('flex_attention', 'default', marks=pytest.mark.nightly),
    ],
)  # compiled
@torch.no_grad()
def test_attention_implementations_agree(kind, stance, limit, monkeypatch):
    monkeypatch.setattr('mllm_replica.owl3.media._DENSE', limit)
    model, (ids, mask) = build(), padded(ROWS, 'left')
    first = model(ids, mask, pixels()).logits
    model.set_attn_implementation(kind)
    with torch.compiler.set_stance(stance):
        found = model(ids, mask, pixels()).logits
    assert torch.allclose(found[mask.bool()], first[mask.bool()], atol=5e-5)


@torch.no_grad()
def test_embeddings_instead_of_ids():
    model, (ids, images) = build(), alone(0)
    embeds, starts = model.get_input_embeddings()(ids), [[2, 9]]
    assert torch.equal(
        model(inputs_embeds=embeds, pixel_values=images, media_starts=starts).logits, model(ids, None, images).logits
    )
    with pytest.raises(ValueError, match='need media_starts'):
        model(inputs_embeds=embeds, pixel_values=images)
    with pytest.raises(ValueError, match='samples \\[0\\] have placeholders but neither'):
        model(inputs_embeds=embeds, media_starts=starts)
    with pytest.raises(ValueError, match='media_starts of 1 samples, 2 rows'):
        model(inputs_embeds=embeds.repeat(2, 1, 1), pixel_values=images, media_starts=starts)
    cache = model(ids, None, images, use_cache=True).past_key_values
    again = model(ids, None, images, use_cache=True).past_key_values
    token = torch.tensor([[40]])
    assert torch.equal(
        model(inputs_embeds=model.get_input_embeddings()(token), past_key_values=cache).logits,
        model(token, past_key_values=again).logits,
    )


@pytest.mark.parametrize('mode', (torch.no_grad, torch.inference_mode))
def test_a_cache_made_without_gradients_serves_a_step_with_them(mode):
    model, (ids, images) = build(), alone(0)
    with mode():
        caches = [model(ids, None, images, use_cache=True).past_key_values for _ in range(2)]
    step = dict(input_ids=torch.tensor([[40]]), labels=None)
    with mode():
        expected = model(**step, past_key_values=caches[0]).logits
    model.requires_grad_(mode is torch.no_grad)  # what inference mode made takes no part in a gradient
    assert torch.equal(model(**step, past_key_values=caches[1]).logits, expected)


@torch.no_grad()
def test_an_emptied_cache_has_forgotten_the_images():
    model, (ids, images) = build(), alone(0)
    text = torch.arange(30, 45)[None]
    cache = model(ids, None, images, use_cache=True).past_key_values
    cache.crop(-ids.shape[1])
    assert torch.equal(model(text, past_key_values=cache).logits, model(text).logits)
    assert torch.allclose(
        model(ids[:, :1], past_key_values=cache).logits[0, -1],
        model(torch.cat([text, ids[:, :1]], 1)).logits[0, -1],
        atol=2e-5,
    )


@torch.no_grad()
def test_images_that_nobody_sees_or_none_at_all():
    model, text = build(), torch.tensor([ROWS[2]])
    expected = model(text).logits
    unseen = model(text, None, pixels()[:2], media_starts=[[2, 7]]).logits  # the last token, and beyond the text
    assert torch.allclose(unseen, expected, atol=2e-5)
    none = Media(torch.zeros(0, 9, 48), [[], []])
    none.rotary(model.get_decoder().rotary_emb)
    assert torch.allclose(model(text.repeat(2, 1), media=none).logits[0], expected[0], atol=2e-5)


def test_images_out_of_order_are_refused():
    model, (ids, images) = build(), alone(0)
    with pytest.raises(
        ValueError, match=r'sample 0: placeholders at \[9, 2\]; give images and places in reading order'
    ):
        model(ids, None, images, media_starts=[[9, 2]])
    with pytest.raises(ValueError, match='media_starts of 1 samples, 2 rows'):
        model(ids.repeat(2, 1), None, images, media_starts=[[2, 9]])


def test_what_a_cache_and_positions_cannot_say():
    model, (ids, images) = build(), alone(1)
    cache = model(torch.tensor([ROWS[2]]), use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match='holds text without images'):
        model(ids, None, images, past_key_values=cache)
    with pytest.raises(NotImplementedError, match='start again within a row'):
        model(ids, None, images, position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 0]]))
    assert torch.equal(model(torch.tensor([ROWS[2]]), None, images[:0]).logits, model(torch.tensor([ROWS[2]])).logits)


def test_an_answer_may_spell_the_placeholder(monkeypatch):
    model = build()
    with torch.no_grad():  # a model that says 3 4 5 4 6 whatever it reads
        spelled = iter(IMAGE * 2)
        head = model.language_model.lm_head
        monkeypatch.setattr(
            head,
            'forward',
            lambda x: torch.nn.functional.one_hot(torch.tensor(next(spelled)), 96).float().expand(*x.shape[:2], -1),
        )
        out = model.generate(
            torch.tensor([ROWS[2]]),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=False,
        )
    assert out[0, -6:].tolist() == [*IMAGE, IMAGE[0]]


@torch.no_grad()
def test_the_cache_keeps_keys_and_values_only():
    model, (ids, images) = build(), alone(0)
    media = model(ids, None, images, use_cache=True).past_key_values.media
    assert (
        not len(media.embeds) and sorted(media.states) == [0, 2] and all(len(k) == 18 for k, _ in media.states.values())
    )


@torch.no_grad()
def test_decoding_projects_no_image_again(monkeypatch):
    model, (ids, images), calls = build(), alone(0), []
    made = HyperAttention.visual_states
    monkeypatch.setattr(HyperAttention, 'visual_states', lambda *a, **k: calls.append(1) or made(*a, **k))
    model.generate(ids, None, images, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert len(calls) == 2  # once per hyper layer


@torch.no_grad()
def test_a_prompt_of_one_token_can_see_an_image():
    model = build()
    features = torch.randn(1, 9, 24)
    seen = model(
        torch.tensor([[10]]), image_features=features, media_starts=[[-1]]
    ).logits  # the image stands before the text
    assert not torch.allclose(seen, model(torch.tensor([[10]])).logits)


def test_without_images_it_is_qwen2():
    model = build()
    plain = Qwen2ForCausalLM(model.config.text_config).eval()
    plain.load_state_dict(
        {
            k: v
            for k, v in model.language_model.state_dict().items()
            if 'v_kv_proj' not in k and 'self_attn.gate' not in k
        }
    )
    ids = torch.randint(7, 96, (2, 20))
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_text_is_untouched_by_stage_one():
    model, ids = build(), torch.tensor([ROWS[2]])
    before = model(ids).logits.detach()
    stage = re.compile(r'^vision2text_model\.|v_kv_proj|self_attn\.gate')
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(stage.search(name)))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    one, images = alone(0)
    for _ in range(3):
        optimiser.zero_grad()
        model(one, None, images, labels=one).loss.backward()
        optimiser.step()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize('seed', range(4))
def test_runs_and_padded_attention_agree(seed, monkeypatch):
    torch.manual_seed(seed)
    counts = torch.randint(0, 4, (3,)).tolist()
    counts[seed % 3] = 2
    starts = [sorted(torch.randperm(9)[:n].tolist()) for n in counts]
    media = Media(torch.randn(sum(counts), 5, 8), starts)
    sight = Sight.of(media, torch.arange(12).expand(6, -1))  # two beams each
    query, keys, values = torch.randn(6, 4, 12, 8, requires_grad=True), *torch.randn(2, sum(counts) * 5, 2, 8)
    found = []
    for limit in (0, 2**22):
        monkeypatch.setattr('mllm_replica.owl3.media._DENSE', limit)
        out = torch.where(sight.sees[:, None, :, None], image_attention(query, keys, values, sight), 0)
        found += [out, *torch.autograd.grad(out.square().sum(), query)]
    assert torch.allclose(found[0], found[2], atol=1e-6) and torch.allclose(found[1], found[3], atol=1e-5)


def recorded_keys():
    "Names and shapes of the released 7B file, without the unused pooling head."
    D, F, V, W = 3584, 18944, 151851, 1152
    keys = {
        'language_model.model.embed_tokens.weight': (V, D),
        'language_model.lm_head.weight': (V, D),
        'language_model.model.norm.weight': (D,),
        'vision_model.embeddings.patch_embedding.weight': (W, 3, 14, 14),
        'vision_model.embeddings.patch_embedding.bias': (W,),
        'vision_model.embeddings.position_embedding.weight': (729, W),
        'vision2text_model.weight': (D, W),
        'vision2text_model.bias': (D,),
    }
    for i in range(28):
        layer = {
            'input_layernorm.weight': (D,),
            'post_attention_layernorm.weight': (D,),
            'self_attn.q_proj.weight': (D, D),
            'self_attn.q_proj.bias': (D,),
            'self_attn.o_proj.weight': (D, D),
            'mlp.gate_proj.weight': (F, D),
            'mlp.up_proj.weight': (F, D),
            'mlp.down_proj.weight': (D, F),
        }
        for p in 'kv':
            layer |= {f'self_attn.{p}_proj.weight': (512, D), f'self_attn.{p}_proj.bias': (512,)}
        if i in (0, 8, 16, 24):
            layer |= {
                'self_attn.v_kv_proj.weight': (1024, D),
                'self_attn.v_kv_proj.bias': (1024,),
                'self_attn.gate_proj.0.weight': (128, 128),
                'self_attn.gate_proj.0.bias': (128,),
            }
        keys |= {f'language_model.model.layers.{i}.{name}': shape for name, shape in layer.items()}
    sizes = {'layer_norm1': (W,), 'layer_norm2': (W,), 'mlp.fc1': (4304, W), 'mlp.fc2': (W, 4304)}
    sizes |= {f'self_attn.{p}_proj': (W, W) for p in ('q', 'k', 'v', 'out')}
    for name, shape in sizes.items():
        for i in range(27):
            keys |= {
                f'vision_model.encoder.layers.{i}.{name}.weight': shape,
                f'vision_model.encoder.layers.{i}.{name}.bias': shape[:1],
            }
    return keys | {'vision_model.post_layernorm.weight': (W,), 'vision_model.post_layernorm.bias': (W,)}


def test_released_sizes():
    found = {
        size: (
            t.hidden_size,
            t.intermediate_size,
            t.num_hidden_layers,
            t.num_attention_heads,
            t.num_key_value_heads,
            t.tie_word_embeddings,
            c.gate,
            [layer + 1 for layer in c.hyper_layers],
        )
        for size in ('7B', '2B', '1B')
        for c in [paper_config(size)]
        for t in [c.text_config]
    }
    assert found == {
        '7B': (3584, 18944, 28, 28, 4, False, 'adaptive', [1, 9, 17, 25]),
        '2B': (1536, 8960, 28, 12, 2, True, 'static', [7, 15, 23, 26]),
        '1B': (896, 4864, 24, 14, 2, True, 'static', [6, 13, 20, 22]),
    }


@pytest.mark.parametrize('size,stage_one', [('7B', 18.88e6), ('2B', None), ('1B', None)])
def test_released_keys(size, stage_one):
    config = paper_config(size)
    with torch.device('meta'):
        model = Owl3Model(config)
    text, vision = config.text_config, config.vision_config
    official = {
        'hyper_layers': [i + 1 for i in config.hyper_layers],
        'vision_config': vision.to_dict(),
        **text.to_dict(),
    }
    state = dict(model.state_dict())
    D, G, d = text.hidden_size, text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    hyper = sorted(int(re.search(r'layers\.(\d+)', name)[1]) for name in state if name.endswith('v_kv_proj.weight'))
    assert hyper == config.hyper_layers
    assert all(
        state[f'language_model.model.layers.{i}.self_attn.v_kv_proj.weight'].shape == (2 * G * d, D) for i in hyper
    )
    gates = {'adaptive': ('gate_proj.0.weight', (d, d)), 'static': ('gate', (D,))}[config.gate]
    assert all(state[f'language_model.model.layers.{i}.self_attn.{gates[0]}'].shape == gates[1] for i in hyper)
    assert state['vision_model.embeddings.position_embedding.weight'].shape == (729, 1152) and state[
        'vision2text_model.weight'
    ].shape == (D, 1152)
    if size == '7B':
        assert {name: tuple(t.shape) for name, t in state.items()} == recorded_keys()
    extra = {'vision_model.head.probe': torch.empty(1, 1, 1152, device='meta')}
    if text.tie_word_embeddings:
        state.pop('language_model.lm_head.weight')
    ours, unused = convert_official(state | extra, official_config(official, gate_of(list(state))))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert unused == ['vision_model.head.probe']
    if stage_one:
        new = sum(
            p.numel()
            for name, p in model.named_parameters()
            if re.search(r'^vision2text_model\.|v_kv_proj|self_attn\.gate', name)
        )
        assert round(new, -4) == stage_one


def official_folder(folder, model, **changes):
    text = model.config.text_config.to_dict()
    content = {
        **text,
        'hyper_layers': [i + 1 for i in model.config.hyper_layers],
        'vision_config': model.config.vision_config.to_dict(),
    } | changes
    (folder / 'config.json').write_text(json.dumps({k: v for k, v in content.items() if k != 'rope_parameters'}))
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def test_official_checkpoint_and_what_is_missing(tmp_path):
    model = build(gate='static')
    state = official_folder(tmp_path, model)
    save_file(state | {'vision_model.head.probe': torch.zeros(1, 1, 24)}, tmp_path / 'model.safetensors')
    loaded = load_official(tmp_path)
    assert (
        loaded.unused_keys == ['vision_model.head.probe']
        and loaded.config.gate == 'static'
        and loaded.config.hyper_layers == [0, 2]
    )
    ids = torch.tensor([ROWS[2]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    lacking = {k: v for k, v in state.items() if not k.startswith('language_model.model.layers.2.self_attn.')}
    save_file(lacking, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match='missing .*layers.2.self_attn.v_kv_proj.weight'):
        load_official(tmp_path)
    with pytest.raises(ValueError, match='found gates \\[\\]'):
        gate_of(['vision_model.x'])


def test_saved_and_loaded(tmp_path):
    model, (ids, images) = build(gate='scalar'), alone(0)
    model.save_pretrained(tmp_path)
    assert torch.equal(Owl3Model.from_pretrained(tmp_path)(ids, None, images).logits, model(ids, None, images).logits)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(
        {k: v for k, v in state.items() if not k.endswith('layers.2.self_attn.gate')},
        tmp_path / 'model.safetensors',
        {'format': 'pt'},
    )
    with pytest.raises(ValueError, match='lacks 1 weights of the image layers'):
        Owl3Model.from_pretrained(tmp_path)


def test_tied_embeddings_survive(tmp_path):
    torch.manual_seed(0)
    model = Owl3Model(
        Owl3Config(
            vision_config=VISION,
            text_config=TEXT | {'tie_word_embeddings': True},
            hyper_layers=[0, 2],
            placeholder_ids=IMAGE,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    loaded, (ids, images) = Owl3Model.from_pretrained(tmp_path), alone(0)
    assert loaded.language_model.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(ids, None, images).logits, model(ids, None, images).logits)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(pixel_values=pixels()), '2 placeholders in the text'),
        (dict(pixel_values=pixels()[:1]), '2 placeholders in the text'),
        (dict(), 'samples \\[0\\] have placeholders but neither'),
    ],
    ids=['more', 'fewer', 'none'],
)
def test_images_must_fit_placeholders(change, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.tensor([ROWS[0]]), **change)


@pytest.mark.parametrize(
    'text, fits', [(59, True), (60, False), (63, False)]
)  # before the five tokens of a placeholder
def test_images_stay_within_the_context(text, fits):
    model, images = build(), pixels()[:1]
    ids = torch.tensor([[8] * text + IMAGE])
    assert model.config.text_config.max_position_embeddings == 64
    if fits:
        assert model(ids, None, images).logits.isfinite().all()
    else:
        with pytest.raises(ValueError, match='sample 0: an image reaches beyond the 64 positions'):
            model(ids, None, images)


def test_concatenated_images_stay_within_the_context():
    config = VisionLanguageConfig(vision_config=VISION, text_config=TEXT)
    model, patches = ConcatModel(config).eval(), config.visual_token_count()

    def row(text):
        return torch.tensor([[8] * text + [config.image_token_id] * patches + [8]])

    assert model(row(64 - patches), None, pixels()[:1]).logits.isfinite().all()
    with pytest.raises(ValueError, match='sample 0: an image reaches beyond the 64 positions'):
        model(row(65 - patches), None, pixels()[:1])
    with pytest.raises(ValueError, match='beyond the 64 positions'):
        model.generate(row(65 - patches), pixel_values=pixels()[:1], max_new_tokens=1)


def test_a_short_row_beside_a_long_text_fits():
    config = VisionLanguageConfig(vision_config=VISION, text_config=TEXT | {'pad_token_id': 0})
    model, patches = ConcatModel(config).eval(), config.visual_token_count()
    short = [config.image_token_id] * patches + [8]
    rows = [[9] * 70, [0] * (70 - len(short)) + short]
    assert model(torch.tensor(rows), (torch.tensor(rows) != 0).long(), pixels()[:1]).logits.isfinite().all()


@torch.no_grad()
def test_a_cache_cut_in_front_of_an_image_is_refused():
    model, (ids, images) = build(), alone(0)

    def cut(length):
        return (cache := model(ids, None, images, use_cache=True).past_key_values).crop(length - ids.shape[1]) or cache

    rest = torch.tensor([[40, 41]])
    assert torch.allclose(
        model(rest, past_key_values=cut(14)).logits,
        model(torch.cat([ids[:, :14], rest], 1), None, images).logits[:, -2:],
        atol=1e-5,
    )
    with pytest.raises(
        NotImplementedError, match='sample 0: the cache was cut to 13 tokens, its last image ends after 9'
    ):
        model(rest, past_key_values=cut(13))
    halves = model(
        ids[:, :5], None, images, media_starts=[[2, 9]], use_cache=True
    ).past_key_values  # a prompt in parts is not cut
    assert torch.allclose(
        model(ids[:, 5:], past_key_values=halves).logits[:, -1], model(ids, None, images).logits[:, -1], atol=1e-5
    )


def test_other_wrong_input():
    model, (ids, images) = build(), alone(1)
    cache = model(ids, None, images, use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match='already holds the images'):
        model(ids, None, images, past_key_values=cache)
    with pytest.raises(NotImplementedError, match='packed rows'):
        model(ids, torch.zeros(1, 1, 7, 7), images)
    with pytest.raises(ValueError, match="gate is 'none'; expected one of"):
        build(gate='none')
    with pytest.raises(ValueError, match='expected some of 0…3, not \\[4\\]'):
        Owl3Model(Owl3Config(vision_config=VISION, text_config=TEXT, hyper_layers=[0, 4], placeholder_ids=IMAGE))
    with pytest.raises(ValueError, match='config.json lacks \\[.hyper_layers'):
        official_config({**TEXT, 'vision_config': VISION})
