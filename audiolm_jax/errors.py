"""The one exception that stands for a mistake of the user's, not of ours."""


class UserError(Exception):
    """Bad argument, file, config field or checkpoint; the command line exits with status 2.

    Args:
      what: what is wrong, e.g. "unknown config field".
      where: the file, field or argument in question.
      what_to_do: how to put it right.
    """

    def __init__(self, what: str, where: object, what_to_do: str):
        self.what, self.where, self.what_to_do = what, str(where), what_to_do
        super().__init__(" ".join(f"{what}: {where}; {what_to_do}".split()))
