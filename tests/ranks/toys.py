"""A small model with one of everything that has its own road through the optimizer, and batches for it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import use_experts_implementation

__all__ = [
    "Toy",
    "Even",
    "Padded",
    "Checkpointed",
    "Sliver",
    "Sometimes",
    "Resting",
    "Routed",
    "Late",
    "Idle",
    "Layers",
    "Lookup",
    "Marked",
    "Napping",
    "Tied",
    "TiedLookup",
    "batches",
    "including",
    "marked",
    "micro_batches",
    "plenty",
    "SEQUENCES",
]

VOCABULARY, WIDTH, HIDDEN = 37, 35, 53  # odd and not divisible by 3: shards of 2 and of 3 ranks end inside a row
SEQUENCES = 18  # in a global batch: divides by 1, 2, 3 ranks times 1, 3 micro-batches
LENGTH = 6  # of a sequence


class Toy(nn.Module):
    """Next-token prediction without attention.

    embed   an embedding, for AdamW          blend   bare, a matrix by ``include`` (:func:`including`): by its hook
    up      a linear with a bias             down    without one
    twin    and echo share one matrix        frozen  must stay as it is
    norm    for AdamW                        head    an output head, for AdamW
    """

    # What MoFaSGD must take, in the order of the model's parameters.
    MATRICES = ["blend", "up.weight", "down.weight", "twin.weight"]

    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blend = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.twin = nn.Linear(width, width, bias=False)
        self.echo = nn.Linear(width, width, bias=False)
        self.echo.weight = self.twin.weight
        self.frozen = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks():
            x = self.run(block, x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, -2).float(), targets.flatten())

    def blocks(self):
        return [self.mix, self.widen, self.repeat]

    def run(self, block, x: Tensor) -> Tensor:
        return x + block(x)

    def mix(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.blend.to(x.dtype))

    def widen(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))

    def repeat(self, x: Tensor) -> Tensor:
        return self.echo(torch.tanh(self.twin(x))) + self.frozen(x)


class Even(Toy):
    """Rows of whole groups of 32."""

    def __init__(self):
        super().__init__(64, 96)


class Padded(Toy):
    """Embedding and head of a size that 2 and 3 ranks share out evenly."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(48, WIDTH)
        self.head = nn.Linear(WIDTH, 48, bias=False)


class Checkpointed(Toy):
    """The same model, whose blocks keep no activations and run again in backward."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant

    def run(self, block, x: Tensor) -> Tensor:
        return checkpoint(super().run, block, x, use_reentrant=self.reentrant)


class Sometimes(Toy):
    """With a matrix that only sequences beginning with an even token go through."""

    MATRICES = [*Toy.MATRICES, "spare.weight"]

    def __init__(self):
        super().__init__()
        self.spare, head = nn.Linear(WIDTH, WIDTH, bias=False), self.head
        del self.head
        self.head = head  # last: so a head is told in a model that does not name it

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.even = (tokens[:, 0] % 2 == 0).view(-1, 1, 1)
        return super().forward(tokens, targets)

    def blocks(self):
        return [*super().blocks(), self.detour]

    def detour(self, x: Tensor) -> Tensor:
        return torch.where(self.even, torch.tanh(self.spare(x)), 0) if self.even.any() else torch.zeros_like(x)


class Resting(Toy):
    """With three matrices that are not always trained; a step is one forward with gradients.

    spare   not used in the second and third step
    late    not used before the third
    fixed   frozen by ``requires_grad_(False)`` after the second
    """

    MATRICES = [*Toy.MATRICES, "spare.weight", "late.weight", "fixed.weight"]

    def __init__(self):
        super().__init__()
        self.spare, self.late, self.fixed = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        head = self.head
        del self.head
        self.head = head
        self.step = 0

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.step += 1
        if self.step > 2 and hasattr(self, "fixed"):
            self.fixed.requires_grad_(False)
        return super().forward(tokens, targets)

    def blocks(self):
        unused = {"spare"} if self.step in (2, 3) else set()
        unused |= {"late"} if self.step < 3 else set()
        used = [name for name in ("spare", "late", "fixed") if name not in unused and hasattr(self, name)]
        return [*super().blocks(), *(getattr(self, name) for name in used)]

    def run(self, block, x: Tensor) -> Tensor:
        return x + torch.tanh(block(x))


class Late(Resting):
    """With the one of those three that comes late; for it alone to be a matrix."""

    MATRICES = ["late.weight"]
    OTHERS = ["^(blend|up|down|twin)"]

    def __init__(self):
        super().__init__()
        del self.spare, self.fixed


class Sliver(Toy):
    """With a 2 x 2 matrix, of which the third of three ranks holds nothing."""

    MATRICES = [*Toy.MATRICES, "sliver.weight"]

    def __init__(self):
        super().__init__()
        self.sliver, head = nn.Linear(2, 2, bias=False), self.head
        del self.head
        self.head = head

    def blocks(self):
        return [self.narrow, *super().blocks()]

    def narrow(self, x: Tensor) -> Tensor:
        return F.pad(torch.tanh(self.sliver(x[..., :2])), (0, WIDTH - 2))


class Layers(nn.Module):
    """Toy in modules of its own, for engines that shard by modules.

    place   a matrix whose input requires no gradient     gate    4 rows: the third of three ranks holds none
    mix     a linear with a forward of its own            feed    two linears, one with a bias, and a norm
    pair    two linears of one matrix, and a frozen one   embed, norm, head   for AdamW
    """

    MATRICES = ("place.weight", "mix.weight", "feed.up.weight", "feed.down.weight", "pair.twin.weight", "gate.weight")

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Linear(LENGTH, WIDTH, bias=False)
        self.mix, self.feed, self.pair = Mix(), Feed(), Pair()
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.place(torch.eye(LENGTH, dtype=x.dtype, device=x.device))
        for block in self.blocks():
            x = x + block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, -2).float(), targets.flatten())

    def blocks(self):
        return [self.mix, self.feed, self.pair, self.narrow]

    def narrow(self, x: Tensor) -> Tensor:
        return F.pad(torch.tanh(self.gate(x)), (0, WIDTH - 4))


class Tied(Layers):
    """Embedding and head are one weight."""

    def __init__(self):
        super().__init__()
        nn.init.normal_(self.embed.weight, std=WIDTH**-0.5)
        self.head.weight = self.embed.weight


class ScaledEmbedding(nn.Embedding):
    """As Gemma's and mBART's: by the forward of the class below."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 3.0


class Lookup(Layers):
    """With a scaled embedding for a matrix. Token 5 is padding, and those from 37 on never come."""

    MATRICES = ("embed.weight", *Layers.MATRICES)
    INCLUDE = ("^embed",)
    STILL = (5, *range(VOCABULARY, 61))

    def __init__(self):
        super().__init__()
        self.embed = ScaledEmbedding(61, WIDTH, padding_idx=5)
        self.head = nn.Linear(WIDTH, 61, bias=False)


class TiedLookup(Tied):
    """Whose embedding, which is the head, is a matrix."""

    MATRICES = ("embed.weight", *Layers.MATRICES)
    INCLUDE = ("^embed",)
    STILL = ()


class ToyConfig:
    """What an experts module reads of a model's config."""

    _experts_implementation = "eager"


@use_experts_implementation
class ToyExperts(nn.Module):
    """Seven experts of odd widths, the last of which no token is sent to."""

    EXPERTS, INNER = 7, 11

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.num_experts, self.act_fn = self.EXPERTS, torch.tanh
        self.gate_up_proj = nn.Parameter(torch.randn(self.EXPERTS, 2 * self.INNER, WIDTH) / WIDTH**0.5)
        self.down_proj = nn.Parameter(torch.randn(self.EXPERTS, WIDTH, self.INNER) / self.INNER**0.5)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, place = torch.where(top_k_index == e)
            x = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[e]))
            out.index_add_(0, token, F.linear(x, self.down_proj[e]) * top_k_weights[token, place, None])
        return out


class Block(nn.Module):
    """Two experts a token, by a rule that no rounding changes; weighed by a router, which AdamW trains."""

    def __init__(self):
        super().__init__()
        self.router = nn.Parameter(torch.randn(ToyExperts.EXPERTS, WIDTH) / WIDTH**0.5)
        self.experts = ToyExperts(ToyConfig())

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        live = ToyExperts.EXPERTS - 1
        tokens = tokens.flatten()
        chosen = torch.stack([tokens % live, (tokens + 1 + tokens // live % (live - 1)) % live], dim=-1)
        flat = x.flatten(0, -2)
        weights = F.linear(flat, self.router).gather(1, chosen).softmax(-1)
        return self.experts(flat, chosen, weights).view_as(x)


class Routed(Layers):
    """With stacked experts."""

    MATRICES = (*Layers.MATRICES, "moe.experts.gate_up_proj", "moe.experts.down_proj")

    def __init__(self):
        super().__init__()
        self.moe = Block()

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.route = lambda x: self.moe(x, tokens)
        return super().forward(tokens, targets)

    def blocks(self):
        return [*super().blocks(), self.route]


class Napping(Layers):
    """Whose gate is not trained in the third and fourth step; a step is one forward with gradients."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.steps += torch.is_grad_enabled()
        return super().forward(tokens, targets)

    def narrow(self, x: Tensor) -> Tensor:
        weight = self.gate.weight.detach() if self.steps in (3, 4) else self.gate.weight
        return F.pad(torch.tanh(F.linear(x, weight)), (0, WIDTH - 4))


class Marked(Layers):
    """With a linear that marked sequences alone go through."""

    MATRICES = (*Layers.MATRICES, "spare.weight")

    def __init__(self):
        super().__init__()
        self.spare, head = nn.Linear(WIDTH, WIDTH, bias=False), self.head
        del self.head
        self.head = head  # last

    def forward(self, tokens: Tensor, targets: Tensor, marks: Tensor) -> Tensor:
        self.marks = marks
        return super().forward(tokens, targets)

    def blocks(self):
        return [*super().blocks(), self.detour]

    def detour(self, x: Tensor) -> Tensor:
        mask = self.marks.view(-1, 1, 1)
        return torch.where(mask, torch.tanh(self.spare(x)), 0) if mask.any() else torch.zeros_like(x)


class Idle(Layers):
    """With a second output of feed, which the loss does not use."""

    MATRICES = (
        *Layers.MATRICES[:2],
        "feed.used.up.weight",
        "feed.used.down.weight",
        "feed.aside.weight",
        *Layers.MATRICES[4:],
    )

    def __init__(self):
        super().__init__()
        self.feed = TwoOutputs(self.feed)

    def blocks(self):
        return [self.mix, lambda x: self.feed(x)[0], self.pair, self.narrow]


class Mix(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH, bias=False)
        nn.init.normal_(self.weight, std=WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)  # not its transpose


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.norm.bias, std=0.1)  # from zero it would be rounding, as far as it goes in a few steps
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


class TwoOutputs(nn.Module):
    def __init__(self, used: Feed):
        super().__init__()
        self.used, self.aside = used, nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.used(x), self.aside(x)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.twin, self.echo, self.frozen = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.echo.weight = self.twin.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.echo(torch.tanh(self.twin(x))) + self.frozen(x)


def including(model: nn.Module, include: Sequence[str] = ()) -> dict[str, list[str]]:
    """The option ``include``, with the bare matrix of :class:`Toy` where the model has it; nothing where it is empty."""
    blend = getattr(model, "blend", None)
    own = ["^blend$"] if isinstance(blend, nn.Parameter) and blend.requires_grad else []
    patterns = [*include, *own]
    return {"include": patterns} if patterns else {}


def batches(steps: int, seed: int = 0, sequences: int = SEQUENCES) -> list[tuple[Tensor, Tensor]]:
    """Global batches: tokens, and targets that follow from them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (steps, sequences, LENGTH), generator=generator)
    return [(t, (5 * t + 3) % VOCABULARY) for t in tokens]


def marked(steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches of :class:`Marked`: the last sequence is, so the last rank alone has one, but in the second batch."""
    found = []
    for step, (tokens, targets) in enumerate(plenty(steps)):
        marks = torch.zeros(len(tokens), dtype=torch.bool)
        marks[-1] = step != 1
        found.append((tokens, targets, marks))
    return found


def plenty(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Global batches for four ranks too."""
    return batches(steps, sequences=2 * SEQUENCES)


def micro_batches(batch, rank: int, world: int, count: int):
    """This rank's part of a global batch, cut into ``count`` micro-batches."""
    mine = [part.chunk(world)[rank].chunk(count) for part in batch]
    return list(zip(*mine))
