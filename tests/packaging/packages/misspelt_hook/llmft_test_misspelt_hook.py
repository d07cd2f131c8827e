"""Its hook has a typo."""

from llmft_core import Method, hookimpl

llmft_api = 1


class TheMethod(Method):
    """Trains the model as it comes."""

    name = "misspelt"
    summary = "trains the model as it comes"

    def apply(self, model):
        """The same model."""
        return model


@hookimpl
def llmft_method():
    """One method."""
    return [TheMethod]
