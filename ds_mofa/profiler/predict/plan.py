"""What is known of a run before any moment of it is looked at: its parameters, and who trains them how."""

import dataclasses
import functools
import math

from ds_mofa.partition.layout import Layout
from ds_mofa.profiler.predict.simulated.micro_batch import MicroBatch, Parameter
from ds_mofa.profiler.predict.zero import ZeroSettings
from ds_mofa.profiler.setting import RunSetting
from ds_mofa.rules.rule import Rule

__all__ = ["Plan", "numbers", "numbers_of_a_shard"]

_ADAPTERS = {"LoRA": ("adapter",)}  # the kinds of parameters that a baseline trains, where that is not all


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, one micro-batch of it, and the settings of its ZeRO."""

    setting: RunSetting
    batch: MicroBatch
    zero: ZeroSettings

    @property
    def sketched(self) -> bool:
        """Whether the matrices have sketches in place of gradients: with every optimizer of the registry."""
        return self.setting.entry is not None

    @functools.cached_property
    def matrices(self) -> list[Parameter]:
        return [p for p in self.batch.parameters if p.kind == "matrix"]

    @functools.cached_property
    def trained(self) -> list[Parameter]:
        """What AdamW (or a full-rank optimizer) trains: everything with a gradient of its own."""
        kinds = ("other",) if self.sketched else _ADAPTERS.get(self.setting.optimizer, ("matrix", "other"))
        return [p for p in self.batch.parameters if p.kind in kinds]

    @functools.cached_property
    def groups(self) -> list[list[Parameter]]:
        """DeepSpeed's param groups of these: ds_mofa gives each large one a group of its own."""
        if not self.sketched:
            return [self.trained]
        from ds_mofa.backends.deepspeed.build import LARGE  # no other run needs DeepSpeed

        small = [p for p in self.trained if p.numel < LARGE]
        return [group for group in [small, *([p] for p in self.trained if p.numel >= LARGE)] if group]

    @functools.cached_property
    def layout(self) -> Layout:
        """Where sketches and working copies lie."""
        return Layout(self.batch.places, self.rule.columns, self.owners)

    @functools.cached_property
    def state_layout(self) -> Layout:
        """Where the fp32 state of the rule does."""
        return Layout(self.batch.places, self.rule.r, self.owners, self.rule.field_shapes)

    @property
    def owners(self) -> int:
        """:attr:`ds_mofa.profiler.setting.RunSetting.owners`."""
        return self.setting.owners

    @functools.cached_property
    def rule(self) -> Rule:
        """Of sketched runs alone."""
        rule = self.setting.rule()
        assert rule is not None, "asked of sketched runs alone"
        return rule


def numbers(parameters: list[Parameter]) -> int:
    """Elements of all."""
    return sum(p.numel for p in parameters)


def numbers_of_a_shard(parameters: list[Parameter], setting: RunSetting) -> int:
    """Elements of all that FSDP2 leaves on the first rank: it cuts rows, and pads the last ranks' to as many."""
    rows = [(-(-p.shape[0] // setting.shards), p.shape[1:]) for p in parameters if p.shape]
    return sum(count * math.prod(rest) for count, rest in rows)
