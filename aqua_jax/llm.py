"""LLM: the blocking, offline face. Names and input forms are vLLM's."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from aqua_jax.closing import Closing
from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.outputs import RequestOutput
from aqua_jax.errors import ConfigError, RequestError
from aqua_jax.progress import Progress, counting_bar
from aqua_jax.prompts import Message, Prompt, check_prompt, is_token, render_chat


def engine_config(model: str, **config: Any) -> EngineConfig:
    """An `EngineConfig`, with an unknown field reported like a bad value.

    Raises:
      ConfigError: unknown field, or a value that is not allowed.
    """
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    for name, value in config.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(name, value, f"the fields of EngineConfig{hint}")
    return EngineConfig(model=model, **config)


class LLM(Closing):
    """A model ready to answer lists of prompts.

    Example:
      >>> with LLM("demo", max_model_len=2048) as llm:
      ...     for out in llm.generate(["The sea"], SamplingParams(max_tokens=32)):
      ...         print(out.outputs[0].text)

    Attributes:
      engine: the engine behind it, for streaming and statistics.
    """

    def __init__(self, model: str, **config: Any):
        """Loads `model` and compiles what `warmup` asks for.

        Args:
          model: a Hugging Face directory, a .gguf file, or "demo".
          **config: fields of `EngineConfig`.

        Raises:
          ConfigError: a field is unknown or invalid.
          ModelLoadError: the checkpoint can't be read.
        """
        self.engine = Engine(
            engine_config(model, **config), progress=counting_bar("compiling", "program")
        )
        self._number = 0  # of the next request

    def close(self) -> None:
        """Ends every request and frees the model's memory. May be called twice."""
        self.engine.close()

    def get_tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts.

        Args:
          prompts: one prompt or a list; a prompt is text, token ids, `{"prompt": text}` or
            `{"prompt_token_ids": [...]}`. A flat list of integers is one prompt.
          sampling_params: one for all, or one for each; None: the defaults.
          use_tqdm: show a progress bar on stderr.

        Returns:
          One output for each prompt, in the prompts' order.

        Raises:
          RequestError: a prompt or its parameters are invalid. The field names the prompt's index
            (`prompts[3].prompt`), and nothing has been computed.
        """
        listed = _listed(prompts)
        params = _params_for(sampling_params, len(listed))
        checked: list[Any] = []
        for index, prompt in enumerate(listed):
            try:
                checked.append(check_prompt(prompt))
            except RequestError as error:
                raise _at(error, "prompts", index) from error
        return self._run(checked, params, use_tqdm, "prompts")

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers conversations, rendered with the model's chat template.

        Args:
          messages: one conversation (a list of `{"role", "content"}`) or a list of them.
          sampling_params: one for all, or one for each conversation; None: the defaults.
          use_tqdm: show a progress bar on stderr.

        Returns:
          One output for each conversation, in order.

        Raises:
          RequestError: malformed messages, or a model without a chat template.
        """
        if not isinstance(messages, (list, tuple)) or not messages:
            raise RequestError("messages", messages, "a conversation or a list of conversations")
        single = not isinstance(messages[0], (list, tuple))
        conversations = [messages] if single else list(messages)
        params = _params_for(sampling_params, len(conversations))
        prompts = []
        for index, conversation in enumerate(conversations):
            try:
                text, ids = render_chat(self.engine.tokenizer, conversation)
            except RequestError as error:
                raise error if single else _at(error, "messages", index) from error
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self._run(prompts, params, use_tqdm, "messages")

    def _run(
        self, prompts: list[Any], params: list[SamplingParams], use_tqdm: bool, field: str
    ) -> list[RequestOutput]:
        """Adds everything, then steps until all is done."""
        names: list[str] = []
        try:
            for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                name = f"llm-{self._number}"
                self._number += 1
                try:
                    self.engine.add_request(name, prompt, one)
                except RequestError as error:
                    raise _at(error, field, index) from error
                names.append(name)
            return self._finish(names, use_tqdm)
        except BaseException:
            # Nothing of a failed or interrupted call may stay in the engine.
            for name in names:
                self.engine.abort(name)
            raise

    def _finish(self, names: list[str], use_tqdm: bool) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        wanted = set(names)
        with Progress(len(names), enabled=use_tqdm) as progress:
            while len(done) < len(names):
                for output in self.engine.step():
                    if output.finished and output.request_id in wanted:
                        done[output.request_id] = output
                        progress.advance(1, output.metrics.num_output_tokens)
        return [done[name] for name in names]


def _listed(prompts: Any) -> list[Any]:
    """One prompt or many, as a list of prompts."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise RequestError("prompts", prompts, "a prompt or a list of prompts")
    if prompts and all(is_token(token) for token in prompts):
        return [list(prompts)]
    return list(prompts)


def _params_for(given: Any, count: int) -> list[SamplingParams]:
    if given is None:
        return [SamplingParams()] * count
    if isinstance(given, SamplingParams):
        return [given] * count
    if not isinstance(given, (list, tuple)):
        raise RequestError("sampling_params", given, "SamplingParams or a list of them")
    if len(given) != count:
        raise RequestError(
            "sampling_params", f"{len(given)} of them", f"one, or one for each of {count} prompts"
        )
    for index, one in enumerate(given):
        if not isinstance(one, SamplingParams):
            raise RequestError(f"sampling_params[{index}]", one, "SamplingParams")
    return list(given)


def _at(error: RequestError, field: str, index: int) -> RequestError:
    """The same error, saying which element of the list it is in."""
    inner = "" if error.field == field else f".{error.field}"
    if error.field.startswith("messages["):
        inner = error.field.removeprefix("messages")
    return RequestError(f"{field}[{index}]{inner}", error.value, error.allowed)
