"""What a user may set, in Python or in the ``"params"`` of a DeepSpeed JSON, checked before anything is built.

checks.py      what one value may be, and the error that says what would be right
common.py      what the engine needs, whatever the rule
adamw.py       how AdamW trains what is no matrix
optimizer.py   both of them: what every optimizer takes, and how it is read from a JSON object
mofasgd.py     MoFaSGD's rule, and all of MoFaSGD's options together
galore.py      likewise GaLore's
"""

from ds_mofa.options.adamw import AdamWOptions, AdamWReduce, AdamWStates
from ds_mofa.options.checks import OptionError, check_integer, check_number, check_pair
from ds_mofa.options.common import CaptureMode, CommonOptions, Rounding, Weights
from ds_mofa.options.galore import GaLoreOptions, GaLoreRuleOptions
from ds_mofa.options.mofasgd import AdjustLr, MoFaSGDRuleOptions, Options, UpdateRule
from ds_mofa.options.optimizer import OptimizerOptions

__all__ = [
    "AdamWOptions",
    "AdamWReduce",
    "AdamWStates",
    "AdjustLr",
    "CaptureMode",
    "CommonOptions",
    "GaLoreOptions",
    "GaLoreRuleOptions",
    "MoFaSGDRuleOptions",
    "OptionError",
    "OptimizerOptions",
    "Options",
    "Rounding",
    "UpdateRule",
    "Weights",
    "check_integer",
    "check_number",
    "check_pair",
]
