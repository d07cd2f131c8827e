"""Another distribution has an entry of this name: both are loaded."""

from llmft_core import Method, hookimpl

llmft_api = 1


class TheMethod(Method):
    """Trains the model as it comes."""

    name = "same-entry"
    summary = "trains the model as it comes"

    def apply(self, model):
        """The same model."""
        return model


@hookimpl
def llmft_methods():
    """One method."""
    return [TheMethod]
