"Under other hands: models on disk, attention and dtypes by name, folders that are not ours, compiled graphs, adapters."

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import batch_of, model_of
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, StaticCache
from variants import VARIANTS, variant

from mllm_replica.core.registry import PAPERS
from mllm_replica.models.parts import NamedAttention, weight_of

torch.set_num_threads(1)
GREEDY = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
USUAL = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


@pytest.fixture(params=[*PAPERS, *VARIANTS], scope='module')
def model(request):
    return variant(request.param) if request.param in VARIANTS else model_of(request.param)


@pytest.fixture(params=[*PAPERS, *(pytest.param(name, marks=pytest.mark.nightly) for name in VARIANTS)], scope='module')
def traced(request):
    return variant(request.param) if request.param in VARIANTS else model_of(request.param)


@pytest.fixture(params=PAPERS, scope='module')
def toy(request):
    return model_of(request.param)


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp('saved')
    model.save_pretrained(place)
    return place


def supervised(batch):
    return batch['input_ids'].masked_fill(batch['attention_mask'] == 0, -100)


def logits(model, batch):
    "At real positions."
    with torch.no_grad():
        return model(**batch).logits[batch['attention_mask'].bool()]


# disk
def same_as(model, other):
    "Logits, loss and answers of two models."
    batch = batch_of(model)
    assert torch.equal(logits(other, batch), logits(model, batch))
    with torch.no_grad():
        losses = [each(**batch, labels=supervised(batch)).loss for each in (model, other)]
        alone = [each(**batch, labels=supervised(batch), return_logits=False).loss for each in (model, other)]
    assert torch.equal(*losses) and torch.equal(*alone)
    assert torch.equal(model.generate(**batch, **GREEDY), other.generate(**batch, **GREEDY))


def test_each_part_may_lie_on_disk(model, folder, tmp_path):
    names = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
    for away in names:
        places = {name: 'disk' if name == away else 'cpu' for name, _ in model.named_children()}
        loaded = type(model).from_pretrained(folder, device_map=places, offload_folder=tmp_path / away)
        assert all(p.is_meta == name.startswith(f'{away}.') for name, p in loaded.named_parameters())
        same_as(model, loaded)


def test_all_may_lie_on_disk(model, folder, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map={'': 'disk'}, offload_folder=tmp_path)
    assert all(p.is_meta for p in loaded.parameters())
    same_as(model, loaded)


@pytest.mark.parametrize('share', [0.2, 0.5, 0.8])
def test_a_small_memory(model, folder, tmp_path, share):
    memory = {'cpu': int(share * sum(p.nbytes for p in model.parameters()))}
    loaded = type(model).from_pretrained(folder, device_map='auto', max_memory=memory, offload_folder=tmp_path)
    assert 'disk' in loaded.hf_device_map.values()
    assert {''} | loaded.hf_device_map.keys() <= {name for name, _ in model.named_modules()}  # no weight by itself
    same_as(model, loaded)


def test_embeddings_find_their_images_from_disk(toy, tmp_path):
    grown = copy.deepcopy(toy)
    grown.resize_token_embeddings(toy.config.text_config.vocab_size + 5)  # the placeholder has an embedding now
    grown.save_pretrained(tmp_path)
    loaded = type(toy).from_pretrained(tmp_path, device_map={'': 'disk'}, offload_folder=tmp_path / 'away')
    batch, ids = batch_of(toy), dict(media_starts=[[2], [1]]) if hasattr(toy.config, 'placeholder_ids') else {}
    given = {name: batch[name] for name in ('attention_mask', 'pixel_values')} | ids
    given['inputs_embeds'] = grown.get_input_embeddings()(batch['input_ids'])
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, grown(**given).logits)


def test_a_lacking_connector_is_found_on_disk_too(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    state = load_file(tmp_path / 'model.safetensors')
    lacking = next(name for name in state if name.startswith(f'{toy.connector_name}.'))
    save_file({k: v for k, v in state.items() if k != lacking}, tmp_path / 'model.safetensors', {'format': 'pt'})
    for places in ({'': 'cpu'}, {'': 'disk'}):
        with pytest.raises(ValueError, match='the checkpoint lacks 1 weights'):
            type(toy).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / 'away')


# attention
@pytest.mark.parametrize(
    'names',
    [
        'eager',
        'sdpa',
        {'vision_config': 'eager', 'text_config': 'sdpa', '': 'sdpa'},
        {'vision_config': 'sdpa', 'text_config': 'eager'},
    ],
    ids=str,
)
def test_attention_by_name(model, folder, names):
    reference, batch, own = logits(model, batch_of(model)), batch_of(model), copy.deepcopy(model)
    loaded = type(model).from_pretrained(folder, attn_implementation=names)
    own.set_attn_implementation(names)
    for each in (loaded, own):
        for part in ('vision', 'text'):
            wanted = names if isinstance(names, str) else names[f'{part}_config']
            held = each.vision_model if part == 'vision' else each.language_model
            inside = [
                m.config for m in held.modules() if isinstance(m, NamedAttention) or hasattr(m, 'get_input_embeddings')
            ]
            assert {config._attn_implementation for config in inside} == {wanted}
        torch.testing.assert_close(logits(each, batch), reference, rtol=0, atol=1e-5)


def test_the_default_is_pytorch_s_kernel(model, folder):
    loaded, named = type(model).from_pretrained(folder), type(model).from_pretrained(folder, attn_implementation='sdpa')
    assert torch.equal(logits(loaded, batch_of(model)), logits(named, batch_of(model)))


@pytest.mark.parametrize('names', ['none', {'vision_config': 'none'}, {'text_config': 'none'}], ids=str)
def test_unknown_attention(model, folder, names):
    for ask in (
        lambda: type(model).from_pretrained(folder, attn_implementation=names),
        lambda: copy.deepcopy(model).set_attn_implementation(names),
    ):
        with pytest.raises(ValueError, match='attn_implementation="none"` is not supported'):
            ask()


@pytest.mark.parametrize('dtype', [torch.bfloat16, 'bfloat16', torch.float16, 'auto', None], ids=str)
def test_dtypes(model, folder, dtype):
    loaded = type(model).from_pretrained(folder, dtype=dtype)
    wanted = {'auto': torch.float32, 'bfloat16': torch.bfloat16, None: torch.float32}.get(dtype, dtype)
    exact = tuple(loaded._keep_in_fp32_modules_strict or ())  # the D-Abstractor, as officially
    found = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert {dtype for name, dtype in found.items() if not name.startswith(exact)} == {wanted}
    assert {dtype for name, dtype in found.items() if name.startswith(exact)} <= {torch.float32}
    batch = batch_of(model)
    assert loaded(**batch).logits.dtype == wanted and len(loaded.generate(**batch, **GREEDY)) == 2
    torch.testing.assert_close(logits(loaded, batch).float(), logits(model, batch), rtol=0, atol=0.3)


# folders
OFFICIAL = [
    dict(model_type='mplug_owl2', hidden_size=40, visual_config=dict(visual_model={}, visual_abstractor={})),
    dict(model_type='llava', hidden_size=40, mm_vision_tower='clip', mm_projector_type='linear'),
    dict(model_type='eagle_llama', hidden_size=40, mm_vision_tower='clip-448;convnext-1024'),
    dict(
        model_type='mplugowl3', hidden_size=40, hyper_layers=[1], vision_config=dict(model_type='siglip_vision_model')
    ),
    dict(model_type='mllm', vision_config={}, text_config={}, visual_projector_config={}),
    dict(model_type='honeybee', vision_config={}, text_config={}, projector_config={}),
    dict(vision_config={}, text_config={}, projector_config={}),
    dict(hidden_size=40, num_hidden_layers=2),
    {},
]


@pytest.mark.parametrize('content', OFFICIAL, ids=str)
def test_an_official_folder_is_not_ours(toy, tmp_path, content):
    (tmp_path / 'config.json').write_text(json.dumps(content))
    save_file({'model.embed_tokens.weight': torch.zeros(2, 3)}, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match='load_official.*mllm-replica convert SRC DST') as error:
        type(toy).from_pretrained(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', ['mplug_owl2', 'eagle_llama', 'mplugowl3', 'mllm', 'honeybee'])
def test_auto_classes_say_it_too(tmp_path, kind):
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type=kind, vision_config={}, text_config={})))
    with pytest.raises(ValueError, match=f"^config.json has model_type '{kind}'.*mllm-replica convert SRC DST"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize('text', ['', '{"model_type": "ow', '[1, 2]', '3', 'null', '\xff\xfe', '[' * 10_000])
def test_a_damaged_configuration(toy, tmp_path, text):
    toy.save_pretrained(tmp_path)
    (tmp_path / 'config.json').write_bytes(text.encode('latin-1'))
    with pytest.raises((ValueError, OSError), match='config.json'):
        type(toy).from_pretrained(tmp_path)


@pytest.mark.parametrize('part', ['vision_config', 'text_config', 'connector_config', 'model_type'])
@pytest.mark.parametrize('value', [None, 'clip', 3, []], ids=str)
def test_a_configuration_without_a_part(toy, tmp_path, part, value):
    toy.save_pretrained(tmp_path)
    content = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(content | {part: value}))
    with pytest.raises(ValueError, match=f'^config.json .*{part}'):
        type(toy).from_pretrained(tmp_path)


def test_a_folder_of_another_paper(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    other = next(model_of(paper) for paper in PAPERS if paper != toy.config.model_type)
    with pytest.raises(
        ValueError, match=f"'{toy.config.model_type}', expected '{other.config.model_type}': `AutoModel`"
    ):
        type(other).from_pretrained(tmp_path)


# graphs
def graph_of(model, backend='aot_eager'):
    "One graph without a break, and how often it was made."
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def moved(batch):
    "The same numbers of images and tokens, elsewhere."
    return batch | dict(input_ids=batch['input_ids'].roll(1, 1), attention_mask=batch['attention_mask'] * 0 + 1)


def test_a_forward_is_one_graph(traced):
    batches = [batch_of(traced), moved(batch_of(traced))]
    expected = [logits(traced, batch) for batch in batches]  # fixed tables are made where no graph is
    whole, counter = graph_of(traced)
    for batch, wanted in zip(batches, expected):
        torch.testing.assert_close(logits(whole, batch), wanted, rtol=0, atol=1e-5)
    injected = getattr(getattr(traced, 'fusion', None), 'injects', False)  # puts layers between layers, at every call
    assert counter.frame_count == 1 or injected


def test_a_step_of_training_is_one_graph(traced):
    batch, gradients, losses = batch_of(traced), [], []
    for each in (traced, graph_of(traced)[0]):
        traced.zero_grad()
        loss = each(**batch, labels=supervised(batch)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in traced.named_parameters() if p.grad is not None})
    traced.zero_grad()
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('masked', [True, False])
def test_a_decoding_step_is_one_graph(traced, masked):
    batch = batch_of(traced)
    whole, counter = graph_of(traced)
    for row in range(2):
        real = batch['attention_mask'][row].bool()
        prompt = dict(input_ids=batch['input_ids'][row][real][None], pixel_values=batch['pixel_values'][row : row + 1])
        found = []
        for step in (traced, whole):
            cache, length = StaticCache(config=traced.config.text_config, max_cache_len=32), int(real.sum())
            with torch.no_grad():
                found.append([traced(**prompt, past_key_values=cache).logits[:, -1]])
                for word in (20, 21, 22):
                    length += 1
                    mask = dict(attention_mask=(torch.arange(32) < length).long()[None]) if masked else {}
                    place = dict(position_ids=torch.tensor([[length - 1]])) if masked else {}
                    given = dict(input_ids=torch.tensor([[word]]), past_key_values=cache)
                    found[-1].append(step(**given, **mask, **place).logits[:, -1])
        torch.testing.assert_close(*map(torch.stack, found), rtol=0, atol=1e-5)
    assert counter.frame_count == 1


def test_text_alone_is_one_graph(toy):
    ids = torch.tensor([[1, 10, 11, 12]])
    with torch.no_grad():
        torch.testing.assert_close(graph_of(toy)[0](ids).logits, toy(ids).logits, rtol=0, atol=1e-5)


def test_packed_rows_in_a_graph():
    model, batch = model_of('honeybee'), batch_of(model_of('honeybee'))
    rows = [row[mask.bool()] for row, mask in zip(batch['input_ids'], batch['attention_mask'])]
    ids = torch.cat([*rows, torch.zeros(2, dtype=torch.long)])[None]
    positions = torch.cat([*(torch.arange(len(row)) for row in rows), torch.zeros(2, dtype=torch.long)])[None]
    mask = torch.cat([torch.ones(sum(map(len, rows))), torch.zeros(2)]).long()[None]
    packed = dict(input_ids=ids, position_ids=positions, attention_mask=mask, pixel_values=batch['pixel_values'])
    found = logits(graph_of(model)[0], packed)
    torch.testing.assert_close(found, logits(model, packed), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, logits(model, batch), rtol=0, atol=1e-5)


# adapters
def wrapped(model, **settings):
    "With fresh adapters."
    peft = pytest.importorskip('peft', reason="peft is not installed: `pip install '.[train]'`")
    torch.manual_seed(0)
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type='CAUSAL_LM', r=4, **settings))


def five_steps(adapted, batch):
    "Losses of five optimiser steps."
    adapted.train()
    learning = [p for p in adapted.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.AdamW(learning, lr=5e-3), []
    for _ in range(5):
        loss = adapted(**batch, labels=supervised(batch)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    adapted.eval()
    return losses


@pytest.mark.nightly
@pytest.mark.parametrize('targets', [['q_proj', 'v_proj'], USUAL, 'all-linear'], ids=str)
def test_adapters_by_the_usual_names(model, targets, tmp_path):
    batch, adapted = batch_of(model), wrapped(model, target_modules=targets)
    before = logits(model, batch)
    assert torch.equal(logits(adapted, batch), before)
    names = adapted.base_model.targeted_module_names
    text = [name for name in names if name.startswith('language_model.')]
    if targets == ['q_proj', 'v_proj']:
        own = {re.sub(r'\.multiway\.\d+\.\w+$', '', name).rpartition('.')[2] for name in text}
        ways = 2 if hasattr(model.config, 'adaptive') else 1
        assert own == set(targets) and sum('v_proj' in name for name in text) == 2 * ways
    losses = five_steps(adapted, batch)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    skipped = r'vision_model\.encoder\.layers\.2\.'  # above the layer that is read
    for name, parameter in adapted.named_parameters():
        assert 'lora_B' not in name or parameter.abs().sum() > 0 or re.search(skipped, name)
    after = logits(adapted, batch)
    adapted.save_pretrained(tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(logits(again, batch), after, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(again.unload(), batch), before, rtol=0, atol=1e-5)
    answer = adapted.generate(**batch, **GREEDY)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), after, rtol=0, atol=1e-5)
    assert torch.equal(merged.generate(**batch, **GREEDY), answer)
    assert type(merged) is type(model) and list(merged.state_dict()) == list(model.state_dict())


@pytest.mark.nightly
@pytest.mark.parametrize(
    'settings',
    [
        dict(use_dora=True),
        dict(modules_to_save=['lm_head', 'embed_tokens']),
        dict(layers_to_transform=[0]),
        dict(target_modules=['lm_head', 'v_proj']),
    ],
    ids=str,
)
def test_other_adapters(toy, settings):
    batch, adapted = batch_of(toy), wrapped(toy, **dict(target_modules=['q_proj', 'v_proj']) | settings)
    losses = five_steps(adapted, batch)
    assert losses[-1] < losses[0] - 0.1
    after = logits(adapted, batch)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), batch), after, rtol=0, atol=1e-5)


def test_copies_carry_the_name_of_their_part():
    model = model_of('owl2')
    names = [n for n, m in model.named_modules() if n.endswith('.v_proj') and isinstance(m, torch.nn.Linear)]
    assert names == [
        f'language_model.model.layers.{i}.self_attn.v_proj.multiway.{w}.v_proj' for i in (0, 1) for w in (0, 1)
    ]
    assert 'language_model.model.layers.0.self_attn.v_proj.multiway.1.weight' in model.state_dict()
    assert list(dict(model.named_parameters())) == list(model.state_dict())
    layer = copy.deepcopy(model).language_model.model.layers[0].self_attn.v_proj.multiway[1]
    assert layer.v_proj.weight is layer.weight and weight_of(layer) is layer.weight
