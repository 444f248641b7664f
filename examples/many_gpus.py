"""A small CLIP on several processes: torchrun --nproc-per-node 2 examples/many_gpus.py"""

import torch
from torch.nn.parallel import DistributedDataParallel

import clipfast


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Linear(32, 16), torch.nn.Linear(24, 16)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.66))

    def forward(self, images, texts):
        return self.image(images), self.text(texts), self.logit_scale.exp()


torch.distributed.init_process_group("gloo")  # "nccl" on GPUs
rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
model = DistributedDataParallel(Towers())
loss = clipfast.ContrastiveLoss(rank=rank, world_size=world_size, normalize=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(rank)
images = torch.randn(64 + rank, 32)  # each rank has its own number of rows
texts = images[:, :24] + 0.1 * torch.randn(64 + rank, 24)
for step in range(20):
    optimizer.zero_grad()
    value = loss(*model(images, texts))
    value.backward()
    optimizer.step()
    if rank == 0:
        print(step, value.item())
torch.distributed.barrier()
del model, loss, optimizer, value  # DDP holds the group, whose threads must end before Python does
torch.distributed.destroy_process_group()
