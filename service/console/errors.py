"""What ends a visit to the console before a page is made. None of it reaches the API."""


class ConsoleError(Exception):
    """Root of what the console refuses."""


class SignInNeeded(ConsoleError):
    """Nobody has signed in, or the sign-in does not hold any more."""


class FormRefused(ConsoleError):
    """A form that this console did not hand out to this visitor, or that is none.

    Attributes:
        reason: for the person who sent it.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the form was refused: {reason}")
