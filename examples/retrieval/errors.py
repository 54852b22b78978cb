"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """Told to the user as one line, without a traceback; the program then exits with code 2.

    Attributes:
        common: Every process raises it alike, so that one of them need say it.
    """

    def __init__(self, message: str, common: bool = True):
        super().__init__(message)
        self.common = common
