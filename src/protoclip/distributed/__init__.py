"""Ranks that train as one: collectives, DDP and FSDP2, and the processor cores of a rank."""
