"""The model class of EleutherAI's `lm-eval`, and its command with this model.

    python -m jaxpeft.evaluation.lm_eval --model jaxpeft --model_args base=PATH,adapter=DIR \
        --tasks arc_easy,hellaswag

takes the arguments of the command `lm_eval`. That command itself only knows the models of its own
package, since lm-eval 0.4.13 looks up no entry points; in Python, importing this module registers
the model. Needs the extra `lm-eval`.
"""

# pyright: basic, reportMissingImports=false
# lm-eval may not be installed where types are checked

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxpeft.errors import ConfigError, DataError, show
from jaxpeft.inference.adapted_model import load_adapted
from jaxpeft.inference.generation import complete, ends_of
from jaxpeft.inference.sampling import Sampling
from jaxpeft.inference.scoring import score

_log = logging.getLogger(__name__)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("jaxpeft")
class JaxPeft(TemplateLM):
    """A language model of jaxpeft, with or without an adapter, for `lm-eval`.

    Args:
        base: folder or hub id of the base; None for the one that the adapter records.
        adapter: folder of the adapter, or of its run; None for the base alone.
        dtype: dtype of the base; None for the checkpoint's.
        quant: quantization of the base; None for that of the adapter's run.
        batch_size: number of rows that run together.
        max_length: maximum number of tokens of a row; None for the model's positions.
        max_gen_toks: maximum number of new tokens, if a task does not say.
        seed: seed of sampled texts.
        device: ignored, since JAX chooses the device.
        max_batch_size: ignored.
    """

    def __init__(
        self,
        base: str | None = None,
        adapter: str | None = None,
        dtype: str | None = None,
        quant: str | None = None,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        del device, max_batch_size
        self._loaded = load_adapted(base, adapter, task="causal_lm", dtype=dtype, quant=quant)
        self.tokenizer = self._loaded.tokenizer
        self.batch_size = 16 if batch_size == "auto" else int(batch_size)
        positions = getattr(self._loaded.model.config, "max_position_embeddings", 2048)
        self.max_length = max_length or positions
        self.max_gen_toks = max_gen_toks
        self._seed = seed

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, for the cache of requests."""
        return str(self._loaded.adapter or self._loaded.model.source.name).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a text, by default with the tokenizer's special tokens, unless it
        begins with them.
        """
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode([self.prefix_token_id])
        ):
            special = {"add_special_tokens": False}
        return self.tokenizer.encode(string, **special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a chat, by the template that is saved with the adapter."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations; a row that is too long loses tokens of its context on the left.

        Raises:
            DataError: A continuation has no tokens, or more than the model has positions.
        """
        rows: list[tuple[list[int], list[int]]] = []
        for text, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"a request has a continuation of {len(continuation)} tokens, but 1 to"
                    f" {self.max_length} (max_length) can be scored: {show(text)}"
                )
            kept = max(1, self.max_length + 1 - len(continuation))
            rows.append((context[-kept:], continuation))
        return score(self._loaded.model, self._loaded.params, rows, batch_size=self.batch_size)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each whole text, in windows of the model's length."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(i)
        found = [0.0] * len(requests)
        for i, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            found[i] += log_prob
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that each context is continued with, up to the first stop text."""
        by_options: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_options.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        found = [""] * len(requests)
        for rows in by_options.values():
            contexts = [requests[i].args[0] for i in rows]
            for i, text in zip(
                rows, self._generate(contexts, requests[rows[0]].args[1]), strict=True
            ):
                found[i] = text
        return found

    def _generate(self, contexts: Sequence[str], given: dict[str, Any]) -> list[str]:
        """Continue contexts with the same options of generation.

        Raises:
            ConfigError: An option is not supported.
        """
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        stops = _stops(options.pop("until"))
        if options.pop("max_length", None) is not None:
            _log.warning("generation_kwargs: max_length is ignored; set max_gen_toks instead")
        if options.get("num_beams") == 1:
            del options["num_beams"]
        most = options.pop("max_gen_toks")
        greedy = options.pop("do_sample", None) is False
        unknown = sorted(set(options) - set(_SAMPLING))
        if unknown:
            raise ConfigError(
                f"generation_kwargs: {', '.join(unknown)} is not supported (supported: until,"
                f" max_gen_toks, do_sample, {', '.join(_SAMPLING)})"
            )
        if greedy:  # filters have no effect then
            options = {k: v for k, v in options.items() if k == "repetition_penalty"}
        room = self.max_length - most
        if room < 1:
            raise ConfigError(
                f"max_gen_toks: {most} leaves no room for a context in {self.max_length} positions"
            )
        prompts = [
            self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts
        ]

        def stop(tokens: Sequence[int]) -> bool:
            text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
            return any(each in text for each in stops)

        completions = complete(
            self._loaded.model,
            self._loaded.params,
            prompts,
            max_new_tokens=most,
            sampling=Sampling(**options),
            seed=self._seed,
            eos=ends_of(self._loaded.model, None) | {self.eot_token_id},
            batch_size=self.batch_size,
            stops=stop if stops else None,
        )
        texts = (
            self.tokenizer.decode(list(each.tokens), skip_special_tokens=True)
            for each in completions
        )
        return [_before(text, stops) for text in texts]


def _stops(until: Sequence[Any]) -> list[str]:
    """Return the stop texts of a task, without empty ones, after which `hf` stops at once.

    Raises:
        ConfigError: One is no text.
    """
    if wrong := [one for one in until if not isinstance(one, str | None)]:
        raise ConfigError(f"generation_kwargs: until must be texts, has {show(wrong[0])}")
    return [one for one in until if one]


def _before(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first stop text."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def main(argv: list[str]) -> None:
    """Run the command `lm_eval`, which knows the model `jaxpeft` now."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *argv]
    cli_evaluate()


if __name__ == "__main__":
    main(sys.argv[1:])
