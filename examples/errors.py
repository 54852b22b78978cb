"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """Told to the user as one line, without a traceback; the program then exits with code 2."""
