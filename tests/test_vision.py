"Preprocessing and position tables against the official code; the feature cache under fault."

import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersModel,
    SiglipVisionModel,
    ViTModel,
)

from mllm_replica.models.vision import (
    FeatureCache,
    anatomy,
    clip_pixels,
    encoder_key,
    has_class_token,
    hidden_states,
    interpolate_positions,
    patch_features,
    statistics_of,
)

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / 'golden/honeybee'
SIZES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=12, patch_size=4
)


def read(name):
    with safe_open(GOLDEN / name, 'pt') as file:
        return json.loads(file.metadata()['config']), {k: file.get_tensor(k) for k in file.keys()}


def test_preprocessing():
    config, t = read('image_preprocess.safetensors')
    for i in range(3):
        pixels = clip_pixels(
            [Image.fromarray(t[f'in.image{i}'].numpy())], config['image_size'], config['mean'], config['std']
        )[0]
        torch.testing.assert_close(pixels, t[f'out.pixel_values{i}'], atol=1e-6, rtol=1e-5)


def test_position_interpolation():
    config, t = read('clip_pos_interp.safetensors')
    for i, case in enumerate(config['cases']):
        torch.testing.assert_close(
            interpolate_positions(t[f'in.pos{i}'], case['scale']), t[f'out.pos{i}'], atol=1e-6, rtol=1e-5
        )


ENCODERS = {  # kind -> class, tokens before the patches
    'clip_vision_model': (CLIPVisionModel, 1),
    'siglip_vision_model': (SiglipVisionModel, 0),
    'dinov2': (Dinov2Model, 1),
    'dinov2_with_registers': (Dinov2WithRegistersModel, 5),
    'vit': (ViTModel, 1),
    'deit': (DeiTModel, 2),
}


@pytest.mark.parametrize('kind', ENCODERS)
def test_features_of_every_layer(kind):
    torch.manual_seed(0)
    (form, skip), fields = ENCODERS[kind], AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{name: size for name, size in SIZES.items() if name in fields})
    encoder = form(config).eval()
    for parameter in encoder.parameters():  # also those that begin at zero
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(2, 3, 12, 12)
    assert anatomy(encoder).leading == skip and has_class_token(encoder) == (skip > 0)
    with torch.no_grad():
        reference = encoder(pixels, output_hidden_states=True).hidden_states
        assert len(hidden_states(encoder, pixels)) == 4
        for layer in range(-4, 4):
            torch.testing.assert_close(patch_features(encoder, pixels, layer), reference[layer][:, skip:])
        if kind != 'clip_vision_model':  # whose norm is of the pooled token alone
            normed = anatomy(encoder).last_norm(hidden_states(encoder, pixels)[-1])
            torch.testing.assert_close(normed, encoder(pixels).last_hidden_state, check_stride=False)


def test_dinov2_reads_smaller_pictures_as_its_class_does():
    "Positions are the class's own, whatever the table was made for."
    torch.manual_seed(0)
    fields = {name: size for name, size in SIZES.items() if name != 'intermediate_size'}
    encoder = Dinov2Model(Dinov2Config(**fields | dict(image_size=28))).eval()
    pixels = torch.randn(2, 3, 12, 20)
    with torch.no_grad():
        states = encoder(pixels, output_hidden_states=True).hidden_states
        assert torch.equal(patch_features(encoder, pixels, -2), states[-2][:, 1:])


def test_a_module_without_layers_is_named():
    with pytest.raises(ValueError, match=r"Sequential has the parts \['0'\]; expected `embeddings`"):
        patch_features(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.zeros(1, 3, 2, 2))


def test_statistics_are_of_the_configuration_or_of_the_kind():
    assert statistics_of(CLIPVisionConfig()) == {}
    assert statistics_of(Dinov2Config())['image_mean'] == [0.485, 0.456, 0.406]
    assert statistics_of(Dinov2Config(image_mean=[0.5] * 3)) == dict(
        image_mean=[0.5] * 3, image_std=[0.229, 0.224, 0.225]
    )


def load(names):
    return [Image.new('RGB', (8, 8), (int(n), 0, 0)) for n in names]


def encode(images):
    return torch.stack([torch.tensor(np.asarray(image)[0, 0, 0].item() * 1.0) for image in images]).view(-1, 1, 1)


NAMES = [str(i) for i in range(10)]


def test_cache_is_read_back(tmp_path):
    cache = FeatureCache.compute(tmp_path, 'k', NAMES, load, encode, batch_size=3)
    assert (
        cache[['9', '0', '9']].flatten().tolist() == [9, 0, 9]
        and cache['4'].shape == (1, 1)
        and '4' in cache
        and len(cache) == 10
    )
    assert FeatureCache.compute(tmp_path, 'k', NAMES, None, None)['7'].item() == 7  # not computed again
    assert FeatureCache.compute(tmp_path, 'other', NAMES, load, lambda x: encode(x) + 1)['7'].item() == 8
    half = FeatureCache.compute(tmp_path, 'bf16', NAMES, load, lambda x: encode(x).bfloat16())
    assert half['7'].dtype == torch.float32


def die(images):
    if images[0].getpixel((0, 0))[0] >= 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(images)


def test_killed_writer_leaves_no_cache(tmp_path):
    writer = multiprocessing.get_context('fork').Process(
        target=FeatureCache.compute, args=(tmp_path, 'k', NAMES, load, die, 3)
    )
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert any(p.name.startswith('part-') for p in tmp_path.iterdir())
    assert FeatureCache.compute(tmp_path, 'k', NAMES, load, encode).array.flatten().tolist() == list(range(10))


def test_a_write_that_fails_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (130, hard))  # the header fits, the features do not: as on a full disk
    try:
        with pytest.raises(OSError):
            FeatureCache.compute(tmp_path, 'k', NAMES, load, encode)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_damaged_or_foreign_cache_is_refused(tmp_path):
    cache = FeatureCache.compute(tmp_path, 'k', NAMES, load, encode)
    with pytest.raises(ValueError, match='holds features of key k, expected w'):
        FeatureCache(cache.folder, 'w')
    data = (cache.folder / 'features.npy').read_bytes()
    (cache.folder / 'features.npy').write_bytes(data[:-4])
    with pytest.raises(ValueError):
        FeatureCache(cache.folder, 'k')
    with pytest.raises(ValueError, match='not unique'):
        FeatureCache.compute(tmp_path, 'k', ['a', 'a'], load, encode)


def test_key_depends_on_every_weight():
    torch.manual_seed(0)
    encoder = CLIPVisionModel(CLIPVisionConfig(**SIZES))
    keys = {encoder_key(encoder, layer=-2), encoder_key(encoder, layer=-1), encoder_key(encoder.bfloat16(), layer=-2)}
    encoder.float()
    for _, weight in encoder.named_parameters():
        with torch.no_grad():
            weight.view(-1)[0] += 1
        keys.add(encoder_key(encoder, layer=-2))
    assert len(keys) == 3 + sum(1 for _ in encoder.parameters())
