import specforge  # noqa: F401  first: it makes torchvision importable beside a torch without CUDA
