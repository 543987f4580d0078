"""Trainings by installed libraries, as their examples are written: PyTorch Geometric, Stable-Baselines3, …"""

import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from small_net import net, rows
from torch import nn
from torch.utils.data import DataLoader, Dataset

torch.manual_seed(0)


def geometric():
    """PyTorch Geometric's mini-batches of graphs."""
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GCNConv, global_mean_pool

    class GCN(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.head = GCNConv(32, 256), GCNConv(256, 256), nn.Linear(256, 2)

        def forward(self, x, edge_index, batch):
            x = F.relu(self.conv2(F.relu(self.conv1(x, edge_index)), edge_index))
            return self.head(F.dropout(global_mean_pool(x, batch), 0.5, self.training))

    graphs = [
        Data(torch.randn(20, 32), torch.randint(0, 20, (2, 60)), y=torch.tensor([index % 2])) for index in range(1600)
    ]
    model = GCN()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        model.train()
        for data in GraphLoader(graphs[:1280], batch_size=32, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x, data.edge_index, data.batch), data.y).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for data in GraphLoader(graphs[1280:], batch_size=32):
                model(data.x, data.edge_index, data.batch)


def _game(step_s):
    import gymnasium
    import numpy as np

    class Game(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (8,), np.float32)
        action_space = gymnasium.spaces.Discrete(3)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.steps = 0
            return self.observation_space.sample(), {}

        def step(self, action):
            self.steps += 1
            self.simulate()
            return self.observation_space.sample(), float(action), self.steps >= 100, False, {}

        def simulate(self):
            until = time.perf_counter() + step_s
            while time.perf_counter() < until:
                pass

    return Game()


def sb3_ppo(step_s=0.004):
    from stable_baselines3 import PPO

    PPO("MlpPolicy", _game(step_s), n_steps=256, batch_size=64, n_epochs=4).learn(2560)


def sb3_dqn():
    from stable_baselines3 import DQN

    DQN("MlpPolicy", _game(0.002), learning_starts=100, train_freq=1, buffer_size=5000).learn(1500)


def hf_language_model():
    """The Trainer on a small GPT-2: evaluates and saves every 40 steps."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    class Tokens(Dataset):
        def __init__(self, count):
            self.tokens = torch.randint(0, 500, (count, 64))

        def __len__(self):
            return len(self.tokens)

        def __getitem__(self, index):
            return {"input_ids": self.tokens[index], "labels": self.tokens[index]}

    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=2, n_head=2))
    arguments = TrainingArguments(
        "out", per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=160, report_to=[],
        eval_strategy="steps", eval_steps=40, save_strategy="steps", save_steps=40, use_cpu=True, logging_steps=20,
        disable_tqdm=True, lr_scheduler_type="cosine",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Tokens(2560), eval_dataset=Tokens(80)).train()


def lightning_gan():
    """PyTorch Lightning with manual optimization of two optimizers."""
    import pytorch_lightning as lightning

    class GAN(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = net(16, 512, 64), net(64, 512, 1)

        def training_step(self, batch, _):
            opt_g, opt_d = self.optimizers()
            fake = self.generator(torch.randn(len(batch[0]), 16))
            loss_d = F.softplus(-self.critic(batch[0])).mean() + F.softplus(self.critic(fake.detach())).mean()
            opt_d.zero_grad()
            self.manual_backward(loss_d)
            opt_d.step()
            loss_g = F.softplus(-self.critic(fake)).mean()
            opt_g.zero_grad()
            self.manual_backward(loss_g)
            opt_g.step()
            self.log_dict({"g": loss_g, "d": loss_d})

        def configure_optimizers(self):
            return [torch.optim.Adam(self.generator.parameters()), torch.optim.Adam(self.critic.parameters())]

    lightning.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False,
    ).fit(GAN(), DataLoader(rows(1600), 16))  # fmt: skip


def accelerate_accumulates():
    """Accelerate's `accumulate`, with an evaluation by `gather_for_metrics` in each epoch."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = net(64, 2048)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    training, held_out = DataLoader(rows(), 16, shuffle=True), DataLoader(rows(320), 16)
    model, optimizer, training, held_out, schedule = accelerator.prepare(model, optimizer, training, held_out, schedule)
    for _ in range(2):
        model.train()
        for x, y in training:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        model.eval()
        for x, y in held_out:
            with torch.no_grad():
                accelerator.gather_for_metrics((model(x).argmax(-1), y))


def tokenizer(words=1500):
    """Tokenizes each batch in `collate_fn`, by a tokenizer that has threads of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    letters = torch.randint(97, 113, (4000, 8)).tolist()
    vocabulary = ["".join(map(chr, each)) for each in letters]
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.train_from_iterator(vocabulary, trainers.BpeTrainer(vocab_size=1000, show_progress=False))
    tokens.enable_truncation(64)
    texts = [" ".join(vocabulary[(i * 7 + k * 13) % 4000] for k in range(words)) for i in range(1600)]

    def collate(rows):
        found = tokens.encode_batch([texts[row] for row in rows])
        return torch.tensor([each.ids for each in found]), torch.tensor(rows) % 10

    model = nn.Sequential(nn.EmbeddingBag(1000, 256), net(256, 512))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for x, y in DataLoader(range(1600), 16, shuffle=True, collate_fn=collate):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def web_dataset():
    """WebDataset: shards of samples in tar files, by its own loader."""
    import io
    import tarfile

    import webdataset as wds

    for shard in range(2):
        with tarfile.open(f"shard-{shard:04d}.tar", "w") as archive:
            for i in range(800):
                for name, value in (("x.pth", torch.randn(64)), ("cls", i % 10)):
                    body = io.BytesIO()
                    torch.save(value, body) if name == "x.pth" else body.write(str(value).encode())
                    info = tarfile.TarInfo(f"{shard * 800 + i:06d}.{name}")
                    info.size = body.tell()
                    body.seek(0)
                    archive.addfile(info, body)

    data = wds.WebDataset("shard-{0000..0001}.tar", shardshuffle=False).shuffle(100).decode().to_tuple("x.pth", "cls")
    loader = wds.WebLoader(data.batched(16), batch_size=None)
    model = net(64, 1024)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.as_tensor(y)).backward()
            optimizer.step()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
