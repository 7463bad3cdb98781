"""What stops the site from being built: a mistake in the source, with its place."""


class Mistake(ValueError):
    """One line that begins with the place, such as `ddpm/forward.py:33`."""

    def __init__(self, place: str, what: str):
        super().__init__(f"{place}: {what}")
