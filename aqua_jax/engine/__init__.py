"""One request's life: admission, steps on the device, tokens, text, end."""
