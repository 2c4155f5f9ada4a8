import torch

# Small tensors on few cores: more threads only fight each other.
torch.set_num_threads(1)
