"""Prompts: rows to the tokens that a text is generated from, and new tokens to text.

The tokens are those that training sees before an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxpeft.data.chat.dialogs import Completion, Dialog, read_column, read_prompt
from jaxpeft.data.chat.messages import read_text
from jaxpeft.data.chat.templates import RenderError, template_source
from jaxpeft.data.problems import Problems, RowError, excerpt
from jaxpeft.data.rows.columns import Columns, find_prompt_columns
from jaxpeft.data.rows.read import Rows
from jaxpeft.data.tokens.tokenize import TokenizeOptions, encode_prompt
from jaxpeft.errors import DataError

Prompt = Dialog | Completion
_REPLACEMENT = "\ufffd"
"""What a decoder writes for an incomplete character."""


def read_prompts(
    rows: Rows, columns: Columns, system: str | None = None, separator: str = ""
) -> list[Prompt]:
    """Return the prompt of each row; rows may differ in format.

    Args:
        rows: rows with messages, an instruction or a prompt.
        columns: columns that the user named.
        system: system text of chats without one.
        separator: text between the prompt and the completion of a text; rows with texts can be
            used if it is not empty.

    Raises:
        DataError: rows cannot be used; it lists the first twenty.
    """
    problems, found = Problems(), list[Prompt]()
    for i, record in enumerate(rows.records):
        present = [name for name, value in record.items() if value is not None]
        try:
            named = find_prompt_columns(present, columns, rows.where(i), texts=bool(separator))
            if named.text is None:
                found.append(with_system(read_prompt(record, named), system))
            else:
                text = read_column(read_text, record, named.text)
                found.append(Completion(text.partition(separator)[0], ""))
        except RowError as error:
            text = excerpt(str(record))
            problems.add(rows.where(i), error.fault, text, error.fix)
    problems.raise_if_any()
    return found


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """Return a prompt with a system turn in front, if it is a chat without one."""
    if system is None or isinstance(prompt, Completion) or prompt.messages[0]["role"] == "system":
        return prompt
    turn = {"role": "system", "content": system}
    return Dialog((turn, *prompt.messages), prompt.tools)


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes prompts.

    Attributes:
        tokenizer: a fast tokenizer of `transformers`.
        separator: text after the prompt of a completion.
        add_bos: whether to keep the BOS that the tokenizer adds.
        chat_template: name of a template of the tokenizer or of a built-in one, or path of a Jinja
            file; None for the tokenizer's default.
    """

    tokenizer: Any
    separator: str = ""
    add_bos: bool = True
    chat_template: str | None = None

    def __call__(self, prompt: Prompt, where: str = "the prompt") -> list[int]:
        """Return the token ids of a prompt.

        Args:
            prompt: the prompt.
            where: its place, for messages.

        Raises:
            ConfigError: A chat has no template.
            DataError: The template cannot render the turns, or the prompt has no tokens.
        """
        options = TokenizeOptions(0, self.add_bos, False, self._template(prompt), self.separator)
        try:
            ids = encode_prompt(prompt, self.tokenizer, options)
        except RenderError as error:
            raise DataError(f"{where}: {error}; {error.fix}") from error
        if not ids:
            raise DataError(f"{where}: has no tokens; write a text to continue")
        return ids

    def _template(self, prompt: Prompt) -> Any:
        if isinstance(prompt, Completion):
            return None
        asks = "instruction" in prompt.messages[-1]
        kind = "instruction" if asks else "messages"
        source = template_source(self.tokenizer.chat_template, self.chat_template, kind)
        return {"default": source} if isinstance(source, str) else source


def decode_completion(
    tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], *, partial: bool = False
) -> str:
    """Return the text of new tokens, without special tokens.

    Args:
        tokenizer: the tokenizer.
        prompt: the tokens before them, which decide whether the text starts with a space.
        tokens: the new tokens.
        partial: whether more tokens follow; an incomplete last character is then left out.
    """
    # the last tokens of a prompt suffice, and decoding costs time
    before = list(prompt[-_CONTEXT:])
    start = tokenizer.decode(before, skip_special_tokens=True)
    text = tokenizer.decode([*before, *tokens], skip_special_tokens=True)
    if not text.startswith(start):
        start, text = "", tokenizer.decode(list(tokens), skip_special_tokens=True)
    text = text[len(start) :]
    return text.rstrip(_REPLACEMENT) if partial else text


_CONTEXT = 8
