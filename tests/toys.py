"Small settings and files that several tests share."

VISION = dict(
    model_type='clip_vision_model',
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=8,
    patch_size=4,
)
TEXT = dict(
    model_type='llama',
    vocab_size=259,  # of the byte tokenizer
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.2,
)
TOWERS = dict(  # Eagle's: settings and image size
    clip=dict(
        config=dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        image_size=24,
    ),
    convnext=dict(config=dict(depths=[1, 2], dims=[8, 12], ls_init_value=0.5), image_size=32),
    sam=dict(
        config=dict(
            hidden_size=16,
            output_channels=4,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            window_size=3,
            global_attn_indexes=[1],
            mlp_dim=24,
        )
    ),
    eva=dict(
        config=dict(
            patch_size=4,
            window_size=3,
            embed_dim=16,
            depth=3,
            num_heads=2,
            window_block_indexes=[0, 1],
            pretrain_img_size=8,
        ),
        image_size=32,
    ),
    pix2struct=dict(
        config=dict(
            hidden_size=16,
            patch_embed_hidden_size=48,
            d_ff=24,
            d_kv=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            seq_len=8,
        ),
        image_size=32,
    ),
    dinov2=dict(
        config=dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4),
        image_size=24,
    ),
    efficientnet_lite=dict(config=dict(stages=3), image_size=36),
)
RECORD = dict(  # what every result of Honeybee's Table 3 says beside its value
    table='3',
    scale='tiny',
    unit='key',
    digest='digest',
    code='source',
    commit='abc123',
    date='2025-01-01T12:00:00+00:00',
    seconds=61.5,
    n_eval=1000,
    processor='p',
    threads='1',
    torch='2',
)


def save_backbones(folder):
    "An encoder in `folder`/vision, a decoder with its tokenizer in `folder`/text."
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from mllm_replica.data.language import byte_tokenizer

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    vision = CLIPVisionConfig(**sizes, image_size=224, patch_size=14)
    text = LlamaConfig(**sizes, vocab_size=259, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    CLIPVisionModel(vision).save_pretrained(folder / 'vision')
    byte_tokenizer().save_pretrained(folder / 'text')
    LlamaForCausalLM(text).save_pretrained(folder / 'text')


def model_of(paper):
    "A small model of a paper, for the byte tokenizer and pictures of 16 pixels (Eagle: 32)."
    import torch

    from mllm_replica.eagle.model import EagleConfig, EagleModel
    from mllm_replica.honeybee.model import HoneybeeConfig, HoneybeeModel
    from mllm_replica.mm1.model import MM1Config, MM1Model
    from mllm_replica.owl2.model import Owl2Config, Owl2Model
    from mllm_replica.owl3.model import Owl3Config, Owl3Model

    torch.manual_seed(0)
    text, vision = TEXT | dict(max_position_embeddings=256), VISION | dict(image_size=16)
    encoder = {name: value for name, value in vision.items() if name != 'model_type'}
    experts = [dict(name=name) | TOWERS[name] for name in ('clip', 'convnext')]
    abstractor = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)
    parts = {
        'honeybee': (HoneybeeModel, HoneybeeConfig, vision, dict(projector_type='c-abs', hidden_size=32, depth=1)),
        'owl2': (Owl2Model, Owl2Config, encoder, abstractor | dict(num_learnable_queries=4)),
        'mm1': (MM1Model, MM1Config, vision, dict(connector_type='avg', num_query_tokens=4)),
        'eagle': (EagleModel, EagleConfig, dict(experts=experts, image_size=32), dict(grid=2)),
        'owl3': (Owl3Model, Owl3Config, encoder | dict(model_type='siglip_vision_model'), None),
    }
    model, config, vision, connector = parts[paper]
    more = {'honeybee': dict(num_query_tokens=4)}.get(paper, {})
    special = dict(hyper_layers=[0], placeholder_ids=[60, 61]) if paper == 'owl3' else {}
    text = text | dict(model_type='qwen2') if paper == 'owl3' else text
    made = config(vision_config=vision, connector_config=connector and connector | more, text_config=text, **special)
    built = model(made).eval()
    for name, parameter in built.named_parameters():
        if name.endswith('.gate') or parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float('norm' in name and name.endswith('weight')), 0.2)
    return built


def batch_of(model):
    "Two prompts of different lengths, one image each, padded on the right."
    import torch

    image = getattr(model.config, 'placeholder_ids', None)
    image = image or [model.config.image_token_id] * model.config.visual_token_count()
    rows = [[1, 10, *image, 11, 12, 13, 11, 12], [1, *image, 21]]
    width = max(map(len, rows))
    size = model.config.vision_config.image_size
    return dict(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        pixel_values=torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)),
    )
