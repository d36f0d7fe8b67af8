"Models whose parts the toys of `toys.model_of` do not have."

import torch
from toys import TEXT, TOWERS, VISION

LONG = TEXT | dict(max_position_embeddings=256)
SEEN = VISION | dict(image_size=16)


def honeybee(**connector):
    from mllm_replica.honeybee.model import HoneybeeConfig, HoneybeeModel

    settings = dict(num_query_tokens=4, num_eos_tokens=1) | connector
    return HoneybeeModel(HoneybeeConfig(vision_config=SEEN, connector_config=settings, text_config=LONG))


def owl2():
    from mllm_replica.owl2.model import Owl2Config, Owl2Model

    abstractor = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)
    vision = {k: v for k, v in SEEN.items() if k != 'model_type'} | dict(use_cls_token=False, image_size=64)
    text = LONG | dict(model_type='qwen2', tie_word_embeddings=True)
    connector = abstractor | dict(num_learnable_queries=4)
    return Owl2Model(Owl2Config(vision_config=vision, connector_config=connector, text_config=text))


def mm1():
    from mllm_replica.mm1.model import MM1Config, MM1Model

    connector = dict(connector_type='att', num_query_tokens=4, num_attention_heads=4, start='local')
    experts = dict(every=2, num_experts=3)
    return MM1Model(MM1Config(vision_config=SEEN, connector_config=connector, text_config=LONG, experts=experts))


def eagle(fusion='channel'):
    from mllm_replica.eagle.model import EagleConfig, EagleModel

    experts = [dict(name=name) | tower for name, tower in TOWERS.items()]
    experts[list(TOWERS).index('pix2struct')]['options'] = dict(max_patches=16)
    vision = dict(experts=experts, image_size=32)
    return EagleModel(EagleConfig(vision_config=vision, connector_config=dict(grid=2, fusion=fusion), text_config=LONG))


def owl3(**settings):
    from mllm_replica.owl3.model import Owl3Config, Owl3Model

    vision = SEEN | dict(model_type='siglip_vision_model', vision_use_head=False)
    text = LONG | dict(model_type='qwen2', tie_word_embeddings=True)
    settings = dict(hyper_layers=[0, 1], placeholder_ids=[60, 61]) | settings
    return Owl3Model(Owl3Config(vision_config=vision, text_config=text, **settings))


VARIANTS = {
    'honeybee d-abs': lambda: honeybee(
        projector_type='d-abs', d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=32
    ),
    'honeybee resampler': lambda: honeybee(
        projector_type='resampler', hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40
    ),
    'owl2 on qwen2': owl2,
    'mm1 with experts': mm1,
    'eagle with all experts': eagle,
    'eagle with an injection': lambda: eagle('llava_hr'),
    'owl3 with a gate of parameters': lambda: owl3(gate='static', shared_norm=False),
    'owl3 with cross-attention': lambda: owl3(fusion='post_cross'),
}


def variant(name):
    "A small model, as `toys.model_of` gives it."
    torch.manual_seed(0)
    built = VARIANTS[name]().eval()
    for name, parameter in built.named_parameters():
        if name.endswith('.gate') or parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float('norm' in name and name.endswith('weight')), 0.2)
    return built
