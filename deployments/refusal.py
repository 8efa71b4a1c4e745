"""What a stage answers to a request that it cannot serve. Torch-free: the ingress tells these errors apart."""


class NeverFits(Exception):
    """The request needs more than its stage may ever have: a smaller one may fit. Nothing was computed.

    message is the instance's alone: what Ray raises at the other end of a handle inherits this class's attributes,
    and asks the original only for what it lacks.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class OutOfShare(Exception):
    """A call took more than its stage's share of the GPU. It failed alone: the process and its neighbours live."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ShardGroupLost(Exception):
    """A rank died or got stuck. The request may be repeated: another replica will serve it."""
