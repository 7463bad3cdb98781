"""The error for a mistake in the source that stops the build of the site."""


class Mistake(ValueError):
    """A mistake in the source; the message begins with its place, such as `ddpm/forward.py:33`."""

    def __init__(self, place: str, what: str):
        super().__init__(f"{place}: {what}")
