"""Written for contracts that this llmft does not have."""

from llmft_core import Method, hookimpl

llmft_api = 99


class TheMethod(Method):
    """Trains the model as it comes."""

    name = "wrong-api"
    summary = "trains the model as it comes"

    def apply(self, model):
        """The same model."""
        return model


@hookimpl
def llmft_methods():
    """One method."""
    return [TheMethod]
