"""The methods of peft that a recipe's section `lora` may name as its `type`, and the config class of each.

Nothing here imports peft: `zoo validate` reads it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterType:
    """Where peft has its config. prompts: it learns keys or tokens that stand before a text, and changes no layer."""

    module: str
    name: str
    prompts: bool = False


# of a run's directory: peft's config and weights, and which base they belong to
CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
DEFAULT_TYPE = "lora"
ADAPTER_TYPES = {
    "lora": AdapterType("tuners.lora.config", "LoraConfig"),
    "ia3": AdapterType("tuners.ia3.config", "IA3Config"),
    "prefix_tuning": AdapterType("tuners.prefix_tuning.config", "PrefixTuningConfig", prompts=True),
    "prompt_tuning": AdapterType("tuners.prompt_tuning.config", "PromptTuningConfig", prompts=True),
    "p_tuning": AdapterType("tuners.p_tuning.config", "PromptEncoderConfig", prompts=True),
}
