"""Preference data: pairs of a better and a worse answer (DPO), or answers with a mark (KTO).

This command learns answers, one by one. Of pairs it can learn the better ones, if it is told to: by leaving out the worse.
"""

from launch.errors import UserError
from launch.json_files import shown

__all__ = ["chosen_alone", "refuse_preferences"]


def refuse_preferences(record: dict, where: str) -> None:
    """Raises:
    UserError: a record is meant for a loss that compares answers.
    """
    if {"chosen", "rejected"} <= record.keys():
        found, name = "'chosen' and 'rejected'", "--ignore_keys rejected learns the chosen answers alone"
        script = "dpo"
    elif isinstance(record.get("label"), bool | int) and {"prompt", "completion"} <= record.keys():
        found, name = "a 'completion' with a 'label'", "keep the records with true, without their label, to learn these"
        script = "kto"
    else:
        return
    raise UserError(
        f"{where}: preference data ({found}), and this command learns answers one by one. TRL's {script} script compares "
        f"them, and trains with MoFaSGD as it is (docs/tools.md#preference-data); here, {name}."
    )


def chosen_alone(record: dict, where: str) -> dict:
    """A record with "chosen" and no "rejected" as one of its answer: a prompt and a completion, or a chat.

    Raises:
        UserError: the answer is neither a string nor messages, or its prompt is of another kind.
    """
    chosen = record["chosen"]
    rest = {key: value for key, value in record.items() if key != "chosen"}
    if isinstance(chosen, str):
        return {**rest, "output" if "instruction" in rest else "completion": chosen}
    key = "conversations" if "conversations" in rest else "messages"
    before = rest.pop(key if key in rest else "prompt", [])
    answer = [chosen] if isinstance(chosen, dict) else chosen
    if not isinstance(answer, list) or not isinstance(before, list):
        raise UserError(
            f"{where}: 'chosen' is {shown(chosen)}; it must be a string after a 'prompt' that is one, or messages."
        )
    return {**rest, key: [*before, *answer]}
