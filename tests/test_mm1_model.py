"MM1's model: the layer that is read, batches and packs, experts and their losses, checkpoints, resolutions, prompts, the paper's sizes, wrong input."

import copy

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from mllm_replica.core.recipe import Recipe, Source, Stage
from mllm_replica.data.encoded import Encoded
from mllm_replica.data.images import encode_png
from mllm_replica.data.language import byte_tokenizer, word_tokenizer
from mllm_replica.data.packing import collate, encode_document, truncate
from mllm_replica.mm1.components import SubImages, letterboxed
from mllm_replica.mm1.data import WEIGHTS, collate_sequences, encode_source, join, make_sequences, source_sequences
from mllm_replica.mm1.experts import SparseMLP, auxiliary_loss, record_routing
from mllm_replica.mm1.model import MM1Config, MM1Model, MM1Processor, at_resolution
from mllm_replica.mm1.presets import ENCODERS, LANGUAGE_MODELS, PRESETS, assumed, paper_config, published_stages
from mllm_replica.mm1.shots import VQA, Template, few_shot
from mllm_replica.models.cost import count
from mllm_replica.models.vision import clip_pixels, resize_positions
from mllm_replica.core.machine import Machine
from mllm_replica.planning.memory import gpu_of
from mllm_replica.planning.plan import plan_unit, stage_cost
from mllm_replica.training.loop import train

torch.set_num_threads(1)
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
)
TEXT = dict(
    vocab_size=260,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CONNECTORS = {'avg': {}, 'att': dict(num_attention_heads=4, start='local'), 'c-abs': dict(hidden_size=32, depth=1)}
EXPERTS = dict(every=2, num_experts=4)
IMAGE = [260] * 4
ROWS, COUNTS = [[1, 10, *IMAGE, 11, *IMAGE, 12], [1, 20, *IMAGE, 21, 22], [1, 30, 31, 32, 33]], [2, 1, 0]
GREEDY = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)


def configure(kind='c-abs', **more):
    connector = dict(connector_type=kind, num_query_tokens=4) | CONNECTORS[kind]
    return MM1Config(**(dict(vision_config=VISION, text_config=TEXT, connector_config=connector) | more))


def build(kind='c-abs', experts=None, **more):
    "A small model with norms, biases and routers that decide."
    torch.manual_seed(0)
    model = MM1Model(configure(kind, experts=experts, **more)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float('norm' in name and name.endswith('weight')), 0.2)
        if name.endswith('router.weight'):
            torch.nn.init.normal_(parameter, std=0.5)
        if '.experts.' in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def pixels(number=3):
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))[:number]


def of_row(row):
    first = sum(COUNTS[:row])
    return torch.tensor([ROWS[row]]), pixels()[first : first + COUNTS[row]] if COUNTS[row] else None


def supervised(ids):
    return ids.masked_fill((ids < 2) | (ids == 260), -100)


def padded(side):
    width = max(map(len, ROWS))

    def place(row, fill):
        return fill + row if side == 'left' else row + fill

    ids = torch.tensor([place(row, [0] * (width - len(row))) for row in ROWS])
    return ids, (ids != 0).long()


def examples():
    "The rows as encoded samples with tensors for images."
    parts, found = pixels().split(COUNTS), []
    for i, (row, part) in enumerate(zip(ROWS, parts)):
        starts = [at for at, token in enumerate(row) if token == 260][::4]
        found.append(
            Encoded(
                str(i),
                row,
                [-100, *(t if t > 1 else -100 for t in row[1:])],
                image_ids=list(range(len(part))),
                images=list(part),
                image_spans=[(at, at + 4) for at in starts],
            )
        )
    return found


def picture(color='red', size=(20, 20)):
    return Image.new('RGB', size, color)


def asked(id, color, question='which ?', **more):
    turns = [{'from': 'human', 'value': f'<image>\n{question}'}, {'from': 'gpt', 'value': color}]
    return (
        dict(
            id=id, images=[picture(color)], conversations=turns, document='', task='', answer=color, options=[], meta=''
        )
        | more
    )


def weights_of(part):
    return sum(weight.numel() for weight in part.parameters())


KINDS = [
    ('avg', None),
    ('att', None),
    ('c-abs', None),
    ('att', EXPERTS),
    ('c-abs', EXPERTS | dict(intermediate_size=24)),
]
of_kind = pytest.mark.parametrize('kind, experts', KINDS, ids=['avg', 'att', 'c-abs', 'att-experts', 'c-abs-experts'])


# the layer that is read


def test_the_last_layer_is_read_after_its_norm_and_others_without():
    model = build()
    encoder, images = model.vision_model, pixels()
    states = encoder(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.visual_features(images), encoder.post_layernorm(states[-1][:, 1:]))
    for layer in (3, -2, 1, 0):
        model.config.feature_layer = layer
        wanted = encoder.post_layernorm(states[3]) if layer == 3 else states[layer]
        torch.testing.assert_close(model.visual_features(images), wanted[:, 1:])
    assert MM1Config().feature_layer == -1 and not torch.allclose(
        encoder.post_layernorm(states[-1]), states[-1], atol=0.1
    )


def test_gradients_reach_every_weight():
    "Of encoder, connector and language model; where an earlier layer is read, not those above it."
    model, (ids, mask) = build('c-abs', EXPERTS).train(), padded('right')
    model(ids, mask, pixels(), labels=supervised(ids)).loss.backward()
    assert not [
        name for name, p in model.named_parameters() if p.grad is None or (not p.grad.any() and '.experts.' not in name)
    ]
    model = build(feature_layer=-2)
    model(ids, mask, pixels(), labels=supervised(ids)).loss.backward()
    assert {name.split('.')[1] for name, p in model.named_parameters() if p.grad is None} == {
        'encoder',
        'post_layernorm',
    }


# batches, packs, generation


@of_kind
@pytest.mark.parametrize('side', ['left', 'right'])
@torch.no_grad()
def test_a_batch_gives_the_single_answers(kind, experts, side):
    model, (ids, mask) = build(kind, experts), padded(side)
    logits = model(ids, mask, pixels()).logits
    new = model.generate(ids, mask, pixels(), **GREEDY)[:, -5:]
    assert torch.equal(new, model.generate(ids, mask, pixels(), use_cache=False, **GREEDY)[:, -5:])
    for row in range(3):
        one, images = of_row(row)
        torch.testing.assert_close(
            logits[row][mask[row].bool()], model(one, None, images).logits[0], rtol=1e-4, atol=3e-5
        )
        assert torch.equal(new[row], model.generate(one, None, images, **GREEDY)[0, -5:])
        again = model(one, image_features=None if images is None else model.visual_features(images)).logits[0]
        torch.testing.assert_close(again, logits[row][mask[row].bool()], rtol=1e-4, atol=3e-5)


@of_kind
@pytest.mark.parametrize('how', ['house', 'sequences'])
@torch.no_grad()
def test_packed_samples_are_predicted_as_if_alone(kind, experts, how):
    model = build(kind, experts)
    batch = (
        collate(examples(), 0, packed=True, length=40)
        if how == 'house'
        else collate_sequences([join(examples()[:2]), join(examples()[2:])], 0)
    )
    order = [int(name) for names in batch.pop('ids') for name in names.split('+')]
    assert batch['input_ids'].shape[0] == (1 if how == 'house' else 2)
    out = model(**batch, return_logits=True)
    flat = torch.cat(
        [
            row[: sum(len(ROWS[i]) for i in part)]
            for row, part in zip(out.logits, [order] if how == 'house' else [[0, 1], [2]])
        ]
    )
    losses, counts = [], []
    for row, part in zip(order, flat.split([len(ROWS[i]) for i in order])):
        ids, images = of_row(row)
        alone = model(ids, None, images, labels=supervised(ids), return_logits=True)
        torch.testing.assert_close(part, alone.logits[0], rtol=1e-4, atol=3e-5)
        losses.append(alone.loss)
        counts.append((supervised(ids)[:, 1:] != -100).sum())
    torch.testing.assert_close(out.loss, sum(a * b for a, b in zip(losses, counts)) / sum(counts), rtol=1e-5, atol=1e-5)


def test_images_do_not_meet_and_go_in_reading_order():
    model, images = build('att'), pixels()
    each = torch.cat([model.visual_embeds(image[None]) for image in images])
    torch.testing.assert_close(model.visual_embeds(images), each, rtol=1e-4, atol=1e-5)
    ids = torch.tensor([ROWS[0]])
    embeds = model.embed(ids, images[:2])
    torch.testing.assert_close(embeds[0, 2:6], each[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embeds[0, 7:11], each[1], rtol=1e-4, atol=1e-5)


def test_further_arguments_reach_the_decoder(monkeypatch):
    model, seen = build(experts=EXPERTS).train(), {}
    forward = model.get_decoder().forward
    monkeypatch.setattr(model.get_decoder(), 'forward', lambda *a, **k: (seen.update(k), forward(*a, **k))[1])
    borders = torch.tensor([0, 5], dtype=torch.int32)
    out = model(
        torch.tensor([ROWS[2]]), labels=torch.tensor([ROWS[2]]), cu_seq_lens_q=borders, output_hidden_states=True
    )
    assert seen['cu_seq_lens_q'] is borders and len(out.hidden_states) == 5


# experts


def test_the_loss_in_training_has_the_losses_of_the_experts():
    model, (ids, mask) = build(experts=EXPERTS | dict(balance=0.3, z=0.07)), padded('right')
    batch = dict(input_ids=ids, attention_mask=mask, pixel_values=pixels(), labels=supervised(ids))
    plain, trained = model(**batch).loss, model.train()(**batch).loss
    with record_routing(model) as routings:
        model(**batch | dict(labels=None))
    assert len(routings) == 2
    torch.testing.assert_close(trained, plain + auxiliary_loss(routings, 0.3, 0.07))
    assert trained - plain > 0.6  # two layers, each at least 0.3
    assert model(**batch | dict(labels=None)).loss is None
    dense = build()
    torch.testing.assert_close(dense(**batch).loss, dense.train()(**batch).loss)


def test_parts_of_a_batch_count_in_proportion():
    "With the number of words of a larger batch, a part takes its share of both losses."
    model, (ids, mask) = build(experts=EXPERTS), padded('right')
    batch = dict(input_ids=ids, attention_mask=mask, pixel_values=pixels(), labels=supervised(ids))
    number = int((batch['labels'][:, 1:] != -100).sum())
    for words in (number, 3 * number, torch.tensor(3 * number)):
        for mode in (True, False):
            torch.testing.assert_close(
                model.train(mode)(**batch, num_items_in_batch=words).loss, model(**batch).loss * number / words
            )


@pytest.mark.parametrize(
    'experts', [None, EXPERTS, EXPERTS | dict(capacity_factor=1.0)], ids=['dense', 'experts', 'capacity']
)
def test_checkpointing_changes_no_gradient(experts):
    (ids, mask), found = padded('right'), []
    for checkpointing in (False, True):
        model = build(experts=experts).train()
        enable = (
            getattr(model, 'activation_checkpointing_enable', None) or model.gradient_checkpointing_enable
        )  # the older name
        if checkpointing:
            enable({'use_reentrant': False})
        loss = model(ids, mask, pixels(), labels=supervised(ids)).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_up_cycling_changes_nothing_at_first_and_is_remembered(dtype, tmp_path):
    model, (ids, mask) = build('att').to(dtype), padded('left')
    before, names = model(ids, mask, pixels()).logits, set(model.state_dict())
    model.up_cycle(EXPERTS)
    assert [type(layer.mlp) is SparseMLP for layer in model.get_decoder().layers] == [False, True, False, True]
    torch.testing.assert_close(
        model(ids, mask, pixels()).logits, before, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2
    )
    assert model.config.experts == EXPERTS | dict(intermediate_size=None, capacity_factor=None, balance=0.01, z=0.001)
    assert len(names - set(model.state_dict())) == 6
    model.save_pretrained(tmp_path)
    again = MM1Model.from_pretrained(tmp_path)
    assert again.dtype == dtype and all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match='has experts already'):
        again.up_cycle(EXPERTS)
    with pytest.raises(ValueError, match=r"fields \['num_experts'\]"):
        build().up_cycle(dict(num_experts=4))


def test_a_training_run_with_experts(tmp_path):
    "The house's loop, packs cut in micro-batches: the loss falls, and the routers move."
    model = build('att', EXPERTS)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    stage = Stage(
        name='a', trainable=(r'.',), mixture={'a': 1.0}, steps=12, batch_size=4, accumulate=2, lr=5e-3, max_length=64
    )
    sequences = [join(row) for row in ([*examples()], examples()[:1], examples()[1:], examples()[2:])]
    history = train(model, [stage], {'a': sequences}, lambda batch: collate_sequences(batch, 0), tmp_path, seed=0)
    assert sum(history.losses[-3:]) < 0.8 * sum(history.losses[:3])
    same = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert not same, same


# checkpoints


@of_kind
@torch.no_grad()
def test_a_saved_model_returns(kind, experts, tmp_path):
    model, (ids, mask) = build(kind, experts, sub_images=32), padded('left')
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (
        isinstance(config, MM1Config)
        and config.feature_layer == -1
        and config.sub_images == 32
        and config.positions_per_image == 20
    )
    assert config.experts == model.config.experts and config.connector_config == model.config.connector_config
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        again = auto.from_pretrained(tmp_path)
        assert type(again) is MM1Model and torch.equal(
            again(ids, mask, pixels()).logits, model(ids, mask, pixels()).logits
        )


@pytest.mark.parametrize('part', ['router.weight', 'experts.up_proj', 'connector.query', 'post_layernorm.bias'])
def test_a_missing_weight_is_named(part, tmp_path):
    build('att', EXPERTS).save_pretrained(tmp_path)
    state = load_file(tmp_path / 'model.safetensors')
    lost = next(name for name in state if name.endswith(part))
    save_file(
        {name: weight for name, weight in state.items() if name != lost},
        tmp_path / 'model.safetensors',
        {'format': 'pt'},
    )
    message = rf"lacks 1 weights.*\['{lost.removeprefix('connector.')}'\]; save the whole model"
    with pytest.raises(ValueError, match=message):
        MM1Model.from_pretrained(tmp_path)


def test_a_dense_checkpoint_is_no_sparse_one(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='the checkpoint lacks 6 weights'):
        MM1Model.from_pretrained(tmp_path, config=configure(experts=EXPERTS))


# resolutions


@of_kind
@torch.no_grad()
def test_another_resolution_interpolates_positions_only(kind, experts):
    model = build(kind, experts)
    same, wide = at_resolution(model, 16), at_resolution(model.train(), 24, sub_images=72)
    assert (
        all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
        and not same.training
    )
    ours, theirs, moved = model.state_dict(), wide.state_dict(), set()
    assert not {weight.data_ptr() for weight in ours.values()} & {weight.data_ptr() for weight in theirs.values()}
    for name in ours:
        if ours[name].shape == theirs[name].shape:
            assert torch.equal(ours[name], theirs[name])
        else:
            moved.add(name)
    table = 'vision_model.embeddings.position_embedding.weight'
    assert moved == {table} | {'connector.pos_emb'} & set(ours)
    torch.testing.assert_close(theirs[table], resize_positions(ours[table], 36, leading=1))
    if kind == 'c-abs':
        torch.testing.assert_close(theirs['connector.pos_emb'][0], resize_positions(ours['connector.pos_emb'][0], 36))
    assert wide.training and wide.config.vision_config.image_size == 24 and wide.config.positions_per_image == 40
    assert wide.config.experts == model.config.experts and model.config.sub_images is None
    assert wide.visual_embeds(torch.randn(2, 3, 24, 24)).shape == (2, 4, 32)


# prompts


@pytest.fixture(scope='module')
def processor():
    return MM1Processor.from_config(configure(), byte_tokenizer())


@pytest.mark.parametrize(
    'document', ['<image> a red ground', 'one <image>\n two <image><image>three ', 'text\nalone', '<image>a<image>']
)
def test_documents_are_taken_as_they_stand(processor, document):
    sample = dict(
        id='d', document=document, images=[picture(c) for c in ('red', 'blue', 'green')[: document.count('<image>')]]
    )

    def tokenize(text):
        return processor.tokenizer(text, add_special_tokens=False)['input_ids'] if text else []

    wanted = encode_document(sample, tokenize, 1, 2, 260, lambda image: 4)
    for ends in (True, False):
        found = MM1Processor.from_config(configure(), byte_tokenizer(), ends=ends).encode(sample)
        stop = None if ends else -1
        assert (found.input_ids, found.labels, found.image_spans) == (
            wanted.input_ids[:stop],
            wanted.labels[:stop],
            wanted.image_spans,
        )
        assert found.images == sample['images'] and len(set(found.image_ids)) == len(found.images)


def test_the_three_kinds_become_sequences(processor):
    caption, album, text = (
        dict(id=document, document=document, images=[picture()] * document.count('<image>'))
        for document in ('<image> red', 'x <image> y <image>', 'only words')
    )
    found = [
        encode_source([sample], kind, processor.encode, 64)
        for sample, kind in ((caption, 'caption'), (album, 'interleaved'), (text, 'text'))
    ]
    sequences = make_sequences([example for part in found for example in part], 64, 3)
    batch = collate_sequences(sequences, 0, image_tensor=processor.image_tensor)
    assert batch['pixel_values'].shape == (3, 3, 16, 16) and batch['input_ids'].shape == (1, sum(sequences[0].lengths))
    with torch.no_grad():
        assert build()(**{k: v for k, v in batch.items() if k != 'ids'}).loss > 0


def test_conversations_are_written_like_shots(processor):
    turns = [
        {'from': role, 'value': value}
        for role, value in zip(['human', 'gpt'] * 2, ['<image> what ?', 'red', 'and ?', 'ok'])
    ]
    sample, byte = dict(id='x', images=[picture()], conversations=turns), lambda text: [3 + b for b in text.encode()]
    found = processor.encode(sample)
    assert found.input_ids == [1, *IMAGE, *byte(' what ?'), *byte(' red'), 2, *byte('\nand ?'), *byte(' ok'), 2]
    assert [t for t in found.labels if t != -100] == [*byte(' red'), 2, *byte(' ok'), 2]
    prompt = processor.encode(sample, training=False)
    assert prompt.input_ids == found.input_ids[: len(prompt.input_ids)] and prompt.input_ids[-5:] == byte('and ?')
    assert processor.encode(sample | dict(conversations=turns[:3]), training=False).input_ids == prompt.input_ids
    bare = MM1Processor.from_config(configure(), byte_tokenizer(), ends=False, separator=' . ').encode(sample)
    assert bare.input_ids == [1, *IMAGE, *byte(' what ? red . and ? ok')]


@pytest.mark.parametrize('shots', [0, 4, 8])
@pytest.mark.parametrize('separator', ['\n', ' ; '])
def test_a_prompt_of_shots_is_read_as_few_shot_wrote_it(shots, separator):
    "Every byte, each image where its shot stands; the answer follows as the demonstrations' do."
    made = MM1Processor.from_config(configure(), byte_tokenizer(), ends=False, separator=separator)
    pool = [asked(f'train-{i}', f'#{i:02x}8040', f'question {i} ?') for i in range(20)]
    template = Template(VQA.query, separator)
    prompt = few_shot(asked('test-0', 'red'), pool, shots, 7, template)
    found, text = made.encode(prompt, training=False), prompt['conversations'][0]['value']
    parts = [[3 + b for b in part.encode()] for part in text.split('<image>')]
    assert found.input_ids == [1, *parts[0], *(token for part in parts[1:] for token in (*IMAGE, *part))]
    assert [image.getpixel((0, 0)) for image in found.images] == [image.getpixel((0, 0)) for image in prompt['images']]
    assert len(found.image_spans) == shots + 1 and text.count(separator) == shots
    answered, labels = made.encode(prompt), [3 + b for b in ' red'.encode()]
    assert answered.input_ids == found.input_ids + labels and answered.labels[-4:] == labels
    assert made.decode(labels + [3 + b for b in (separator + ' Question: more').encode()] + [2]) == 'red'


def test_a_small_vocabulary():
    words = MM1Processor.from_config(
        configure(), word_tokenizer(['a red ground', 'what color', '?']), ends=False, separator=' '
    )
    found = words.encode(dict(id='x', images=[picture()], document='<image> a red ground'))
    assert found.input_ids == [1, *IMAGE, 4, 5, 6] and words.decode([4, 5, words.image_token_id, 2]) == 'a red'
    with pytest.raises(ValueError, match=r"sample 'y': the tokenizer does not know \['blue'\]"):
        words.encode(dict(id='y', document='a blue ground'))


def test_a_saved_processor_returns(tmp_path):
    made = MM1Processor.from_config(configure(sub_images=48), byte_tokenizer(), ends=False, separator=' ; ')
    build(sub_images=48).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    for again in (AutoProcessor.from_pretrained(tmp_path), MM1Processor.from_pretrained(tmp_path)):
        assert type(again) is MM1Processor and again.to_dict() == made.to_dict()
        assert again.chat_template == made.chat_template
        sample = dict(id='x', document='one <image> two', images=[picture()])
        assert again.encode(sample).input_ids == made.encode(sample).input_ids


# sub-images

STRIPES = Image.fromarray(torch.arange(30 * 20 * 3).remainder(251).reshape(20, 30, 3).byte().numpy())


@pytest.mark.parametrize('source', ['picture', 'bytes'])
def test_an_image_becomes_overview_and_crops(source):
    fine, cutting = MM1Processor.from_config(configure(sub_images=48), byte_tokenizer()), SubImages(48, 16, 4, 4)
    given = [
        image if source == 'picture' else dict(bytes=encode_png(image), path='x.png')
        for image in (STRIPES, picture('blue'))
    ]
    turns = [{'from': 'human', 'value': 'one <image>two <image>?'}, {'from': 'gpt', 'value': 'a'}]
    sample = dict(id='x', images=given, document='', conversations=turns)
    held, found = copy.deepcopy(sample['conversations']), fine.encode(sample)
    wanted = cutting.cut(STRIPES) + cutting.cut(picture('blue'))
    assert [image.tobytes() for image in found.images] == [image.tobytes() for image in wanted]
    assert found.input_ids == [
        1,
        *(3 + b for b in b'one '),
        *IMAGE * 10,
        *(3 + b for b in b'two '),
        *IMAGE * 10,
        *(3 + b for b in b'? a'),
        2,
    ]
    assert sample['conversations'] == held and sample['images'] is given
    torch.testing.assert_close(
        fine.image_tensor(found.images), clip_pixels(wanted, 16), rtol=0, atol=0
    )  # tiles pass unchanged
    assert fine.encode(dict(id='d', document='<image> b', images=given[:1])).image_spans == [
        (at, at + 4) for at in range(1, 41, 4)
    ]


def test_overview_and_crops_stay_together():
    "They are one image: for the length of a sequence, for what is cut off, and for how many an example may have."
    fine = MM1Processor.from_config(configure(sub_images=32), byte_tokenizer())
    two = fine.encode(dict(id='d', document='a <image> b <image> c', images=[picture('red'), picture('blue')]))
    (start, stop), (second, _) = two.image_blocks
    assert stop - start == 20 and len(two.image_spans) == 10
    cut = truncate(two, second + 9)
    assert len(cut) == second and cut.image_blocks == [(start, stop)] and len(cut.images) == len(cut.image_ids) == 5
    caption = dict(id='c', document='<image> tail', images=[picture('red')])
    with pytest.raises(ValueError, match="document 'c': an image takes 20 positions"):
        encode_source([caption], 'caption', fine.encode, 16)
    captions = encode_source([caption | {'id': f'c{i}'} for i in range(4)], 'caption', fine.encode, 64)
    rows = source_sequences({'caption': captions}, {'caption': 256})['caption']
    assert len(rows) == 1 and len(rows[0].image_spans) == 20  # four images of sixteen


def test_one_tile_is_the_image_itself():
    "A square that needs no cutting costs and gives the same as without sub-images."
    one, none = (MM1Processor.from_config(configure(sub_images=size), byte_tokenizer()) for size in (16, None))
    square = STRIPES.crop((0, 0, 20, 20))
    sample = dict(id='x', document='<image> b', images=[square])
    a, b = one.encode(sample), none.encode(sample)
    assert a.input_ids == b.input_ids and torch.equal(one.image_tensor(a.images), none.image_tensor(b.images))
    wide = one.image_tensor([STRIPES])
    assert torch.equal(wide, clip_pixels([letterboxed(STRIPES, 16)], 16)) and not torch.equal(
        wide, none.image_tensor([STRIPES])
    )


@pytest.mark.parametrize('shots, high', [(0, 0), (3, 0), (3, 2), (3, 3)])
def test_mixed_resolution_is_decided_once(shots, high):
    fine = MM1Processor.from_config(configure(sub_images=32), byte_tokenizer())
    pool = [asked(f'train-{i}', f'#{i:02x}8040') for i in range(9)]
    prompt = few_shot(asked('q', 'red'), pool, shots, 0, views=fine.views, high=high)
    found = fine.encode(prompt, training=False)
    assert [image.tobytes() for image in found.images] == [image.tobytes() for image in prompt['images']]
    assert len(found.images) == len(found.image_spans) == (shots - high) + 5 * (high + 1)
    assert fine.image_tensor(found.images).shape == (len(found.images), 3, 16, 16)


# the paper

SIZES = {'mm1-base-ablation': 1.2, 'mm1-3b': 2.9, 'mm1-7b': 6.4, 'mm1-30b': 30, 'mm1-3b-moe': 64, 'mm1-7b-moe': 47}


@pytest.mark.parametrize('name', PRESETS)
def test_sizes_of_the_paper(name):
    config = paper_config(name)
    with torch.device('meta'):
        model = MM1Model(config)
    assert weights_of(model.language_model) / 1e9 == pytest.approx(SIZES[name], rel=0.015)
    assert round(weights_of(model.vision_model) / 1e6, 1) == (303.5 if name == 'mm1-base-ablation' else 631.4)
    assert config.visual_token_count() == 144 and config.text_config.max_position_embeddings == 4096
    sparse = [i for i, layer in enumerate(model.get_decoder().layers) if isinstance(layer.mlp, SparseMLP)]
    every, number = {'mm1-3b-moe': (2, 64), 'mm1-7b-moe': (4, 32)}.get(name, (0, 0))
    assert sparse == (list(range(every - 1, 32, every)) if every else [])
    assert all(model.get_decoder().layers[i].mlp.experts.num_experts == number for i in sparse)


def test_feed_forward_shares_that_the_totals_imply():
    "64B = 2.9B + 63·x/2 and 47B = 6.4B + 31·x/4: x billion parameters in feed-forward layers."
    for llm, share in (('3B', 1.94), ('7B', 5.24)):
        text = LANGUAGE_MODELS[llm]
        assert 3 * text['hidden_size'] * text['intermediate_size'] * text['num_hidden_layers'] / 1e9 == pytest.approx(
            share, rel=0.005
        )


@pytest.mark.parametrize(
    'name, lr',
    [
        ('mm1-base-ablation', 8.58e-5),
        ('mm1-3b', 6e-5),
        ('mm1-7b', 4e-5),
        ('mm1-30b', 2e-5),
        ('mm1-3b-moe', 6e-5),
        ('mm1-7b-moe', 4e-5),
    ],
)
def test_published_schedules(name, lr):
    pretrain, *rest = published_stages(name)
    assert (pretrain.steps, pretrain.batch_size, pretrain.max_length, pretrain.warmup_steps, pretrain.clip) == (
        200_000,
        512,
        4096,
        2000,
        1.0,
    )
    assert pretrain.lr == pytest.approx(lr, rel=1e-3) and pretrain.mixture == WEIGHTS
    assert pretrain.min_lr == pytest.approx(0.1 * pretrain.lr) and pretrain.weight_decay == pytest.approx(
        0.1 * pretrain.lr
    )
    assert [(s.steps, s.batch_size, s.max_length, s.lr, s.min_lr) for s in rest] == [(10_000, 256, 2048, 1e-5, 0.0)] * (
        name != 'mm1-base-ablation'
    )
    assert all(stage.pack for stage in (pretrain, *rest))
    said = assumed(name)
    assert (
        all(isinstance(sentence, str) for sentence in said)
        and str(LANGUAGE_MODELS[PRESETS[name].llm]['hidden_size']) in said[0]
    )
    assert any('experts' in sentence for sentence in said) == name.endswith('moe')


@pytest.mark.parametrize(
    'table, key, made', [(ENCODERS, 'ViT-H', dict(encoder='ViT-G')), (LANGUAGE_MODELS, '30B', dict(llm='13B'))]
)
def test_one_factor_is_changed_at_a_time(table, key, made):
    plain = paper_config('mm1-base-ablation')
    changed = paper_config('mm1-base-ablation', **{name: key for name in made})
    part = 'vision_config' if 'encoder' in made else 'text_config'
    assert getattr(changed, part).hidden_size == table[key]['hidden_size'] != getattr(plain, part).hidden_size
    other = 'text_config' if 'encoder' in made else 'vision_config'
    assert (
        getattr(changed, other).to_dict() == getattr(plain, other).to_dict()
        and changed.connector_config == plain.connector_config
    )
    with pytest.raises(KeyError, match='is not in the paper; expected one of'):
        paper_config('mm1-base-ablation', **made)
    row = paper_config(
        'mm1-base-ablation', image_size=224, connector_config={'connector_type': 'att', 'num_query_tokens': 64}
    )
    assert (
        row.num_patches,
        row.visual_token_count(),
        paper_config('mm1-3b', image_size=672, sub_images=1344).positions_per_image,
    ) == (256, 64, 720)


# planning


@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_plan_counts_what_a_step_computes(checkpointing):
    "Tensors without data, even spans: as many operations as with data and any spans."
    model, stage = (
        build(experts=EXPERTS).train(),
        published_stages('mm1-3b-moe')[0].model_copy(update=dict(precision='fp32')),
    )
    torch.manual_seed(1)
    ids = torch.tensor([[*IMAGE, *IMAGE, *range(5, 45)]])
    real = count(lambda: model(ids, pixel_values=pixels(2)).logits, model)
    plain, again, trained = stage_cost(lambda: MM1Model(configure(experts=EXPERTS)), stage, 48, 2, checkpointing)
    assert trained == weights_of(model) and plain.forward == real.forward
    assert (again.backward > plain.backward) == checkpointing and plain.backward == pytest.approx(
        real.backward, rel=0.02
    )


def test_a_plan_of_the_sparse_model():
    "The widths of the 7B model in four layers: a token costs 6 FLOPs per weight that it uses, a score 14 per width."
    sources = {
        name: Source(kind='folder', name=name, options={'images': images})
        for name, images in dict(interleaved=8, caption=16, text=0).items()
    }
    recipe = Recipe(
        paper='mm1',
        table='4',
        row='x',
        scale='paper',
        seed=0,
        model={},
        sources=sources,
        stages=published_stages('mm1-7b-moe')[:1],
        benchmarks=(),
        assumptions=assumed('mm1-7b-moe'),
    )
    parts = dict(
        text_config=LANGUAGE_MODELS['7B'] | dict(num_hidden_layers=4),
        connector_config=dict(connector_type='avg'),
        vision_config=ENCODERS['ViT-H'] | dict(image_size=378, num_hidden_layers=2),
    )

    def shallow(name):
        return paper_config(name, **parts)

    plans = [
        plan_unit(recipe, lambda _: (MM1Model(shallow(name)), None), Machine(devices=8, checkpointing=True), gpu_of())
        for name in ('mm1-7b', 'mm1-7b-moe')
    ]
    dense, sparse = plans
    assert all(
        plan.visual_tokens == 144 and plan.stages[0].length == 4096 and plan.stages[0].executed > plan.flops
        for plan in plans
    )
    samples, tokens, patches, images, inner = 512 * 200_000, 4096, 730, 11, 3 * 3584 * 15232
    with torch.device('meta'):
        model = MM1Model(shallow('mm1-7b'))
    language = 6 * (weights_of(model.language_model) - 32000 * 3584) * tokens + 14 * 4 * 3584 * tokens**2
    encoder = images * (6 * weights_of(model.vision_model) * patches + 14 * 2 * 1280 * patches**2)
    assert dense.flops == pytest.approx(samples * (language + encoder), rel=0.01)
    assert sparse.flops - dense.flops == pytest.approx(
        samples * 6 * inner * tokens, rel=0.01
    )  # a second expert in the last layer
    assert sparse.parameters - dense.parameters == 31 * inner + 32 * 3584


# wrong input


@pytest.mark.parametrize(
    'more, message',
    [
        (dict(experts={}), r'experts has the fields \[\]; expected every and num_experts'),
        (dict(experts=EXPERTS | dict(top_k=2)), "'top_k'"),
        (
            dict(connector_config=dict(num_query_tokens=1024)),
            'an image takes 1024 positions, the language model has 512',
        ),
        (
            dict(sub_images=256),
            'an image takes 1028 positions, the language model has 512: use fewer tokens or sub-images',
        ),
        (dict(sub_images=40), '40 pixels do not divide into tiles of 16'),
    ],
)
def test_configurations_that_do_not_fit(more, message):
    with pytest.raises(ValueError, match=message):
        configure(**more)


@pytest.mark.parametrize(
    'experts, error, message',
    [
        (dict(every=5, num_experts=4), ValueError, 'every 5th of 4 layers'),
        (dict(every=0, num_experts=4), ValueError, 'expected 1 to 4'),
        (dict(every=2, num_experts=1), ValueError, 'expected 2 or more'),
        (dict(every=2, num_experts=4, capacity_factor=0.0), ValueError, 'capacity_factor is 0.0'),
    ],
)
def test_experts_that_do_not_fit(experts, error, message):
    with pytest.raises(error, match=message):
        MM1Model(configure(experts=experts))


def test_experts_in_another_language_model():
    with pytest.raises(NotImplementedError, match='mlp_bias=True; expected LlamaMLP without bias'):
        MM1Model(configure(text_config=TEXT | dict(mlp_bias=True), experts=EXPERTS))


@pytest.mark.parametrize(
    'kind, message', [('bilinear', "connector_type is 'bilinear'"), ('avg', 'num_query_tokens is 5')]
)
def test_connectors_that_do_not_fit(kind, message):
    with pytest.raises(ValueError, match=message):
        MM1Model(
            MM1Config(
                vision_config=VISION, text_config=TEXT, connector_config=dict(connector_type=kind, num_query_tokens=5)
            )
        )


@pytest.mark.parametrize(
    'ids, images, message',
    [
        ([1, *IMAGE, 5, *IMAGE], 1, 'sample 0: found 8 image positions, expected 4: 1 of 1 images are left for it'),
        ([1, *IMAGE, 5], 2, 'found 4 image positions, expected 8: 1 of 2 images are left over'),
        ([1, 260, 260, 5], 1, 'found 2 image positions, expected a multiple of 4'),
        ([1, *IMAGE, 5], 0, 'neither pixel_values nor image_features'),
    ],
)
def test_placeholders_and_images_must_agree(ids, images, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.tensor([ids]), pixel_values=pixels(images) if images else None)


@pytest.mark.parametrize('sub_images', [None, 32])
@pytest.mark.parametrize('marks, images', [(2, 1), (1, 2), (0, 1), (1, 0)])
def test_a_sample_with_more_or_fewer_marks_than_images(marks, images, sub_images):
    made = MM1Processor.from_config(configure(sub_images=sub_images), byte_tokenizer())
    turns = [{'from': 'human', 'value': '<image>' * marks + 'x'}, {'from': 'gpt', 'value': 'y'}]
    for sample in (dict(document='<image> x ' * marks + 'x'), dict(conversations=turns)):
        with pytest.raises(
            ValueError, match=f"sample 's': {marks} <image> placeholders, {images} images; they must be equal"
        ):
            made.encode(dict(id='s', images=[picture()] * images) | sample)


def test_a_document_longer_than_a_sequence_keeps_whole_images(processor):
    album = dict(id='album', document='ab <image> cd <image> ef', images=[picture('red'), picture('blue')])
    assert encode_source([album], 'interleaved', processor.encode, 14)[0].image_spans == [(4, 8)]
    with pytest.raises(ValueError, match="document 'album': an image takes 4 positions, but a sequence of 4 leaves 3"):
        encode_source([album], 'interleaved', processor.encode, 4)


@pytest.mark.parametrize('answer', ['', ' ', '\n\t', '\u3000'])
@pytest.mark.parametrize('turn', [1, 3])
def test_an_empty_answer_is_refused(processor, answer, turn):
    said = ['what is this ?', 'a cat', 'and this ?', 'a dog']
    said[turn] = answer
    turns = [{'from': ('human', 'gpt')[i % 2], 'value': text} for i, text in enumerate(said)]
    sample = dict(id='s', images=[], conversations=turns, document='')
    with pytest.raises(ValueError, match=f"sample 's': the answer in turn {turn} is empty; write it or drop the turn"):
        processor.encode(sample)
    if turn == 3:
        assert processor.encode(sample, training=False).input_ids  # it is what is asked for
