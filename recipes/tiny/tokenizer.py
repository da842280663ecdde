"""The tokenizer of the built-in pair: a word or a digit a token, bytes for what it has not seen."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# A space belongs to the word or to the first digit of the number behind it; other digits stand
# alone; punctuation takes the line breaks behind it, as in Qwen's tokenizer (".\n\n" is a token).
_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPACE = "Ġ"  # how byte-level vocabularies write a space
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str], words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the pieces of ``texts``, and ``words`` with and without space.

    Nothing is merged: a piece outside the vocabulary falls apart into bytes.
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pieces = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    pieces |= {prefix + word for word in words for prefix in ("", SPACE)}
    pieces |= {prefix + digit for digit in "0123456789" for prefix in ("", SPACE)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [PAD, START, END, *alphabet, *sorted(pieces - set(alphabet))]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, START, END])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def prompt_text(problem: str) -> str:
    """The problem in the chat template, ready for the assistant's turn."""
    return f"{START}user\n{problem}{END}\n{START}assistant\n"
