"""What every optimizer of this package takes, and how it is read from a JSON object."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from ds_mofa.options.adamw import AdamWOptions
from ds_mofa.options.checks import OptionError
from ds_mofa.options.common import CommonOptions

__all__ = ["OptimizerOptions"]

Some = TypeVar("Some", bound="OptimizerOptions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions(AdamWOptions, CommonOptions):
    """The options that do not depend on the rule; those of a rule are the fields of a subclass.

    Attributes:
        title: the optimizer's name, as users write it, for messages, checkpoints and the registry.
        aliases: other names of options, which a user may write as well.

    Raises:
        OptionError: a value out of its range or of the wrong type, or an unknown name.
    """

    title: ClassVar[str]
    aliases: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_config(
        cls: type[Some], params: Mapping[str, Any], passed_on: Sequence[str] = ()
    ) -> tuple[Some, dict[str, Any]]:
        """Options from a JSON object, and those of its entries that are named in ``passed_on``, untouched.

        Raises:
            OptionError: an unknown name, a value that cannot be right, or no object at all.
        """
        if not isinstance(params, Mapping):
            raise OptionError(f'params={params!r} must be an object of options, such as {{"lr": 1e-4, "rank": 8}}')
        rest = {key: params[key] for key in passed_on if key in params}
        own: dict[str, Any] = {}
        known = cls.names()
        for key, value in params.items():
            if key in rest:
                continue
            name = cls.aliases.get(key, key)
            if name not in known:
                raise OptionError(_unknown(key, [*known, *cls.aliases, *passed_on], cls.title))
            if name in own:
                raise OptionError(f"{key!r} and {name!r} are the same option of {cls.title}: give one of them")
            if value == "auto":
                raise OptionError(
                    f'{key}="auto" was not filled in: only Hugging Face\'s Trainer fills in "auto", and only for lr, '
                    "betas, eps and weight_decay. Write a value"
                )
            own[name] = value
        return cls(**cls.completed(own)), rest

    @classmethod
    def completed(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given`` with what is in force where a user says nothing, if that depends on what else is given."""
        return dict(given)

    @classmethod
    def names(cls) -> list[str]:
        """Of all options, without the aliases."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def keywords(cls) -> list[inspect.Parameter]:
        """All options as keyword-only parameters with their types and defaults, for a signature."""
        kind = inspect.Parameter.KEYWORD_ONLY
        defaults = {field.name: field.default for field in dataclasses.fields(cls)} | cls.completed({})
        return [
            inspect.Parameter(field.name, kind, default=defaults[field.name], annotation=field.type)
            for field in dataclasses.fields(cls)
        ]

    @property
    def adamw_lr_ratio(self) -> float:
        """AdamW's learning rate over the matrices': a schedule moves both, this stays."""
        return 1.0 if self.adamw_lr is None else self.adamw_lr / self.lr

    def check_rate(self, lr: float, name: str) -> None:
        """Raise an OptionError where a rate can only be meant in other units than ``lr`` has here.

        Args:
            name: what it is called, and whose it is, for the message.
        """


def _unknown(key: str, known: list[str], title: str) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return (
        f"unknown option {key!r} of {title}"
        + (f"; did you mean {close[0]!r}?" if close else "")
        + f" The options are {', '.join(sorted(known))}"
    )
