"""A talk with a network that was trained to answer: what was said, and the tokens it continues.

gpt.py uses it. A template writes all messages as one text, in which marks such as <|im_end|> tell
who says what. Each mark is one token. Whoever types a mark must not get that token, or they could
speak in the name of the system. So what is typed is cut within each mark that it holds, and the
parts are encoded apart. All else is encoded as one text: the first token of a message may depend on
what stands before it. The template sees the messages themselves, as it may trim or test them.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Self, cast

from tokenizers import Tokenizer
from torch import nn

from decoding.cache import Cache
from decoding.sampling import LanguageModel, Sampling, next_tokens
from decoding.templates import render

CUT = "\ufdd0"  # no text needs it, as Unicode promises; it says where to cut
NO_TOKEN = -1
Message = dict[str, str]  # its role (system, user or assistant) and its content


class Conversation:
    """What was said so far, as the template and the tokenizer of a model write it.

    `names` are what the template calls marks, such as bos_token, with the marks. Raises OSError if
    the template can't even write a greeting.
    """

    def __init__(
        self, template: str, tokenizer: Tokenizer, names: Mapping[str, str], system: str = ""
    ) -> None:
        self.template = template
        self.names = names
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.encode_special_tokens = False  # marks in a text become their tokens
        added = tokenizer.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        others = [token.content for token in added if token.content in template]
        typed = mark_beginnings([*special, *others])
        # A network may write the others, such as <think>.
        self.beginnings = {"system": typed, "user": typed, "assistant": mark_beginnings(special)}
        self.messages: list[Message] = []
        if system:
            self.messages.append({"role": "system", "content": system})
        self.encode([*self.messages, {"role": "user", "content": "Hello"}])

    def ask(self, text: str, most: int) -> list[int]:
        """Add what a person says; return the prompt for the answer, of `most` tokens at most.

        Until it fits, the oldest turns are forgotten, but not what the system says. Raises OSError,
        and changes nothing, if the text doesn't fit even alone, or the template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.encode(messages)
        while len(ids) > most:
            messages = without_oldest_turn(messages)
            if not messages:
                raise OSError(f"that makes a prompt of {len(ids):,} tokens; at most {most:,} fit")
            ids = self.encode(messages)
        self.messages = messages
        return ids

    def answer(self, text: str) -> None:
        """Add what the network says; if it has said nothing, forget the question."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of messages, and of what the template writes before an answer.

        Raises OSError if the template refuses them.
        """
        values = {
            **self.names,
            "messages": [self.cut_marks(message) for message in messages],
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        parts = render(self.template, values).split(CUT)
        encodings = [self.tokenizer.encode(part, add_special_tokens=False) for part in parts]
        ids = [token for encoding in encodings for token in encoding.ids]
        if not ids:
            raise OSError("the chat template writes nothing")
        return ids

    def cut_marks(self, message: Message) -> Message:
        """Return a message with a cut after the first character of each mark in its content."""
        beginnings = self.beginnings[message["role"]]
        return message | {"content": beginnings.sub(rf"\g<0>{CUT}", message["content"])}


def mark_beginnings(marks: Collection[str]) -> re.Pattern[str]:
    """Return a pattern of the first character of each mark, also where marks overlap.

    A mark of one character can't be cut, and stays a mark. So does a mark that the template
    completes; no published template does so.
    """
    long = [re.escape(mark) for mark in marks if len(mark) > 1]
    if not long:
        return re.compile("(?!)")  # matches nothing
    return re.compile(f"(?={'|'.join(long)}).", re.DOTALL)


def without_oldest_turn(messages: Sequence[Message]) -> list[Message]:
    """Return what the system says, and all from the second question on; nothing without one.

    A turn is a question with its answer.
    """
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(questions) < 2:
        return []
    return [*messages[: questions[0]], *messages[questions[1] :]]


class Writer:
    """Continues one prompt after another; what two share at the start is computed once."""

    def __init__(
        self, model: LanguageModel, sampling: Sampling, context: int, ends: Collection[int]
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.context = context  # tokens, at most
        self.ends = ends  # tokens, each of which ends a text
        self.tokens: list[int] = []  # the cache holds the rows of the first of them
        self.cache = Cache(cast(nn.Module, model))

    def __enter__(self) -> Self:
        """Begin to keep the rows of tokens."""
        self.cache.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the network as it was."""
        self.cache.__exit__()

    def write(self, prompt: Sequence[int], seed: int) -> Iterator[int]:
        """Yield the tokens that continue a prompt, up to an end or to the end of the context."""
        shared = count_shared(self.tokens, prompt)
        self.cache.keep(min(shared, len(prompt) - 1))  # the last token gives the first logits
        self.tokens = list(prompt)
        columns = next_tokens(
            self.model, [prompt], self.sampling, [seed], self.context, NO_TOKEN, cache=self.cache
        )
        for (token,) in columns:
            if token is None or token in self.ends:
                return
            self.tokens.append(token)
            yield token


def count_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens at the start of two texts are the same."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
