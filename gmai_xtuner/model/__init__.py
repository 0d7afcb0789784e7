"""The model and its parts: flat batch in, loss out; checkpoints in and out."""

from gmai_xtuner.model.internlm2 import load_language_model
from gmai_xtuner.model.llava import GMAILLaVAModel
from gmai_xtuner.model.tokenizer import load_tokenizer
from gmai_xtuner.model.vision import load_vision_tower

__all__ = ["GMAILLaVAModel", "load_language_model", "load_tokenizer", "load_vision_tower"]
