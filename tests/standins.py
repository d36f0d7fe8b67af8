"Stand-ins: every published backbone in its true class and file layout, a few hundred kilobytes each, and data in true layouts."

import json

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SamConfig,
    SamModel,
    SiglipConfig,
    SiglipModel,
)

from mllm_replica.core.registry import backbones_of, recipes_of
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.models.backbones import BACKBONES, published

WORDS = {  # of templates, beside bytes
    'qwen': ('<|endoftext|>', '<|im_start|>', '<|im_end|>'),
    'SmolLM2': ('<|im_start|>', '<|im_end|>', '<|endoftext|>'),
    'Llama-3': ('<|begin_of_text|>', '<|eot_id|>', '<|start_header_id|>', '<|end_header_id|>'),
    'Yi': ('<|startoftext|>', '<|im_end|>', '<|im_start|>'),
}
VIT = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4)
TEXT = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
EVA = dict(patch_size=16, window_size=16, embed_dim=16, depth=3, num_heads=2, window_block_indexes=[0, 1])


def tokenizer_of(name):
    "Bytes, and the marks of the model's template."
    tokenizer = byte_tokenizer()
    marks = next((marks for part, marks in WORDS.items() if part.lower() in name.lower()), ())
    tokenizer.add_special_tokens({'additional_special_tokens': [AddedToken(mark, special=True) for mark in marks]})
    if 'qwen' in name.lower():
        tokenizer.bos_token = None
        tokenizer.eos_token, tokenizer.pad_token = '<|im_end|>', '<|endoftext|>'
    elif marks:
        tokenizer.bos_token, tokenizer.eos_token = marks[:2]
    if 'SmolLM2' in name:
        tokenizer.pad_token, tokenizer.unk_token = '<|im_end|>', '<|endoftext|>'
    return tokenizer


def save_language(name, folder, dtype=torch.float16):
    "A language model with its tokenizer; Vicuna's weights as .bin files with an index, as they are published."
    sizes, tokenizer = published(name), tokenizer_of(name)
    kind, config = (Qwen2ForCausalLM, Qwen2Config) if 'Qwen' in name else (LlamaForCausalLM, LlamaConfig)
    told = ('tie_word_embeddings', 'rms_norm_eps', 'max_position_embeddings', 'rope_theta')
    made = {key: sizes[key] for key in told if key in sizes} | TEXT
    layers = sizes['num_hidden_layers'] if 'Qwen' in name else 4  # image layers stand where the paper has them
    made |= dict(vocab_size=len(tokenizer) + 5, num_hidden_layers=layers, num_key_value_heads=2)
    model = kind(config(**made)).to(dtype)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    if 'vicuna' in name:
        (folder / 'model.safetensors').unlink()
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        halves = [dict(list(state.items())[i::2]) for i in range(2)]
        files = [f'pytorch_model-0000{i}-of-00002.bin' for i in (1, 2)]
        for file, half in zip(files, halves):
            torch.save(half, folder / file)
        places = {key: file for file, half in zip(files, halves) for key in half}
        (folder / 'pytorch_model.bin.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': places}))


def save_qwen(name, folder):
    "Qwen-7B's own layout: config.json with other fields, one matrix for queries, keys and values."
    width, inner, words = 32, 48, 300
    shapes = {
        'transformer.wte.weight': (words, width),
        'transformer.ln_f.weight': (width,),
        'lm_head.weight': (words, width),
    }
    for i in range(2):
        shapes |= {
            f'transformer.h.{i}.ln_1.weight': (width,),
            f'transformer.h.{i}.ln_2.weight': (width,),
            f'transformer.h.{i}.attn.c_attn.weight': (3 * width, width),
            f'transformer.h.{i}.attn.c_attn.bias': (3 * width,),
            f'transformer.h.{i}.attn.c_proj.weight': (width, width),
            f'transformer.h.{i}.mlp.w1.weight': (inner, width),
            f'transformer.h.{i}.mlp.w2.weight': (inner, width),
            f'transformer.h.{i}.mlp.c_proj.weight': (width, inner),
        }
    folder.mkdir(parents=True)
    save_file({key: torch.randn(shape).bfloat16() for key, shape in shapes.items()}, folder / 'model.safetensors')
    config = dict(
        model_type='qwen',
        architectures=['QWenLMHeadModel'],
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * inner,
        max_position_embeddings=8192,
        layer_norm_epsilon=1e-6,
        rotary_emb_base=10000,
    )
    (folder / 'config.json').write_text(json.dumps(config))


def save_clip(name, folder):
    "A whole CLIP; its text half is not read. One has all layers: mPLUG-Owl2's recipe gives each a learning rate."
    size, depth = published(name)['image_size'], 24 if name == 'openai/clip-vit-large-patch14' else 4
    text = dict(VIT, vocab_size=60, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    CLIPModel(
        CLIPConfig(vision_config=VIT | dict(image_size=size, patch_size=14, num_hidden_layers=depth), text_config=text)
    ).save_pretrained(folder)


def save_siglip(name, folder):
    "A whole SigLIP with its pooling head."
    text = dict(VIT, vocab_size=60, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    vision = VIT | dict(image_size=384, patch_size=14)
    SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(folder)


def save_dinov2(name, folder):
    "DINOv2."
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14)
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)


def save_efficientnet(name, folder):
    "The converted package: its own names, the classifier among them, batch statistics with their counters."
    from mllm_replica.eagle.experts.towers import build_expert

    tower = build_expert('efficientnet_lite', published(name)).vision_tower
    state = random_state(tower)
    for key in (key for key in state if key.endswith('running_var')):
        state[key] = state[key].abs() + 0.5
    norms = [key.removesuffix('running_var') for key in state if key.endswith('running_var')]
    state |= {f'{norm}num_batches_tracked': torch.tensor(3) for norm in norms}
    state |= {'_conv_head.weight': torch.randn(12, 320, 1, 1), '_bn1.weight': torch.randn(12)}
    state |= {'_fc.weight': torch.randn(10, 12), '_fc.bias': torch.randn(10)}
    folder.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / 'model.safetensors')
    config = published(name) | dict(model_type='efficientnet_lite', license='Apache-2.0')
    (folder / 'config.json').write_text(json.dumps(config))


def save_sam(name, folder):
    "A whole SAM, of which the encoder without its neck is read."
    vision = dict(
        hidden_size=16,
        output_channels=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=1024,
        patch_size=16,
        window_size=14,
        global_attn_indexes=[1],
        mlp_dim=24,
    )
    decoder = dict(hidden_size=4, mlp_dim=8, num_attention_heads=1, iou_head_hidden_dim=4, num_hidden_layers=1)
    parts = dict(
        prompt_encoder_config=dict(hidden_size=4), mask_decoder_config=decoder | dict(attention_downsample_rate=1)
    )
    SamModel(SamConfig(vision_config=vision, **parts)).save_pretrained(folder)


def save_pix2struct(name, folder):
    "A whole Pix2Struct, of which the encoder is read."
    vision = dict(
        hidden_size=16,
        patch_embed_hidden_size=768,
        d_ff=24,
        d_kv=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        seq_len=64,
    )
    text = dict(hidden_size=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, vocab_size=60)
    config = Pix2StructConfig(vision_config=vision, text_config=text)
    Pix2StructForConditionalGeneration(config).save_pretrained(folder)


def random_state(module):
    "Other numbers for every weight of a module."
    return {key: torch.randn(tensor.shape) for key, tensor in module.state_dict().items()}


def save_convnext(name, folder):
    "timm's layout: the layer scale is `gamma`, a classifier is there, `model_args` say what is not the architecture's."
    from mllm_replica.eagle.experts.towers import build_expert

    args = dict(depths=[1, 1, 1, 1], dims=[8, 12, 16, 24])
    state = random_state(build_expert('convnext-1024', args).vision_tower)
    scale = '.weight'  # of a block, beside its parts'
    state = {
        key.removesuffix(scale) + '.gamma' if key.split('.')[-2].isdigit() and '.blocks.' in key else key: tensor
        for key, tensor in state.items()
    }
    state |= {'head.norm.weight': torch.randn(24), 'head.norm.bias': torch.randn(24)}
    state |= {'head.fc.weight': torch.randn(10, 24), 'head.fc.bias': torch.randn(10)}
    folder.mkdir(parents=True)
    save_file(state, folder / 'model.safetensors')
    config = dict(architecture='convnext_xxlarge', num_classes=10, num_features=24, model_args=args, pretrained_cfg={})
    (folder / 'config.json').write_text(json.dumps(config))


def save_eva(name, folder):
    "The checkpoint of a detector: weights under `model`, the backbone under its own prefix, rotations among them."
    from mllm_replica.eagle.experts.towers import build_expert

    state = random_state(build_expert('det-1024', EVA).vision_tower)
    state = {f'backbone.net.{key}': tensor for key, tensor in state.items()}
    state |= {f'backbone.net.rope_win.freqs_{kind}': torch.randn(256, 8) for kind in ('cos', 'sin')}
    state |= {'backbone.fpn.weight': torch.randn(3), 'roi_heads.box_predictor.weight': torch.randn(3)}
    (folder / 'eva02' / 'det').mkdir(parents=True)
    content = {'model': state, 'iteration': 3, 'scheduler': {'last_epoch': 3}}
    torch.save(content, folder / 'eva02' / 'det' / 'eva02_L_coco_det_sys_o365.pth')
    (folder / 'config.json').write_text(json.dumps(EVA))  # the published file has none: its sizes are the class's own


SAVERS = {
    'clip': save_clip,
    'siglip': save_siglip,
    'llama': save_language,
    'qwen2': save_language,
    'qwen': save_qwen,
    'convnext': save_convnext,
    'eva': save_eva,
    'sam': save_sam,
    'pix2struct': save_pix2struct,
    'dinov2': save_dinov2,
    'efficientnet_lite': save_efficientnet,
}


def names_of(paper):
    "The published models of all recipes of a paper at its own scale."
    chapter, names = recipes_of(paper), {}
    for table in chapter.tables('paper'):
        for row, reason in chapter.rows(table, 'paper').items():
            if reason is None:
                names |= dict.fromkeys(backbones_of(chapter.recipe(table, row, 'paper', 42)).values())
    return list(names)


def write_backbone(name, folder):
    "A stand-in for one published model."
    torch.manual_seed(sum(map(ord, name)))
    SAVERS[BACKBONES[name].form](name, folder)


def write_backbones(paper, folder) -> dict[str, str]:
    "Stand-ins for all that a paper starts from: hub id -> folder."
    places = {name: folder / name.replace('/', '--') for name in names_of(paper)}
    for name, place in places.items():
        write_backbone(name, place)
    return {name: str(place) for name, place in places.items()}


def record(source, number):
    "A record of a stored data set, with as many images as the recipe says."
    images = [f'{number % 2}.png'] * source.options.get('images', 1)
    marks = '<image>\n' * len(images)
    return dict(
        id=f'{source.name}-{number}',
        images=images,
        conversations=[
            {'from': 'human', 'value': f'{marks}What is {number}?'},
            {'from': 'gpt', 'value': f'{number} dogs.'},
        ],
    )


def document(source, number):
    "A captioned picture, an interleaved document or a text of MM1."
    kind = source.name.split('/')[1]
    if kind == 'instructions':
        return record(source, number)
    images = [f'{number % 2}.png'] * {'caption': 1, 'interleaved': 2, 'text': 0}[kind]
    parts = [part for i in range(len(images)) for part in (i, f'picture {i} of {number}')] or [f'only text {number}']
    return dict(id=f'{kind}-{number}', images=images, document=parts)


def asked(source, number):
    "A record of Honeybee's, with what its template wants."
    name = source.name.split('/')[1]
    turns = ('', 'the dog') if name in ('coyo', 'coyo_pairs', 'blipcapfilt') else ('The cat is on the mat.', 'yes')
    found = dict(id=f'{name}-{number}', options=['yes', 'no', 'maybe', 'never'], context='N/A', hint='')
    found |= dict(box=[10, 20, 30, 40], width=100, height=200, image=f'{number % 2}.png')
    if name == 'sharegpt':
        del found['image']
    if name in ('coyo', 'coyo_pairs', 'blipcapfilt', 'refcoco', 'refcoco_plus', 'refcocog', 'vg', 'mme', 'pope'):
        del found['options']
    mark = '<image>\n' * ('image' in found)
    found['conversations'] = [
        {'from': role, 'value': v} for role, v in zip(('human', 'gpt'), (mark + turns[0], turns[1]))
    ]
    return found


def write_data(recipe, folder, samples=8) -> None:
    "Tiny data in the layout that the recipe's stored sources read; `folder` is the data root."
    makers = {'honeybee': asked, 'mm1': document}
    for source in recipe.sources.values():
        if source.kind != 'folder':
            continue
        place = folder / source.name
        place.mkdir(parents=True, exist_ok=True)
        for name, color in (('0.png', 'red'), ('1.png', 'blue')):
            Image.new('RGB', (20, 16), color).save(place / name)
        records = [makers.get(recipe.paper, record)(source, number) for number in range(samples)]
        (place / f'{source.split}.jsonl').write_text('\n'.join(json.dumps(r) for r in records))
