"""What a prediction refuses."""

from ds_mofa.profiler.setting import SettingError

__all__ = ["PredictionError"]


class PredictionError(SettingError):
    """What was asked for runs, and cannot be predicted; the message says why, and what can."""
