"""The errors and warnings of this package, sorted by what the user can do about them.

Everything raised on purpose is a `DA3Error`, so that one `except` catches the package. A message
says what was given, where, what is allowed and what to do.
"""


class DA3Error(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(DA3Error, ValueError):
    """An argument or a setting is out of range: correct the value named in the message."""


class ConversionError(DA3Error):
    """The network cannot be converted: change the network, or leave the named part out."""


class DomainError(DA3Error):
    """A domain is unknown, exists already or is ill-named: choose one that the message lists."""


class InputError(DA3Error, ValueError):
    """A batch does not fit the network: correct its shape or type as the message says."""


class CheckpointError(DA3Error):
    """A domain file cannot be read or written: use another file, or make it anew."""


class PredictionWarning(UserWarning):
    """Training takes other memory than was predicted: do not rely on the prediction here."""


class ConversionWarning(UserWarning):
    """A part of the network stays Python, since its converted form computed something else."""


class NoEffectWarning(UserWarning):
    """What was asked for has little effect, such as less than half the memory saved."""
