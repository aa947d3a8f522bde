"""Every error ds_pso raises on purpose: one line that names the cause and the remedy."""


class SwarmError(RuntimeError):
    """Base class of all errors that ds_pso raises on purpose.

    Attributes:
        agreed: true when every rank raises the same error, so that one may speak for all.
    """

    agreed = False  # only what is decided from values that all ranks share may say otherwise

    def __init__(self, message: str, *, agreed: bool | None = None) -> None:
        super().__init__(" ".join(message.split()))
        if agreed is not None:
            self.agreed = agreed


class ConfigError(SwarmError, ValueError):
    """A wrong key or value in the JSON config, on the command line or in the launcher's environment."""

    agreed = True


class UnsupportedError(SwarmError):
    """A DeepSpeed feature whose shards the swarm cannot read or publish."""


class PeerError(SwarmError):
    """A rank did not arrive in time, or was lost in the middle of an exchange."""


class CheckpointError(SwarmError):
    """A checkpoint that is missing, damaged, or belongs to another model or another swarm."""
