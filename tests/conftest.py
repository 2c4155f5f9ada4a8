import torch

# Small tensors on few cores: more threads only fight each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    # At the end one of two processes would run a notebook while the other has nothing to do.
    items.sort(key=lambda item: item.path.suffix != ".ipynb")
