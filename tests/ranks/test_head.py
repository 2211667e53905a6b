"""The fused head under DeepSpeed: the dense reference in every stage, the head on AdamW or a matrix."""

import json

from comparing import TOLERANCE, assert_same, dense
from launching import on_ranks
from scenes.llama import OneLayer
from training import config, train

STEPS = 3
COARSE = {"fp16": 0.02, "bf16": 0.1}
HEAD = "model.lm_head.weight"


class Tuned(OneLayer):
    """Its loss is Hugging Face's; it keeps the logits, of which there are none with a fused head."""

    def __init__(self):
        super().__init__()
        self.logits = None

    def forward(self, tokens, targets):
        output = self.model(input_ids=tokens, labels=tokens)
        self.logits = output.logits
        return output.loss


def fused(stage: int, matrix: bool, dtype: str = "fp32") -> dict:
    options = {"fused_head": True, "include": ["lm_head"] if matrix else []}
    model = Tuned()
    result = train(config(stage, dtype=dtype, micro=3, options=options), STEPS, model=model)
    assert model.logits is None, "the head was not fused"
    for module in (model.model, model.model.lm_head):
        assert not {"_loss_function", "forward"} & vars(module).keys(), "destroy() has left something behind"
    return result


@on_ranks(
    fused,
    {"stage": 2, "dtype": "fp16"},
    {"stage": 3, "dtype": "bf16"},
    *({"stage": i} for i in range(4)),
    matrix=[False, True],
)
def test_it_agrees_with_the_dense_reference(ran):
    wanted = dense(Tuned, steps=STEPS, matrices=(*Tuned.MATRICES, *([HEAD] if ran.matrix else [])))
    assert_same(ran, wanted, COARSE.get(json.loads(ran.case.arguments).get("dtype"), TOLERANCE))
