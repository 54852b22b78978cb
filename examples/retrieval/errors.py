"""The one exception that stands for a mistake the user can mend."""

from importlib import import_module


class UserError(Exception):
    """Told to the user as one line, without a traceback; the program then exits with code 2.

    Attributes:
        common: Every process raises it alike, so that one of them need say it.
    """

    def __init__(self, message: str, common: bool = True):
        super().__init__(message)
        self.common = common


def require(packages: dict[str, str]) -> None:
    """Refuse if a module does not import; `packages` says which package brings which module.

    Raises:
        UserError: With the command that installs those that are missing.
    """
    missing = []
    for module, package in packages.items():
        try:
            import_module(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise UserError(f"missing packages; install them with pip install {' '.join(missing)}")
