"""Values of options that are written in one string."""

import shlex

from audiolm_jax.errors import UserError


def split(name: str, text: str) -> list[str]:
    """The parts of a string, as a shell would tell them apart; `name` is the option that holds it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"cannot be split ({error})", f"{name}={text}", "close the quote") from error
