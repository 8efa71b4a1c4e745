"""A replica that only imports: in a module of its own, for its process imports that module, too."""

import importlib


class Importing:
    """Imports these and does nothing; an attribute behind a colon, for diffusers imports those when asked."""

    def __init__(self, names: tuple[str, ...]) -> None:
        for name in names:
            module, _, attribute = name.partition(":")
            found = importlib.import_module(module)
            if attribute:
                getattr(found, attribute)
