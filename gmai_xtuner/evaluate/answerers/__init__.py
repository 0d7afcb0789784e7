"""Who answers: an export of ours, any transformers image-text model, any OpenAI-compatible endpoint."""

from gmai_xtuner.evaluate.answerers.answerer import Answerer, Given, Job
from gmai_xtuner.evaluate.answerers.choose import ModelOptions, make_answerer

__all__ = ["Answerer", "Given", "Job", "ModelOptions", "make_answerer"]
