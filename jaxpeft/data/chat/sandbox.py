"""Process that renders chat templates in Jinja's immutable sandbox, with time and memory limits.

A template comes with a model's tokenizer, from an untrusted author, and is a program: it may loop
forever, ask for Python's internals or exhaust memory. It cannot access attributes that start with
an underscore, and cannot modify its inputs. Whatever cannot be stopped from inside, such as a
single formatting of a billion characters, is stopped by ending the process.

This is custom code because Jinja's sandbox limits neither time nor memory, and no maintained
package adds such limits.

The file is run by path and imports nothing of jaxpeft. `templates.Template` exchanges lines of JSON
with it. The first line is `{"sources", "tokens"}`, answered by `{"error"}`. Each further line is a
list of `{"messages", "tools", "cuts"}`, answered by one line per item: `{"texts"}`, or
`{"error", "fatal"}`, which ends the replies. Each text is sent as the number of characters it
shares with the previous one, the rest, and an error or null: a long chat is rendered at many cuts,
and each rendering is only a little longer than the previous one.
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
REPEAT_SECONDS = 0.25
LONGEST = 10_000_000
MEMORY = 512 << 20
DAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
"""The date that templates see: Llama's default, so that tokens do not depend on the day."""
TOO_LONG = f"the chat template takes more than {SECONDS} s"
TOO_MUCH = "the chat template takes too much memory, time or recursion"
Reply = dict[str, Any]


class Renderer:
    """Compiled templates, by name.

    Args:
        sources: Jinja sources that use `messages`, `add_generation_prompt`, `tools` and the names
            of the special tokens: `default`, and optionally `tool_use` for chats with tools.
        tokens: the tokenizer's special tokens by name, such as `bos_token`.

    Raises:
        TemplateError: a source is not valid Jinja.
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
        """Render the leading messages of each cut, with or without the generation prompt."""
        try:
            with _time_limit():
                return {"texts": list(self._texts(messages, tools, cuts))}
        except TimeoutError:
            return {"error": TOO_LONG, "fatal": True}
        except (SecurityError, OverflowError) as error:  # OverflowError: a range is too long
            return {
                "error": f"the chat template does something forbidden: {error}",
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
        """Return the text of the messages and None, or an empty text and the error."""
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
            # Jinja looks up the template line of a TimeoutError, and fails if it was raised between
            # two lines
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
    """Raise TimeoutError in the block after `SECONDS` of CPU time, and end the process a bit later.

    The error is raised repeatedly, since Jinja's constant folding ignores errors.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS + 2)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, REPEAT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit(kind: int, maximum: int) -> None:
    """Lower a resource limit of the process, on systems that support it."""
    with suppress(ValueError, OSError):
        hard = resource.getrlimit(kind)[1]
        soft = maximum if hard == resource.RLIM_INFINITY else min(maximum, hard)
        resource.setrlimit(kind, (soft, hard))


def _stop(number: int, frame: object) -> None:
    raise TimeoutError


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, without products and powers that could exhaust memory in one step."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or power if its result is small enough."""
        sizes = [
            len(side) * n
            for side, n in ((left, right), (right, left))
            if hasattr(side, "__len__") and _is_integer(n)
        ]
        if max(sizes, default=0) > LONGEST or (
            operator == "**" and _is_integer(right) and abs(right) > 1000
        ):
            raise SecurityError(f"a product of more than {LONGEST:,} items")
        return super().call_binop(context, operator, left, right)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int)


class _Generation(Extension):
    """Ignores the tag `{% generation %}`: the loss mask does not need it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        """Return the body of the tag."""
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
    except (SyntaxError, ValueError, OverflowError) as error:  # in the Python code Jinja generates
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
    """Answer each line of standard input until it ends, such as when the parent process does."""
    signal.signal(signal.SIGPROF, _stop)
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    for reply in _replies(iter(sys.stdin.readline, "")):
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
