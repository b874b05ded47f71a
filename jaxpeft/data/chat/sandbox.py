"""The process in which chat templates are rendered: in jinja's immutable sandbox, with a limit of
time and of memory.

A template comes with a model's tokenizer, from whoever made it, and is a program: it may loop for
ever, ask for Python's internals or fill the memory. It gets no access to attributes that begin with
an underscore and cannot change what it is given. What can't be stopped from inside, such as one
formatting of a thousand million characters, ends with the process.

Our own, since jinja's sandbox bounds neither time nor memory, and no maintained package runs it
within such limits.

Run by path, with nothing of jaxpeft: `templates.Template` talks to it by lines of JSON. The first
is `{"sources", "tokens"}`, answered by `{"error"}`; each further one is a list of `{"messages",
"tools", "cuts"}`, answered by a line for each: `{"texts"}`, or `{"error", "fatal"}`, which is the
last. Each of the texts is how many characters it shares with the one before it, the rest, and what
failed: a long chat is written to many cuts, each a little further than the last.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls  # noqa: N812
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2
AGAIN = 0.25
LONGEST = 10_000_000
MEMORY = 512 << 20
DAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
"""What a template that asks for the date is told: Llama's own default, since tokens must not depend
on the day.
"""
TOO_LONG = f"the chat template takes more than {SECONDS} s"
TOO_MUCH = "the chat template takes too much memory, time or recursion"
Reply = dict[str, Any]


class Renderer:
    """Compiled templates, by name.

    Args:
        sources: jinja, with `messages`, `add_generation_prompt`, `tools` and the names of the
            special tokens: a `default`, and perhaps another for chats with tools.
        tokens: the tokenizer's special tokens by name, such as `bos_token`.

    Raises:
        TemplateError: it is no jinja.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        self._tokens = {"bos_token": "", "eos_token": "", **tokens}
        environment = _environment()
        self._templates = {
            name: environment.from_string(source) for name, source in sources.items()
        }

    def reply(
        self, messages: Sequence[Any], tools: Sequence[Any], cuts: Sequence[tuple[int, bool]]
    ) -> Reply:
        """Write out the first so many messages of each cut, with or without what an answer begins
        with.
        """
        try:
            with _time_limit():
                return {"texts": list(self._texts(messages, tools, cuts))}
        except TimeoutError:
            return {"error": TOO_LONG, "fatal": True}
        except (SecurityError, OverflowError) as error:  # of a range that is too long
            return {
                "error": f"the chat template does what a template may not: {error}",
                "fatal": True,
            }
        except (MemoryError, RecursionError):
            return {"error": TOO_MUCH, "fatal": True}

    def _texts(
        self, messages: Sequence[Any], tools: Sequence[Any], cuts: Sequence[tuple[int, bool]]
    ) -> Iterator[tuple[int, str, str | None]]:
        last, size = "", 0
        for n, generate in cuts:
            text, error = self._render_cut(messages[:n], tools, generate)
            shared = len(last) if text.startswith(last) else 0
            last, rest = text, text[shared:]
            size += len(rest)
            if size > LONGEST:
                raise SecurityError(f"it writes more than {LONGEST:,} characters")
            yield shared, rest, error

    def _render_cut(
        self, messages: Sequence[Any], tools: Sequence[Any], generate: bool
    ) -> tuple[str, str | None]:
        """Return the text of some messages and None, or no text and what fails."""
        try:
            return self._text(messages, tools, generate), None
        except (SecurityError, OverflowError, TimeoutError):
            raise
        except (
            TemplateError,
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            ArithmeticError,
        ) as error:
            # jinja looks for the line of a TimeoutError in the template, and breaks where it was
            # raised between two lines
            if isinstance(error.__context__, TimeoutError):
                raise TimeoutError from None
            return "", f"the chat template fails: {error}"

    def _text(self, messages: Sequence[Any], tools: Sequence[Any], generate: bool) -> str:
        template = (
            self._templates.get("tool_use" if tools else "default") or self._templates["default"]
        )
        parts: list[str] = []
        size = 0
        for part in template.generate(
            messages=messages,
            add_generation_prompt=generate,
            tools=list(tools) or None,
            **self._tokens,
        ):
            parts.append(part)
            size += len(part)
            if size > LONGEST:
                raise SecurityError(f"it writes more than {LONGEST:,} characters")
        return "".join(parts)


@contextmanager
def _time_limit() -> Generator[None]:
    """Raise TimeoutError in the block after `SECONDS` of the processor's time, and end the process
    a little later.

    It is raised again and again, since jinja goes on after any error in what it computes ahead.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS + 2)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit(what: int, most: int) -> None:
    """Lower a limit of the process, on systems that have it."""
    with suppress(ValueError, OSError):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(
            what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
        )


def _stop(number: int, frame: object) -> None:
    raise TimeoutError


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, without products that could fill the memory in one step."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply numbers and short sequences."""
        sizes = [
            len(side) * n
            for side, n in ((left, right), (right, left))
            if hasattr(side, "__len__") and _require_whole(n)
        ]
        if max(sizes, default=0) > LONGEST or (
            operator == "**" and _require_whole(right) and abs(right) > 1000
        ):
            raise SecurityError(f"a product of more than {LONGEST:,} items")
        return super().call_binop(context, operator, left, right)


def _require_whole(value: Any) -> bool:
    return isinstance(value, int)


class _Generation(Extension):
    """Lets `{% generation %}` pass: the turns that are learned are found without it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        """Return the body as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Any] = {"raise_exception": _refuse, "strftime_now": DAY.strftime}
    environment.globals.update(functions)
    return environment


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _replies(lines: Iterator[str]) -> Iterator[Reply]:
    first = next(lines, None)
    if first is None:
        return
    try:
        with _time_limit():
            renderer = Renderer(**json.loads(first))
    except TemplateError as error:
        yield {"error": f"line {getattr(error, 'lineno', '?')}: {error}"}
        return
    except (TimeoutError, MemoryError, RecursionError):
        yield {"error": TOO_MUCH}
        return
    except (
        SyntaxError,
        ValueError,
        OverflowError,
    ) as error:  # of the Python that jinja makes of it
        yield {"error": str(error)}
        return
    yield {"error": None}
    for line in lines:
        for request in json.loads(line):
            reply = renderer.reply(**request)
            yield reply
            if reply.get("fatal"):
                break


def main() -> None:
    """Answer the lines of standard input; ends where it ends, so also with whoever started it."""
    signal.signal(signal.SIGPROF, _stop)
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    for reply in _replies(iter(sys.stdin.readline, "")):
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
