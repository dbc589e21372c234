"""Values of options that are more than a number or a name."""

import argparse
import shlex

from audiolm_jax.errors import UserError


def split(name: str, text: str) -> list[str]:
    """The parts of a string, as a shell would tell them apart; `name` is the option that holds it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"cannot be split ({error})", f"{name}={text}", "close the quote") from error


def seed(text: str) -> int:
    """A seed that every generator of random numbers takes: 0 or more, in 63 bits."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be 0 or more and less than 2^63, here is {value}")
    return value
