"""Assertions of the checks say what they found, as those of tests do."""

import pytest

pytest.register_assert_rewrite(
    "jsonargparse_checks", "lightning_checks", "peft_checks", "torch_checks", "transformers_checks"
)
