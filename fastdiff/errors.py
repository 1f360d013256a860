"""The one error that a user causes and can repair.

Raised anywhere in fastdiff, shown by the command line as a single line with exit code 2; a traceback means a defect of ours.
"""


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what came, why it cannot work and what to do instead.

    Args:
        command: the same line in words of the command line, where the way out is another there.
    """

    def __init__(self, message: str, *, command: str = "") -> None:
        super().__init__(message)
        self.command = command or message
