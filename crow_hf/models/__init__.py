"""The models and their registration with the Auto classes of transformers.

These files also serve as remote code on the Hub, so they import nothing from the rest of the package.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration_byte_entropy import ByteEntropyConfig
from .configuration_coconut import CoconutConfig
from .modeling_byte_entropy import ByteEntropyPredictor
from .modeling_coconut import CoconutForCausalLM, CoconutModel
from .tokenization_coconut import CoconutTokenizer


AutoConfig.register(ByteEntropyConfig.model_type, ByteEntropyConfig)
AutoModelForCausalLM.register(ByteEntropyConfig, ByteEntropyPredictor)
AutoConfig.register(CoconutConfig.model_type, CoconutConfig)
AutoModel.register(CoconutConfig, CoconutModel)
AutoModelForCausalLM.register(CoconutConfig, CoconutForCausalLM)
AutoTokenizer.register(CoconutConfig, CoconutTokenizer)
