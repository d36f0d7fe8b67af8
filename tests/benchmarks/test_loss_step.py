"The chunked loss beside full logits: 4,096 tokens, width 256, vocabulary 49,152."

from fullsize.loss import Step, full
from timing import seconds_of

from mllm_replica.models.loss import chunked_cross_entropy


def test_chunked_loss_is_no_slower(judge):
    ours, usual = Step(chunked_cross_entropy), Step(full)
    judge('chunked loss ÷ full', lambda: seconds_of(ours) / seconds_of(usual), 1.0, '', True)
