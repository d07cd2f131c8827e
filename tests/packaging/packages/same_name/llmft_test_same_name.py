"""Offers a method called full, as llmft does."""

from llmft_core import Method, hookimpl

llmft_api = 1


class TheMethod(Method):
    """Trains the model as it comes."""

    name = "full"
    summary = "trains the model as it comes"

    def apply(self, model):
        """The same model."""
        return model


@hookimpl
def llmft_methods():
    """One method."""
    return [TheMethod]
