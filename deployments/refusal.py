"""What a stage answers to a request that its memory is too small for. Torch-free: the ingress tells them apart."""


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
