"""Files in and out: where a model comes from, its weights, Hugging Face PEFT adapters."""
