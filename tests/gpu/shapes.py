"""The models that are checked, their weights drawn on the device: of a few numbers, and of 1 to 2 B parameters, the paper's
own widths, encoders and visual tokens with fewer layers in the decoder (Owl3: the released 2B; MM1: the ablations' model)."""

from typing import Any, NamedTuple

import torch
from torch import nn

from mllm_replica.core.recipe import Stage
from mllm_replica.data.encoded import Encoded

PAPERS = ('honeybee', 'owl2', 'mm1', 'eagle', 'owl3')
TRAINED = {  # in the last stage of each paper
    'honeybee': (r'^abstractor\.', r'^language_model\.'),
    'owl2': (r'.',),
    'mm1': (r'.',),
    'eagle': (
        r'^vision_model\.vision_towers\.',
        r'^(mm_projector|fusion|vision_model\.fusion)\.',
        r'^language_model\.',
    ),
    'owl3': (r'^vision2text_model\.', r'^language_model\.'),
}


class Shape(NamedTuple):
    """What a step of a model is given.

    length: positions of a sample
    images: of a sample
    batch: samples of a micro-batch
    """

    length: int
    images: int
    batch: int


LARGE = {
    'honeybee': Shape(1024, 1, 8),
    'owl2': Shape(1024, 1, 8),
    'mm1': Shape(1024, 1, 8),
    'eagle': Shape(2048, 1, 2),
    'owl3': Shape(1024, 4, 4),
}


def shape_of(paper: str, tiny: bool) -> Shape:
    "The step of a paper's model."
    return Shape(48, 2 if paper == 'owl3' else 1, 2) if tiny else LARGE[paper]


# a few numbers, with heads that every kernel takes

_VIT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
)
_TEXT = dict(
    model_type='llama',
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.1,
)
_EVA = dict(
    patch_size=4, window_size=3, embed_dim=32, depth=3, num_heads=2, window_block_indexes=[0, 1], pretrain_img_size=8
)
_SAM = dict(
    num_hidden_layers=2, num_attention_heads=2, patch_size=4, window_size=3, global_attn_indexes=[1], mlp_dim=48
)
_TOWERS = [
    dict(name='clip', config=_VIT, image_size=24),
    dict(name='convnext', config=dict(depths=[1, 2], dims=[8, 12], ls_init_value=0.5), image_size=32),
    dict(name='sam', config=_SAM | dict(hidden_size=32, output_channels=8, image_size=32)),
    dict(name='eva', config=_EVA, image_size=32),
]


def _tiny(paper: str) -> tuple[type, Any]:
    "Class and configuration of a few numbers."
    clip, vision, text = dict(model_type='clip_vision_model'), _VIT, _TEXT
    if paper == 'honeybee':
        from mllm_replica.honeybee.model import HoneybeeConfig as Config
        from mllm_replica.honeybee.model import HoneybeeModel as Model

        vision, more = _VIT | clip, dict(projector_type='c-abs', hidden_size=32, depth=1, num_query_tokens=4)
    elif paper == 'owl2':
        from mllm_replica.owl2.model import Owl2Config as Config
        from mllm_replica.owl2.model import Owl2Model as Model

        sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        more = sizes | dict(num_learnable_queries=4)
    elif paper == 'mm1':
        from mllm_replica.mm1.model import MM1Config as Config
        from mllm_replica.mm1.model import MM1Model as Model

        vision, more = _VIT | clip, dict(connector_type='avg', num_query_tokens=4)
    elif paper == 'eagle':
        from mllm_replica.eagle.model import EagleConfig as Config
        from mllm_replica.eagle.model import EagleModel as Model

        vision, more = dict(experts=_TOWERS, image_size=32), dict(grid=2)
    else:
        from mllm_replica.owl3.model import Owl3Config as Config
        from mllm_replica.owl3.model import Owl3Model as Model

        vision = _VIT | dict(model_type='siglip_vision_model', vision_use_head=False)
        text = _TEXT | dict(model_type='qwen2', max_position_embeddings=4096)
        return Model, Config(vision_config=vision, text_config=text, hyper_layers=[0], placeholder_ids=[7, 8])
    return Model, Config(vision_config=vision, connector_config=more, text_config=text)


def _large(paper: str) -> tuple[type, Any]:
    "Class and configuration of 1 to 2 B parameters."
    if paper == 'honeybee':
        from mllm_replica.honeybee.model import HoneybeeModel, paper_config

        return HoneybeeModel, _cut(paper_config('7B', dict(projector_type='c-abs', num_query_tokens=144)), 6)
    if paper == 'owl2':
        from mllm_replica.owl2.model import Owl2Model, paper_config

        return Owl2Model, _cut(paper_config(), 6)
    if paper == 'mm1':
        from mllm_replica.mm1.model import MM1Config, MM1Model
        from mllm_replica.models.backbones import LLAMA, published, sized

        text = sized(LLAMA, 2048, 4608, 24, 16, num_key_value_heads=16)
        return MM1Model, MM1Config(vision_config=published('openai/clip-vit-large-patch14-336'), text_config=text)
    if paper == 'eagle':
        from mllm_replica.eagle.model import EagleModel
        from mllm_replica.eagle.released import paper_config

        return EagleModel, _cut(paper_config(experts=('clip-448', 'convnext-1024', 'det-1024')), 2)
    from mllm_replica.owl3.model import Owl3Model
    from mllm_replica.owl3.released import paper_config

    return Owl3Model, paper_config('2B')


def _cut(config: Any, layers: int) -> Any:
    "The same with fewer layers in the decoder."
    config.text_config.num_hidden_layers = layers
    return config


def build(paper: str, tiny: bool) -> nn.Module:
    "A model on the current default device, its weights drawn."
    kind, config = (_tiny if tiny else _large)(paper)
    torch.manual_seed(0)
    model = kind(config)
    if torch.get_default_device().type != 'meta':
        for name, parameter in model.named_parameters():  # a gate at zero would hide the images
            if name.endswith('.gate') or '.gate.' in name or tiny and parameter.dim() == 1:
                nn.init.normal_(parameter, float('norm' in name and name.endswith('weight')), 0.2)
    return model


def many_patches() -> nn.Module:
    "A small Owl3 whose pictures have SigLIP's 729 patches."
    kind, config = _tiny('owl3')
    config.vision_config.image_size, config.vision_config.patch_size = 378, 14
    torch.manual_seed(0)
    return kind(config)


def stage_of(paper: str, batch: int, steps: int) -> Stage:
    "The last stage of a paper, as far as a step goes."
    how = dict(mixture={'a': 1.0}, steps=steps, batch_size=batch, lr=1e-5, weight_decay=0.01, precision='bf16')
    return Stage(name='step', trainable=TRAINED[paper], **how)


def samples_of(config: Any, shape: Shape, count: int) -> list[Encoded]:
    "Samples of one length with pictures of noise; the second half of the words teaches."
    marks = getattr(config, 'placeholder_ids', None) or [config.image_token_id] * config.visual_token_count()
    side, draw = config.vision_config.image_size, torch.Generator().manual_seed(0)
    words = shape.length - 1 - len(marks) * shape.images
    if words < 8:
        raise ValueError(f'{shape.images} images of {len(marks)} positions leave no words of {shape.length} positions')
    samples = []
    for n in range(count):
        text = torch.randint(20, 250, (words,), generator=draw).tolist()
        ids, spans = [1], []
        for _ in range(shape.images):
            spans.append((len(ids), len(ids) + len(marks)))
            ids += marks
        ids += text
        labels = [-100] * (len(ids) - words // 2) + text[-(words // 2) :]
        images = [torch.randn(3, side, side, generator=draw) for _ in spans]
        samples.append(Encoded(id=f's{n}', input_ids=ids, labels=labels, images=images, image_spans=spans))
    return samples
