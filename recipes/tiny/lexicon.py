"""Which tokens share a word and a class, and which words keep their codes."""

from collections.abc import Collection
from dataclasses import dataclass

from recipes.tiny.tokenizer import END, PAD, SPACE, START


@dataclass(frozen=True, slots=True)
class Lexicon:
    """For each token its class and word; for each word whether its code stays; by token, unused."""

    words: tuple[str, ...]
    class_of: tuple[int, ...]
    word_of: tuple[int, ...]
    is_fixed: tuple[bool, ...]
    is_unused: tuple[bool, ...]
    num_classes: int

    @property
    def num_words(self) -> int:
        """How many different words the tokens have."""
        return len(self.words)

    def word(self, text: str) -> int:
        """Number of the word written ``text``."""
        return self.words.index(text)


_KINDS = ("name", "thing", "digit", "word", "sign", "special")


def build_lexicon(
    vocabulary: dict[str, int],
    names: Collection[str],
    things: Collection[str],
    unseen: Collection[str],
) -> Lexicon:
    """Sort a vocabulary; ``unseen`` are names and things that no training problem has."""
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    bare = [token.removeprefix(SPACE) or token for token in tokens]
    words = tuple(dict.fromkeys(bare))
    number = {word: index for index, word in enumerate(words)}
    classes = []
    for token, word in zip(tokens, bare, strict=True):
        if token in (PAD, START, END):
            kind = "special"
        elif word in names:
            kind = "name"
        elif word in things:
            kind = "thing"
        elif word.isdecimal():
            kind = "digit"
        else:
            kind = "word" if word.isalpha() else "sign"
        classes.append(2 * _KINDS.index(kind) + (token != word))
    return Lexicon(
        words=words,
        class_of=tuple(classes),
        word_of=tuple(number[word] for word in bare),
        is_fixed=tuple(word in names or word in things for word in words),
        is_unused=tuple(word in unseen for word in bare),
        num_classes=2 * len(_KINDS),
    )
