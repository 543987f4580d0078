"""Trainings with the structure of public examples: DCGAN, word model, style transfer, MAML, diffusion, …"""

import sys

import torch
import torch.nn.functional as F
from small_net import net, rows
from torch import nn
from torch.utils.data import DataLoader

torch.manual_seed(0)


def dcgan():
    """pytorch/examples: three backward passes, two optimizers, images of fixed noise every 50 steps."""
    generator, critic = net(100, 512, 64), net(64, 512, 1)
    opt_g, opt_d = (torch.optim.Adam(model.parameters(), 2e-4, (0.5, 0.999)) for model in (generator, critic))
    fixed, criterion = torch.randn(64, 100), nn.BCEWithLogitsLoss()
    for i, (real, _) in enumerate(DataLoader(rows(), 16, shuffle=True)):
        critic.zero_grad()
        loss_real = criterion(critic(real), torch.ones(len(real), 1))
        loss_real.backward()
        fake = generator(torch.randn(len(real), 100))
        loss_fake = criterion(critic(fake.detach()), torch.zeros(len(real), 1))
        loss_fake.backward()
        opt_d.step()
        generator.zero_grad()
        loss_g = criterion(critic(fake), torch.ones(len(real), 1))
        loss_g.backward()
        opt_g.step()
        print(f"[{i}] D {loss_real.item() + loss_fake.item():.4f} G {loss_g.item():.4f}")
        if i % 50 == 0:
            torch.save(generator(fixed).detach(), "samples.pt")


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = net(64, 1024, 40), net(20, 1024, 64)

    def encode(self, x):
        return self.encoder(x).chunk(2, 1)

    def forward(self, x):
        mean, log_variance = self.encode(x)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(z), mean, log_variance


def vae():
    """pytorch/examples: trains and tests in each epoch, then samples from the decoder alone."""
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    training, test = DataLoader(rows(1600), 16, shuffle=True), DataLoader(rows(320), 16)
    for _ in range(2):
        model.train()
        for x, _ in training:
            optimizer.zero_grad()
            output, mean, log_variance = model(x)
            loss = F.mse_loss(output, x) - 0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for x, _ in test:
                model(x)
            model.decoder(torch.randn(64, 20))


class WordModel(nn.Module):
    def __init__(self, words=500, width=128):
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(words, width), nn.LSTM(width, width), nn.Linear(width, words)

    def forward(self, tokens, hidden):
        output, hidden = self.rnn(self.embedding(tokens), hidden)
        return self.head(output).flatten(0, 1), hidden


def word_language_model():
    """pytorch/examples: slices of one long tensor, hidden state carried over, own update of the parameters."""

    def batches(source):
        for i in range(0, len(source) - 1, 35):
            yield source[i : i + 35], source[i + 1 : i + 36].flatten()

    model = WordModel()
    training, held_out = torch.randint(0, 500, (35 * 60 + 1, 20)), torch.randint(0, 500, (35 * 8 + 1, 10))
    for _ in range(2):
        model.train()
        hidden = None
        for x, y in batches(training):
            model.zero_grad()
            hidden = None if hidden is None else tuple(state.detach() for state in hidden)
            output, hidden = model(x, hidden)
            F.cross_entropy(output, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-1.0)
        model.eval()
        with torch.no_grad():
            for x, y in batches(held_out):
                F.cross_entropy(model(x, None)[0], y)


def style_transfer():
    """Optimizes an image, not the model: LBFGS with a closure, on the features of a frozen network."""
    features = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1)).eval()
    features.requires_grad_(False)
    target = features(torch.rand(1, 3, 64, 64)).detach()
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    optimizer = torch.optim.LBFGS([image])
    for _ in range(60):

        def closure():
            with torch.no_grad():
                image.clamp_(0, 1)
            optimizer.zero_grad()
            loss = F.mse_loss(features(image), target)
            loss.backward()
            return loss

        optimizer.step(closure)


def deep_dream():
    """The same with Adam: its first step comes after the first backward pass."""
    features = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1)).eval()
    features.requires_grad_(False)
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    optimizer = torch.optim.Adam([image], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (-features(image).square().mean()).backward()
        optimizer.step()


def adversarial():
    """PGD: four passes for the attack on each batch, whose gradients are those of the input."""
    model = net(64, 512)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for x, y in DataLoader(rows(), 16):
        model.eval()
        attack = x.clone()
        for _ in range(4):
            attack.requires_grad_(True)
            F.cross_entropy(model(attack), y).backward()
            attack = (attack + 0.01 * attack.grad.sign()).detach()
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(attack), y).backward()
        optimizer.step()


def functional():
    """torch.func: gradients by a transform, which a torch optimizer then applies."""
    model = net(64, 1024)
    optimizer = torch.optim.Adam(model.parameters())
    parameters = dict(model.named_parameters())

    def loss_of(values, x, y):
        return F.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    gradient = torch.func.grad(loss_of)
    for x, y in DataLoader(rows(), 16):
        grads = gradient({name: value.detach() for name, value in parameters.items()}, x, y)
        for name, value in parameters.items():
            value.grad = grads[name]
        optimizer.step()


def meta_learning():
    """MAML: inner steps with a graph, one outer step over four tasks."""
    model = net(64, 256)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(60):
        outer = 0.0
        for _ in range(4):
            x, y = torch.randn(32, 64), torch.randint(0, 10, (32,))
            values = dict(model.named_parameters())
            for _ in range(2):
                loss = F.cross_entropy(torch.func.functional_call(model, values, (x[:16],)), y[:16])
                grads = torch.autograd.grad(loss, list(values.values()), create_graph=True)
                values = {name: value - 0.01 * g for (name, value), g in zip(values.items(), grads, strict=True)}
            outer = outer + F.cross_entropy(torch.func.functional_call(model, values, (x[16:],)), y[16:])
        optimizer.zero_grad()
        outer.backward()
        optimizer.step()


class Diffusion:
    """As small DDPM scripts have it: no module, calls the model in `p_losses` and, averaged, in `sample`."""

    def p_losses(self, model, x):
        noise, t = torch.randn_like(x), torch.rand(len(x), 1)
        return F.mse_loss(model(torch.cat([(1 - t) * x + t * noise, t], 1)), noise)

    @torch.no_grad()
    def sample(self, model, count):
        x = torch.randn(count, 64)
        for i in reversed(range(100)):
            t = torch.full((count, 1), i / 100)
            x = x - 0.01 * model(torch.cat([x, t], 1))
        return x


def diffusion():
    """Samples by an averaged model, which no optimizer trains, every 25 steps."""
    model, averaged, process = net(65, 512, 64), net(65, 512, 64), Diffusion()
    averaged.load_state_dict(model.state_dict())
    averaged.eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    for step, (x, _) in enumerate(DataLoader(rows(), 16)):
        loss = process.p_losses(model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for kept, new in zip(averaged.parameters(), model.parameters(), strict=True):
            kept.data.lerp_(new.data, 0.01)
        if step % 25 == 24:
            process.sample(averaged, 64)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization: two passes per step around another optimizer."""

    def __init__(self, parameters, base, rho=0.05, **options):
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad * group["rho"] / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()
        self.zero_grad()


def sharpness():
    model = net(64, 512)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01)
    for x, y in DataLoader(rows(), 16):
        F.cross_entropy(model(x), y).backward()
        optimizer.first_step()
        F.cross_entropy(model(x), y).backward()
        optimizer.second_step()


class Convolution(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x, edges):
        x = self.linear(x)
        return torch.zeros_like(x).index_add_(0, edges[1], x[edges[0]])


class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Convolution(256, 64), Convolution(64, 7)

    def forward(self, x, edges):
        return self.second(F.dropout(F.relu(self.first(x, edges)), 0.5, self.training), edges)


def full_graph():
    """PyTorch Geometric's gcn.py: one graph, no loader; tests after each epoch, which is one step."""
    x, edges = torch.randn(2700, 256), torch.randint(0, 2700, (2, 10_000))
    y, mask = torch.randint(0, 7, (2700,)), torch.rand(2700) < 0.2
    model = GCN()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x, edges)[mask], y[mask]).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            (model(x, edges).argmax(-1)[~mask] == y[~mask]).float().mean().item()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
