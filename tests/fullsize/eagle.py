"Eagle's five experts with tiny backbones at 1024 px, its fusions at the sizes of the paper and its splice."

from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

from mllm_replica.eagle.experts.expert import tokens_of
from mllm_replica.eagle.experts.towers import build_expert
from mllm_replica.eagle.fusing.fusion import ExpertShape, build_fusion
from mllm_replica.eagle.fusing.mixture import Mixture, shapes_of
from mllm_replica.eagle.fusing.splice import lay_out, splice, splice_layout
from mllm_replica.models.vision import CLIP_MEAN, CLIP_STD

BACKBONES = dict(
    clip=(
        dict(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,
        ),
        None,
    ),
    convnext=(dict(depths=[1, 1, 1, 1], dims=[4, 6, 8, 12]), 1024),
    sam=(
        dict(
            hidden_size=8,
            output_channels=2,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=1024,
            patch_size=16,
            window_size=14,
            global_attn_indexes=[1],
            mlp_dim=16,
        ),
        None,
    ),
    eva=(
        dict(
            patch_size=16,
            window_size=16,
            embed_dim=8,
            depth=3,
            num_heads=1,
            window_block_indexes=[0, 1],
            pretrain_img_size=224,
        ),
        1024,
    ),
    pix2struct=(
        dict(
            hidden_size=8,
            patch_embed_hidden_size=768,
            d_ff=16,
            d_kv=4,
            num_hidden_layers=2,
            num_attention_heads=2,
            seq_len=64,
        ),
        1024,
    ),
)
X5 = [
    ExpertShape('clip', 1024, 24),
    ExpertShape('convnext', 3072, 32),
    ExpertShape('sam', 1024, 32),
    ExpertShape('det', 1024, 64),
    ExpertShape('pix2struct', 1536, 45),
]


def mixture(device='cpu'):
    "The five tiny backbones, channels concatenated on 32 × 32 cells."
    torch.manual_seed(0)
    with torch.device(device):
        experts = {kind: build_expert(kind, *settings) for kind, settings in BACKBONES.items()}
        return Mixture(experts, build_fusion('channel', shapes_of(experts), 32, 1)[0], 1024).eval()


five = lru_cache(1)(mixture)


def image(device='cpu'):
    generator = None if device == 'meta' else torch.Generator().manual_seed(1)
    return torch.randn(1, 3, 1024, 1024, generator=generator, device=device)


def passes(function, inputs, backward, parameters=()):
    "One forward, or one forward and backward."
    for x in (*inputs, *parameters):
        x.grad = None
    with torch.set_grad_enabled(backward):
        out = function()
    if backward:
        out.backward(torch.ones_like(out))
    return out


def bilinear(x, side):
    return F.interpolate(x, (side, side), mode='bilinear', align_corners=True)


def five_reference(whole, x):
    "Each expert alone, its map brought to the grid."
    seen = [x if tower.image_size == 1024 else bilinear(x, tower.image_size) for tower in whole.vision_towers]
    return [tokens_of(bilinear(tower(picture), 32)) for tower, picture in zip(whole.vision_towers, seen)]


def prepared_reference(x):
    "Pix2Struct's own statistics of the raw picture, in double precision."
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_STD, CLIP_MEAN))
    raw = 255 * (x.double() * std + mean)
    normed = ((raw - raw.mean()) / raw.std(correction=0)).float()
    return F.interpolate(normed, (720, 720), mode='bilinear', antialias=True)


def maps(shapes):
    "As experts return them: stored channels last."
    kept = dict(memory_format=torch.channels_last)
    return [torch.randn(1, e.channels, e.side, e.side).to(**kept).requires_grad_() for e in shapes]


def fused(fusion, project, given):
    "CLIP's and ConvNeXt's maps as tokens of a 7B model; with what LLaVA-HR's adapters cost between the layers."
    if fusion.injects:
        tokens = tokens_of(given[0])
        for adapter in fusion.align_stages_latent:
            tokens = adapter(tokens, fusion.detail(given[1:]).permute(0, 2, 3, 1))
        given = [tokens.transpose(1, 2).unflatten(2, (24, 24)), given[1]]
    return project(fusion(given))


class Concatenation:
    "The picture for CLIP, the maps of CLIP, EVA and Pix2Struct brought to the grid, SAM's unshuffled, as officially."

    def __init__(self):
        self.picture, self.given, self.fusion = image(), maps(X5), build_fusion('channel', X5, 32, 1)[0]
        self.sam = torch.randn(1, 256, 64, 64).to(memory_format=torch.channels_last).requires_grad_()

    def all_maps(self):
        return [*self.given[:2], F.pixel_unshuffle(self.sam, 2), *self.given[3:]]

    def __call__(self):
        bilinear(self.picture, 336)
        return self.fusion(self.all_maps())

    def reference(self):
        return torch.cat([bilinear(x.float(), 32).flatten(2).transpose(1, 2) for x in self.all_maps()], 2)


class Splice:
    "Four rows of 512 words with an image of 1024 tokens each, embedded at width 4096."

    def __init__(self):
        torch.manual_seed(0)
        self.words, self.visual = nn.Embedding(1000, 4096), torch.randn(4, 1024, 4096, requires_grad=True)
        self.ids = torch.randint(0, 1000, (4, 513))
        self.ids[:, 35] = -200
        self.layout = lay_out(self.ids, [1024] * 4)

    def released(self):
        "One place per image in the ids, as the official figure."
        return splice_layout(self.words, lay_out(self.ids, [1024] * 4), self.visual.flatten(0, 1))

    def ready(self):
        "All places in the ids, as our processor makes them."
        return splice(self.words, self.layout.input_ids, self.visual.flatten(0, 1))

    def looped(self):
        "The official splice of complete rows: sample by sample, many small parts."
        rows, image = [], 0
        for line in self.ids:
            parts, start = [], 0
            for place in [*(line == -200).nonzero().flatten().tolist(), len(line)]:
                parts.append(self.words(line[start:place]))
                if place < len(line):
                    parts.append(self.visual[image])
                image, start = image + (place < len(line)), place + 1
            rows.append(torch.cat(parts))
        return torch.stack(rows)
