"""The engine behind HTTP, in OpenAI's dialect. Needs the extra `serve`."""
