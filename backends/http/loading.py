"""Finding out what a server is: its kind, its model, its context window and its tokenizer."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from specguard.backends.checkpoint import open_checkpoint
from specguard.backends.http.client import Client
from specguard.backends.http.dialects import DIALECTS, Dialect
from specguard.backends.http.engine import HttpEngine, Replica
from specguard.backends.tokenizer import FolderTokenizer
from specguard.core.engine import Tokenizer
from specguard.core.errors import SpecguardError, UsageError

ARGUMENTS = ("model", "tokenizer")
_PROBE = "Mia has 24 / 2 = 12 shells.\n\nSo \\boxed{12}. Čeština, 漢字"


def load_model(
    source: str, arguments: Mapping[str, str], trust_remote_code: bool = False
) -> HttpEngine:
    """An engine over the servers of ``source``: a URL, or several with commas between.

    ``arguments`` are ``model``, what the servers call it, if they have several, and ``tokenizer``,
    a folder or hub id with the tokenizer, where the server's own is not on this disk.

    Raises:
        UsageError: an argument that there is not, a URL with a password in it.
        SpecguardError: no server, one of another kind, without this model or with another
            tokenizer.
    """
    unknown = arguments.keys() - set(ARGUMENTS)
    if unknown:
        raise UsageError(
            f"an engine behind a server has no argument {min(unknown)!r}",
            f"it has {' and '.join(ARGUMENTS)}; others are the server's own",
        )
    found = [_Server(Client(url), arguments.get("model")) for url in source.split(",")]
    first = found[0]
    for other in found[1:]:
        if other.dialect is not first.dialect or other.context_limit != first.context_limit:
            raise SpecguardError(
                f"{first.client.url} and {other.client.url} are servers of different kinds or "
                "context windows",
                "replicas have to be alike",
            )
    folder = _tokenizer_folder(first, arguments.get("tokenizer"))
    tokenizer = FolderTokenizer(folder, trust_remote_code)
    for server in found:
        server.check_tokenizer(tokenizer)
    return HttpEngine(
        source,
        first.dialect,
        [Replica(server.client, server.model) for server in found],
        tokenizer,
        first.context_limit,
    )


class _Server:
    """What one server says of itself."""

    def __init__(self, client: Client, wanted: str | None) -> None:
        self.client = client
        listed = client.ask_now("/v1/models")
        cards = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise SpecguardError(
                f"{client.url} names no models", "is this the address of an inference server?"
            )
        names = [str(card.get("id")) for card in cards]
        if wanted is None and len(cards) != 1:
            raise UsageError(
                f"{client.url} has {len(cards)} models: {', '.join(names) or 'none'}",
                "name one: --target-model NAME, --draft-model NAME",
            )
        if wanted is not None and wanted not in names:
            raise SpecguardError(
                f"{client.url} has no model {wanted!r}", f"it has {', '.join(names) or 'none'}"
            )
        self.card: dict[str, Any] = cards[0 if wanted is None else names.index(wanted)]
        self.model = str(self.card["id"])
        kind = str(self.card.get("owned_by"))
        if kind not in DIALECTS:
            raise SpecguardError(
                f"{client.url} is a server of a kind that cannot be used ({kind}): token ids and "
                "their log-probabilities are needed, which OpenAI's protocol does not hand out",
                f"servers that do: {', '.join(DIALECTS)}",
            )
        self.dialect: Dialect = DIALECTS[kind]

    @cached_property
    def context_limit(self) -> int:
        """Tokens that a text may have; scoring goes on by a token with what it scores."""
        length = self.card.get("max_model_len")
        if self.dialect.name == "llamacpp":
            props = self.client.ask_now("/props")
            length = props.get("default_generation_settings", {}).get("n_ctx")
        if not isinstance(length, int):
            raise SpecguardError(f"{self.client.url} does not say how long a text may be")
        return length - 1

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Whether the server reads ids as the same text.

        Raises:
            SpecguardError: it does not.
        """
        token_ids = tokenizer.encode(_PROBE)
        body: dict[str, Any] = {"model": self.model, "tokens": token_ids}
        answer = self.client.ask_now("/detokenize", body)
        said = answer if isinstance(answer, dict) else {}
        text = next((said[name] for name in ("prompt", "content", "text") if name in said), None)
        if text != tokenizer.decode(token_ids):
            raise SpecguardError(
                f"{self.client.url} has another tokenizer than the one that was found for it",
                "name that of its model: --tokenizer FOLDER",
            )


def _tokenizer_folder(server: _Server, given: str | None) -> Path:
    source = given or str(server.card.get("root") or server.model)
    folder = Path(source).expanduser()
    if (folder / "tokenizer.json").is_file():
        return folder
    try:
        return open_checkpoint(source).folder
    except SpecguardError as error:
        raise SpecguardError(
            f"the tokenizer of {server.client.url} is not on this disk: {source}",
            "name a folder with it: --tokenizer FOLDER",
        ) from error
