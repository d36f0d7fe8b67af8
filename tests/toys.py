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
