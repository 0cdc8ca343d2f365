"""Where weights and work live. The only folder that may import torch.distributed."""
