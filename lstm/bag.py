"""A classifier that only counts words: what order is worth, beside the recurrent network.

A text becomes a vector with the number of times that each word comes (a bag of words). Two layers
on top can learn any rule over these counts, but `not` stands nowhere in particular.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reviews import Reviews


def counts(part: Reviews, vocab_size: int) -> Tensor:
    """(N, V): how often each word comes in each text."""
    rows = np.repeat(np.arange(len(part)), part.lengths)
    table = torch.zeros(len(part), vocab_size)
    table.index_put_((torch.from_numpy(rows), torch.from_numpy(part.ids.astype(np.int64))),
                     torch.ones(len(part.ids)), accumulate=True)  # fmt: skip
    return table


def train(parts: dict[str, Reviews], vocab_size: int, n_class: int, seed: int = 0) -> Tensor:
    """Train on the training part and return the answers to the test part, (N,).

    The number of epochs that is best on the validation part is taken.
    """
    torch.manual_seed(seed)
    tables = {name: counts(part, vocab_size) for name, part in parts.items()}
    labels = {name: torch.from_numpy(part.labels.astype(np.int64)) for name, part in parts.items()}
    net = nn.Sequential(nn.Linear(vocab_size, 64), nn.ReLU(), nn.Linear(64, n_class))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.1)
    best, answers = -1.0, labels["test"]
    for _ in range(12):
        for which in torch.randperm(len(labels["train"])).split(128):
            loss = F.cross_entropy(net(tables["train"][which]), labels["train"][which])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            valid = (net(tables["valid"]).argmax(1) == labels["valid"]).float().mean().item()
            if valid > best:
                best, answers = valid, net(tables["test"]).argmax(1)
    return answers


def score(answers: Tensor, part: Reviews) -> dict[str, float]:
    """Accuracy and, where P(label 1) is known, the accuracy to expect of these answers."""
    right = (answers.numpy() == part.labels).mean().item()
    found = {"accuracy": right}
    if part.bayes is not None:
        found["expected"] = float(np.where(answers.numpy() == 1, part.p, 1 - part.p).mean())
    return found
