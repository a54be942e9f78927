"""The nearest routed rivals: mixtures of LoRA experts and of core experts."""
