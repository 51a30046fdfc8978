"""Fine-tuning of a language model of `transformers` on preferences that the user brings, by DPO."""

from eafo_dynamic.experiments.preferences.dpo import PreferenceTask
from eafo_dynamic.experiments.preferences.pairs import PreferenceData
from eafo_dynamic.experiments.preferences.pretrained import causal_lm

__all__ = ["PreferenceData", "PreferenceTask", "causal_lm"]
