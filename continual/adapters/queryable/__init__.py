"""The Instruction-Queryable adapter: router, bank, layers and the PEFT tuner."""
