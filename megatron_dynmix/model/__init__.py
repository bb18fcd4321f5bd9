"""Which classes the model is built from, and Megatron-Core's GPT made of them."""
