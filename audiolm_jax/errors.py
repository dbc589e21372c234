"""The exceptions that tell the user something, in one line, rather than report a bug."""


class UserError(Exception):
    """Bad argument, file, config field or checkpoint; the command line exits with status 2.

    Attributes:
      status: the exit status.

    Args:
      what: what is wrong, e.g. "unknown config field".
      where: the file, field or argument in question.
      what_to_do: how to put it right.
    """

    status = 2

    def __init__(self, what: str, where: object, what_to_do: str):
        self.what, self.where, self.what_to_do = what, str(where), what_to_do
        super().__init__(" ".join(f"{what}: {where}; {what_to_do}".split()))


class Diverged(UserError):
    """Training that cannot go on, though nothing was wrong with the command; exit status 1."""

    status = 1
