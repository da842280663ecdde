"""Whether two models can work together: the same text must have the same token ids."""

from typing import Any

from specguard.core.errors import SpecguardError
from specguard.core.model import LanguageModel


def check_pair(draft: LanguageModel[Any], target: LanguageModel[Any]) -> None:
    """Compare the two token mappings; padded embedding rows without a token do not count.

    Raises:
        SpecguardError: a token has another id in the other model, or none; the message names it.
    """
    ours, theirs = draft.tokenizer.vocabulary, target.tokenizer.vocabulary
    if ours == theirs:
        return
    hint = "choose two models of one family, with the same tokenizer"
    for token, token_id in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != token_id:
            raise SpecguardError(
                f"draft {draft.name} and target {target.name} have different token mappings: "
                f"{token!r} is {token_id} in the draft and {theirs.get(token, 'missing')} in the "
                "target",
                hint,
            )
    token = min(theirs.keys() - ours.keys(), key=theirs.__getitem__)
    raise SpecguardError(
        f"draft {draft.name} and target {target.name} have different token mappings: "
        f"{token!r} is {theirs[token]} in the target and missing in the draft",
        hint,
    )
