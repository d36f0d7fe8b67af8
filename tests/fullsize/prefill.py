"A prompt with images read by the small models of mPLUG-Owl3's Figure 1."

import torch

from mllm_replica.models.cost import count
from mllm_replica.owl3.recipes import build, recipe


class Prefill:
    "Calling it reads the prompt once."

    def __init__(self, row, images):
        torch.manual_seed(0)
        self.model, processor = build(recipe('fig1a', row, 'tiny', 0))
        place = processor.placeholder_ids if row == 'owl3' else [processor.image_token_id] * 64
        ids = torch.cat([torch.tensor([place]).repeat(1, images), torch.randint(4, 90, (1, 16))], 1)
        self.given = dict(input_ids=ids, image_features=torch.randn(images, 64, 48), use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def __call__(self):
        return self.model(**self.given).logits

    def flops(self):
        return count(self).forward


prefill = Prefill
