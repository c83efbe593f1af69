"""Protection methods: tensors in, tensors out. Depends on PyTorch and diffusers only."""
