"""The one error a user is meant to see, and the one warning.

Whatever is wrong with what the user gave us (a file, a folder, an option) is an `InputError` whose message is a single
line naming what is wrong and where. The doors print that line and exit with code 2; every other exception is our bug.
"""


class InputError(ValueError):
    """Bad input. `str(error)` is one line that names the file or option and the cause."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Notice(UserWarning):
    """Something that a user should know about a run that continues. The doors print its one line, without the place in the code."""
