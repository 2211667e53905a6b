"""Rows of a dataset as the records that they were made from."""


def without_filled_in(value: object, feature: object) -> object:
    """A value of a dataset without the nulls that its schema has filled in.

    Arrow keeps all objects of a column in one schema: each has the keys of all others, with null where it had none. A
    tool call would be learned with the arguments of every other tool. A null that was written is dropped as well, since
    the two cannot be told apart; columns of JSON text (``datasets.Json``) keep what was written.

    Args:
        value: a row, or a part of one.
        feature: its type: a dict for an object, a list or ``datasets.List`` for a list, or another.
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: without_filled_in(entry, feature.get(key)) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [without_filled_in(entry, inner) for entry in value]
    return value
