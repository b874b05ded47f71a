"""Python code that uses a loaded adapter, for model cards and the end of a run.

The lines continue code that defines `settings`, `model`, `params` and `tokenizer`.
"""

from __future__ import annotations


def generation_lines(ids: str, most: int = 32) -> tuple[str, ...]:
    """Return the lines that generate a text.

    Args:
        ids: expression of the prompt's token ids.
        most: maximum number of new tokens.
    """
    return (
        f"ids = {ids}",
        "ends = {settings.eos_token_id, tokenizer.eos_token_id} - {None}",
        f"(answer,) = jaxpeft.generate(model, params, [ids], max_new_tokens={most}, eos=ends)",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    )


def apply_lines(text: str, inputs: str = "", shown: str = "outputs") -> tuple[str, ...]:
    """Return the lines that run the model on a text, and print what it computes.

    Args:
        text: expression of the text, or of both texts.
        inputs: further inputs of the model, such as `, token_type_ids=...`.
        shown: expression of what is printed, such as `settings.predict(outputs)`.
    """
    return (
        f"inputs = tokenizer({text}, return_tensors='np')",
        (
            "outputs = jaxpeft.apply(model, params, inputs['input_ids'],"
            f" inputs['attention_mask']{inputs})"
        ),
        f"print({shown})",
    )
