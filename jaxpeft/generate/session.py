"""A loaded model with the options of the command line: `Session`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpeft.command.parser import flag
from jaxpeft.core.paths import Tree
from jaxpeft.data.chat import dialogs
from jaxpeft.errors import ConfigError
from jaxpeft.hub.adapters.adapter_folder import read_adapter, request_of
from jaxpeft.hub.adapters.settings import Settings
from jaxpeft.inference.adapted_model import AdaptedModel, load_adapted, read_tokenizer, task_of
from jaxpeft.inference.generation import Completion, complete, ends_of
from jaxpeft.inference.prompts import Prompt, PromptEncoder, decode_completion
from jaxpeft.inference.sampling import Sampling

if TYPE_CHECKING:
    from jaxpeft.generate.__main__ import GenerateArguments


@dataclass(frozen=True)
class Answer:
    """A generated text, and whether the maximum number of tokens cut it."""

    text: str
    cut: bool


@dataclass(frozen=True)
class Session:
    """A loaded model, and how text is generated with it.

    Attributes:
        loaded: the model.
        args: arguments of the command.
    """

    loaded: AdaptedModel
    args: GenerateArguments

    @cached_property
    def encoder(self) -> PromptEncoder:
        """The encoder of prompts."""
        return _encoder(self.args, self.loaded.tokenizer, self.loaded.settings)

    @cached_property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return sampling_of(self.args)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text: of the model, its tokenizer and the adapter's run."""
        own = (self.loaded.tokenizer.eos_token_id, self.loaded.settings.eos_token_id)
        return ends_of(self.loaded.model, None) | {token for token in own if token is not None}

    def encode(self, prompt: Prompt, where: str = "the prompt") -> list[int]:
        """Return the token ids of a prompt.

        Args:
            prompt: the prompt.
            where: its place, for messages.
        """
        return _encode(self.encoder, prompt, where)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        first: int = 0,
        params: Tree | None = None,
        stream: Callable[[int, Sequence[int]], None] | None = None,
    ) -> list[Completion]:
        """Complete prompts.

        Args:
            prompts: token ids of each.
            first: index of the first prompt in all prompts, which decides its random numbers.
            params: parameters; None for those with the adapter.
            stream: called with the index of a prompt and its next tokens.
        """
        return complete(
            self.loaded.model,
            self.loaded.params if params is None else params,
            prompts,
            max_new_tokens=self.args.max_new_tokens,
            sampling=self.sampling,
            seed=self.args.seed,
            eos=self.ends,
            batch_size=self.args.batch_size,
            first=first,
            stops=self._stops if self.args.stop else None,
            stream=stream,
        )

    def answer(
        self,
        prompt: Prompt,
        write: Callable[[str], object] | None = None,
        params: Tree | None = None,
    ) -> Answer:
        """Complete one prompt.

        Args:
            prompt: the prompt.
            write: called with each new part of the text, as it is generated.
            params: parameters; None for those with the adapter.
        """
        ids = self.encode(prompt)
        tokens: list[int] = []
        shown = ""

        def show(_: int, more: Sequence[int]) -> None:
            nonlocal shown
            tokens.extend(more)
            text = self._before_stop(
                decode_completion(self.loaded.tokenizer, ids, tokens, partial=True), partial=True
            )
            if write is not None and len(text) > len(shown):
                write(text[len(shown) :])
                shown = text

        (completion,) = self.complete([ids], params=params, stream=None if write is None else show)
        text = self.text(ids, completion)
        if write is not None:
            write(text[len(shown) :])
        return Answer(text, completion.ending == "length")

    def text(self, prompt: Sequence[int], completion: Completion) -> str:
        """Return the text of a completion, up to the first stop text."""
        text = decode_completion(self.loaded.tokenizer, prompt, completion.tokens)
        return self._before_stop(text)

    def _stops(self, tokens: Sequence[int]) -> bool:
        text = self.loaded.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return any(stop in text for stop in self.args.stop)

    def _before_stop(self, text: str, *, partial: bool = False) -> str:
        """Return the text before the first stop text; if `partial`, before one that may begin."""
        found = [text.find(stop) for stop in self.args.stop if stop in text]
        if found:
            return text[: min(found)]
        longest = max(map(len, self.args.stop), default=0)
        for size in range(min(longest, len(text)), 0, -1) if partial else ():
            if any(stop.startswith(text[-size:]) for stop in self.args.stop):
                return text[:-size]
        return text


def text_prompt(text: str) -> Prompt:
    """Return a prompt that continues a text."""
    return dialogs.Completion(text, "")


def check_prompts(args: GenerateArguments, prompts: Mapping[str, Prompt]) -> None:
    """Encode prompts before the model is loaded, so that what is wrong with them is told at once.

    Args:
        args: arguments of the command.
        prompts: prompts by their place.

    Raises:
        ConfigError: A chat has no template.
        DataError: The template cannot render a prompt, or a prompt has no tokens.
    """
    encoder = _encoder(args, *read_tokenizer(args.model, args.adapter))
    for where, prompt in prompts.items():
        _encode(encoder, prompt, where)


def _encoder(args: GenerateArguments, tokenizer: Any, settings: Settings) -> PromptEncoder:
    return PromptEncoder(
        tokenizer,
        separator=settings.separator or "",
        add_bos=bool((settings.data or {}).get("add_bos", True)),
        chat_template=args.chat_template,
    )


def _encode(encoder: PromptEncoder, prompt: Prompt, where: str) -> list[int]:
    try:
        return encoder(prompt, where)
    except ConfigError as error:  # of the chat template
        raise ConfigError([_in_flags(problem) for problem in error.problems]) from None


def sampling_of(args: GenerateArguments) -> Sampling:
    """Return how tokens are chosen.

    Raises:
        ConfigError: An option has no effect.
    """
    try:
        return Sampling(
            args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty
        )
    except ConfigError as error:
        raise ConfigError([_in_flags(problem) for problem in error.problems]) from None


def _in_flags(problem: str) -> str:
    """Convert a problem of an option to one of its flag."""
    name, colon, why = problem.partition(":")
    return f"{flag(name.removeprefix('data.'))}{colon}{why}"


def open_session(args: GenerateArguments) -> Session:
    """Load the model of a command line.

    Raises:
        ConfigError: An option is out of range, or the model is not a language model.
    """
    task = find_task(args)
    if task != "causal_lm":
        raise ConfigError(
            f"--adapter: {args.adapter} was trained for {task}, which generates no text; give its"
            " rows with --input to predict their labels"
        )
    return Session(load_requested(args), args)


def find_task(args: GenerateArguments) -> str:
    """Return the task of the model of a command line, before it is loaded."""
    if args.adapter is None:
        return args.task or task_of(str(args.model))
    return request_of(read_adapter(Path(args.adapter)), task=args.task).task


def load_requested(args: GenerateArguments) -> AdaptedModel:
    """Load the model of a command line."""
    return load_adapted(args.model, args.adapter, **args.load_options)
