"""Errors meant for the person who started the run."""


class UserError(Exception):
    """Something the user can put right. The CLI prints its message as one line and exits with code 2."""


class RunInterrupted(Exception):
    """The user asked the run to stop; a checkpoint has been committed."""


def printable(text: str) -> str:
    """Text on one line with control characters as escapes: what others wrote must not steer somebody's terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
