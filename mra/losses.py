"""The losses of MRA (section 3) as pure functions of tensors: contrastive, matching, masked words.

Image-text losses (ITC, ITM) and region-phrase losses (RPC, RPM) are the same two functions, called on images and
captions or on regions and phrases. run/contrastive.py computes `contrastive` in tiles. Read next: retriever.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(classes: Tensor, smoothing: float = 0.0) -> Tensor:
    """Row-normalised targets (B, B): a pair of equal classes (B,) is a positive.

    target = (1 - smoothing) * same / sum(same) + smoothing / B
    """
    same = (classes[:, None] == classes[None, :]).float()                    # (B, B)
    return (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / len(classes)


def similarity_logits(image_features: Tensor, text_features: Tensor, temperature: Tensor | float) -> Tensor:
    """Cosine similarities / temperature (B, B), in float32: of bf16 ones exp(logit) errs in its second digit."""
    with torch.autocast(image_features.device.type, enabled=False):
        return image_features.float() @ text_features.float().T / temperature


def contrastive(image_features: Tensor, text_features: Tensor, temperature: Tensor | float, classes: Tensor,
                smoothing: float = 0.0) -> Tensor:
    """Image-text (or region-phrase) contrastive loss with multi-positive soft targets; a scalar.

    L = -1/2 E[sum_j target_ij log S_I2T(i, j) + sum_j target_ij log S_T2I(i, j)]   (MRA section 3)

    Features (B, E) of unit length; classes (B,): pairs of one class, an identity or a phrase, are positives.
    """
    logits = similarity_logits(image_features, text_features, temperature)   # (B, B)
    targets = soft_targets(classes, smoothing)
    image_to_text = (targets * logits.log_softmax(1)).sum(1).mean()
    text_to_image = (targets * logits.T.log_softmax(1)).sum(1).mean()
    return -(image_to_text + text_to_image) / 2


def distribution_matching(image_features: Tensor, text_features: Tensor, temperature: Tensor | float, classes: Tensor,
                          smoothing: float = 0.0) -> Tensor:
    """Similarity distribution matching, IRRA's alternative to `contrastive` (arXiv 2303.12501, section 3.3); a scalar.

    L = E[KL(S_I2T || target)] + E[KL(S_T2I || target)],    with arguments and targets as of `contrastive`
    """
    logits = similarity_logits(image_features, text_features, temperature)   # (B, B)
    log_targets = (soft_targets(classes, smoothing) + 1e-8).log()
    return sum(F.kl_div(log_targets, rows.log_softmax(1), reduction="batchmean", log_target=True)
               for rows in (logits, logits.T))


def hard_negatives(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of contrastive logits (B, B), similarities / temperature, one column of another class.

    Drawn in proportion to exp(logits). Returns the columns (B,) and exists (B,): False where there is no other class.
    """
    other = classes[:, None] != classes[None, :]                             # (B, B)
    weights = logits.float().masked_fill(~other, -torch.inf).softmax(1)
    weights = weights.nan_to_num(1.0)       # any column: for a row without negatives, and for a loss that is not finite
    return torch.multinomial(weights, 1).squeeze(1), other.any(1)


def matching(logits: Tensor, matched: Tensor) -> Tensor:
    """Cross-entropy of each pair's matching logits (n, 2) [mismatched, matched] against matched (n,) bool; (n,)."""
    return F.cross_entropy(logits.float(), matched.long(), reduction="none")


def masked_words(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (B, M) of the words at masked positions, logits (B, M, V); 0 where labels (B, M) are -100."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def total(terms: dict[str, Tensor], beta: float) -> Tensor:
    """L = L_ITC + L_ITM + L_MLM + beta (L_RPC + L_RPM), each term present in `terms` once (MRA section 3)."""
    weights = {"itc": 1.0, "itm": 1.0, "mlm": 1.0, "rpc": beta, "rpm": beta}
    return sum(weights[name] * term for name, term in terms.items())
