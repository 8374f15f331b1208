"""What healing minimises, in nats per token."""

import torch
import torch.nn.functional as F


def next_token(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of logits (n, length, vocabulary) on the tokens (n, length) that follow; float32."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean KL(wanted || given) of the predictions behind two sets of logits (n, length, vocabulary); float32."""
    given, truth = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return F.kl_div(given.flatten(0, -2), truth.flatten(0, -2), reduction="batchmean", log_target=True)


def output_error(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error of hidden states (n, length, hidden), relative to the size of the wanted ones; float32."""
    given, wanted = given.float(), wanted.float()
    return (given - wanted).square().sum() / wanted.square().sum()
