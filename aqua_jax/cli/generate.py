"""`aqua-jax generate`: prompts in, answers out."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from typing import Any

from aqua_jax.cli import flags as common
from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.cli.signals import stop_signals
from aqua_jax.errors import FieldError, RequestError


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    common.define_model_flags(flags)
    with flags.group("Prompts"):
        flags.strings("prompt", "A prompt; may be given several times.")
        flags.string(
            "prompts_file", None, "A prompt a line; with the ending .jsonl each line is a JSON "
            'string or an object with "prompt", "messages" or "prompt_token_ids".', "FILE",
        )
        flags.switch("chat", False, "Put each prompt to the model as a user's chat message.")
        flags.string("system", None, "System message before each prompt; implies --chat.")
    with flags.group("Results"):
        flags.switch("stream", False, "Print text as it is generated.")
        flags.switch("json", False, "Print one JSON object a line instead of text.")
    common.define_sampling_flags(flags)
    common.define_engine_flags(flags)


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt as the user gave it.

    Attributes:
      where: how errors name it.
      prompt: text or token ids, or None for a conversation.
      messages: the conversation, or None.
    """

    where: str
    prompt: str | list[int] | None = None
    messages: list[dict[str, str]] | None = None


def _jsonl_items(path: str) -> list[Item]:
    from aqua_jax.batch.lines import parse_json, read_lines
    from aqua_jax.prompts import check_messages, check_prompt

    items = []
    with open(path, "rb") as file:
        for line in read_lines(file):
            if line.data is not None and not line.data.strip():
                continue
            where = f"{path} line {line.number}"
            try:
                value = parse_json(line)
                if isinstance(value, dict) and "messages" in value:
                    if len(value) > 1:
                        extra = next(key for key in value if key != "messages")
                        raise RequestError(extra, value[extra], "only messages")
                    items.append(Item(where, messages=check_messages(value["messages"])))
                elif isinstance(value, (str, dict)):
                    items.append(Item(where, prompt=check_prompt(value)))
                else:
                    raise RequestError("line", value, "a JSON string or object")
            except RequestError as error:
                raise UsageError(f"{where}: {error}") from None
    return items


def _text_items(path: str) -> list[Item]:
    items = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                text = line.rstrip("\r\n")
                if text.strip():
                    items.append(Item(f"{path} line {number}", prompt=text))
    except UnicodeDecodeError as error:
        raise UsageError(f"flag --prompts_file={path}: allowed: UTF-8 text ({error})") from None
    return items


def read_items(flags: FlagSet) -> list[Item]:
    """All prompts, those of --prompt first.

    Raises:
      UsageError: none, an empty one, or a file that can't be read.
    """
    items = [Item(f"--prompt number {index}", prompt=text)
             for index, text in enumerate(flags.prompt, start=1)]
    for item in items:
        if not item.prompt:
            raise UsageError("flag --prompt=: allowed: at least one character")
    path = flags.prompts_file
    if path is not None:
        try:
            items += _jsonl_items(path) if path.endswith(".jsonl") else _text_items(path)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"flag --prompts_file={path}: {reason}") from None
    if not items:
        raise UsageError("no prompt: give --prompt=TEXT or --prompts_file=FILE")
    if flags.chat or flags.system is not None:
        items = [_as_chat(item, flags.system) for item in items]
    return items


def _as_chat(item: Item, system: str | None) -> Item:
    if item.messages is not None:
        return item
    if not isinstance(item.prompt, str):
        raise UsageError(f"{item.where}: token ids can't be a chat message (--chat)")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": item.prompt})
    return dataclasses.replace(item, prompt=None, messages=messages)


def _prepared(item: Item, tokenizer: Any) -> Any:
    """The prompt as the engine takes it."""
    from aqua_jax.prompts import render_chat

    if item.messages is None:
        return item.prompt
    text, ids = render_chat(tokenizer, item.messages)
    return {"prompt": text, "prompt_token_ids": ids}


def _label(item: Item) -> str:
    text = item.prompt if item.messages is None else item.messages[-1]["content"]
    words = " ".join(text.split()) if isinstance(text, str) else f"{len(text or [])} token ids"
    return words if len(words) <= 60 else words[:57] + "..."


def run(flags: FlagSet) -> int:
    """Answers the prompts.

    Returns:
      0: all answered; 1: the engine ended some of them with an error; 143: told to end.
    """
    config = common.engine_config(flags)
    params = common.sampling_params(flags)
    for name in ("logprobs", "prompt_logprobs"):
        if flags.given(name) and not flags.json:
            raise UsageError(f"flag --{name} means nothing without --json, which shows them")
    items = read_items(flags)

    from aqua_jax.cli.show import JsonSink, TextSink
    from aqua_jax.progress import Progress, counting_bar

    sink: JsonSink | TextSink
    if flags.json:
        sink = JsonSink(sys.stdout, len(items), ordered=not flags.stream)
    else:
        sink = TextSink(sys.stdout, [_label(item) for item in items], params.n, flags.stream)
    # Fail before loading a model if nobody can read the answer.
    os.fstat(sys.stdout.fileno())

    from aqua_jax.engine.engine import Engine

    failed = 0
    with Engine(config, progress=counting_bar("compiling", "program")) as engine:
        names = {}
        for index, item in enumerate(items):
            try:
                engine.add_request(str(index), _prepared(item, engine.tokenizer), params)
            except FieldError as error:
                raise UsageError(f"{item.where}: {error}") from None
            names[str(index)] = index
        live = len(items)
        shown = len(items) > 1 and not flags.stream and sys.stderr.isatty()
        with stop_signals() as stop, Progress(len(items), enabled=shown) as progress:
            counted = [0] * len(items)
            while live:
                if stop.number == signal.SIGINT:
                    raise KeyboardInterrupt
                if stop():
                    return 128 + stop.number
                for output in engine.step():
                    index = names[output.request_id]
                    tokens = output.metrics.num_output_tokens
                    progress.generated(tokens - counted[index])
                    counted[index] = tokens
                    sink.update(index, output)
                    if output.finished:
                        live -= 1
                        progress.advance(1)
                        failed += output.error is not None
                        if output.error is not None:
                            print(f"{items[index].where}: {output.error}", file=sys.stderr)
    sink.close()
    return 1 if failed else 0
