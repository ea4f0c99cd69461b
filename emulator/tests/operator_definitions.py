"""What each fused NPU operator means, written out: one token, head, expert or row at a time, in fp64 on the CPU.

Written apart from emulator/fake_npu/operators, from the operators' documentation ("torch_npu.<operator>" in
the Ascend Extension for PyTorch API reference), and meant to be checked against it by eye.  Leaves out whatever the
reference versions leave out.  Inputs and results are CPU tensors, results fp64 or integers; gradients are those that
autograd finds for these definitions.
"""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + epsilon) * gamma, for each row; and the reciprocal root."""
    rows, roots = [], []
    for row in x.double().reshape(-1, gamma.numel()):
        root = 1 / torch.sqrt((row * row).mean() + epsilon)
        rows.append(row * root * gamma.double().flatten())
        roots.append(root)
    return torch.stack(rows).view(x.shape), torch.stack(roots).view(*x.shape[: x.dim() - gamma.dim()], 1)


def swiglu(x: Tensor) -> Tensor:
    """a / (1 + exp(-a)) * b, with a the first half of the last axis and b the second."""
    half = x.shape[-1] // 2
    columns = []
    for i in range(half):
        a, b = x[..., i].double(), x[..., half + i].double()
        columns.append(a / (1 + torch.exp(-a)) * b)
    return torch.stack(columns, -1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One head (D,): pairs of elements turned; cos and sin (D,) as they multiply x and its partner."""
    size = x.shape[-1]
    turned = []
    for i in range(size):
        if interleaved:
            partner = -x[i + 1] if i % 2 == 0 else x[i - 1]
        else:
            partner = -x[i + size // 2] if i < size // 2 else x[i - size // 2]
        turned.append(x[i] * cos[i] + partner * sin[i])
    return torch.stack(turned)


def rotary_heads(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rotary` of every head of x (..., D) with cos and sin that broadcast to x."""
    heads = x.double().reshape(-1, x.shape[-1])
    cosines = cos.double().expand(x.shape).reshape(heads.shape)
    sines = sin.double().expand(x.shape).reshape(heads.shape)
    turned = [rotary(*one, interleaved) for one in zip(heads, cosines, sines, strict=True)]
    return torch.stack(turned).view(x.shape)


def rotary_by_position(
    x: Tensor, positions: list[list[int]], sections: list[int], cache: Tensor, head_size: int, interleaved: bool
) -> Tensor:
    """x (tokens, heads * head_size): each head's first cache.shape[1] elements turned by the angle of its position.

    Frequency f belongs to the section that it falls in, and takes the position in that section's list.
    """
    half = cache.shape[1] // 2
    section_of = [s for s, size in enumerate(sections) for _ in range(size)]
    result = x.double().clone()
    for t in range(x.shape[0]):
        cosines, sines = [], []
        for f in range(half):
            place = positions[section_of[f]][t]
            cosines.append(cache[place, f].double())
            sines.append(cache[place, half + f].double())
        if interleaved:
            order = [f for f in range(half) for _ in range(2)]
        else:
            order = [*range(half), *range(half)]
        cos, sin = torch.stack([cosines[f] for f in order]), torch.stack([sines[f] for f in order])
        for start in range(0, x.shape[1], head_size):
            part = result[t, start : start + 2 * half].clone()
            result[t, start : start + 2 * half] = rotary(part, cos, sin, interleaved)
    return result


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, visible: list[list[bool]]) -> Tensor:
    """One sequence: query (S, H, D), key and value (T, KH, D); visible[s][t].  A query that sees nothing gives 0."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    rows = []
    for s in range(query.shape[0]):
        heads = []
        for h in range(query.shape[1]):
            seen = [t for t in range(key.shape[0]) if visible[s][t]]
            if not seen:
                heads.append(torch.zeros(value.shape[-1], dtype=torch.float64))
                continue
            scores = torch.stack([(query[s, h] * key[t, h // group]).sum() * scale for t in seen])
            weights = torch.exp(scores - scores.max().detach())
            weights = weights / weights.sum()
            heads.append(sum(w * value[t, h // group] for w, t in zip(weights, seen, strict=True)))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def log_sum_exp(query: Tensor, key: Tensor, scale: float, visible: list[list[bool]]) -> Tensor:
    """(S, H): the logarithm of the sum of exp(score) over the visible keys."""
    group = query.shape[1] // key.shape[1]
    rows = []
    for s in range(query.shape[0]):
        sums = []
        for h in range(query.shape[1]):
            scores = [
                float((query[s, h].double() * key[t, h // group].double()).sum()) * scale for t in range(len(key))
            ]
            sums.append(math.log(sum(math.exp(x) for x, seen in zip(scores, visible[s], strict=True) if seen)))
        rows.append(sums)
    return torch.tensor(rows, dtype=torch.float64)


def everything(queries: int, keys: int) -> list[list[bool]]:
    """Every query sees every key."""
    return [[True] * keys for _ in range(queries)]


def causal_from_the_start(queries: int, keys: int) -> list[list[bool]]:
    """Query s sees the keys up to number s (sparse mode 2)."""
    return [[t <= s for t in range(keys)] for s in range(queries)]


def causal_from_the_end(queries: int, keys: int) -> list[list[bool]]:
    """The last query sees all keys, the one before it all but one, ... (sparse mode 3)."""
    return [[t <= s + keys - queries for t in range(keys)] for s in range(queries)]


def band_from_the_end(queries: int, keys: int, before: int, after: int) -> list[list[bool]]:
    """As above, but only the keys from `before` back to `after` ahead (sparse mode 4)."""
    return [[-before <= t - (s + keys - queries) <= after for t in range(keys)] for s in range(queries)]


def cached(cache: Tensor, table: list[int], length: int) -> Tensor:
    """The first `length` tokens of a cache (blocks, block size, heads, D) by way of its block table."""
    size = cache.shape[1]
    return torch.stack([cache[table[t // size], t % size] for t in range(length)])


def write_slots(cache: Tensor, tokens: Tensor, slots: list[int]) -> Tensor:
    """The cache (blocks, block size, heads, D) after tokens (n, heads, D) were written; slot -1 is skipped."""
    result = cache.clone()
    for token, slot in zip(tokens, slots, strict=True):
        if slot >= 0:
            result[slot // cache.shape[1], slot % cache.shape[1]] = token
    return result


def top_k_gate(logits: Tensor, k: int, sigmoid: bool, renormalise: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """For each token the k experts with the largest scores, the largest first: (weights, experts)."""
    all_weights, all_experts = [], []
    for row in logits.double().tolist():
        if sigmoid:
            scores = [1 / (1 + math.exp(-x)) for x in row]
        else:
            total = sum(math.exp(x - max(row)) for x in row)
            scores = [math.exp(x - max(row)) / total for x in row]
        experts = sorted(range(len(row)), key=lambda e: -scores[e])[:k]
        weights = [scores[e] for e in experts]
        if sigmoid or renormalise:
            weights = [w / sum(weights) for w in weights]
        all_weights.append([w * scaling for w in weights])
        all_experts.append(experts)
    return torch.tensor(all_weights, dtype=torch.float64), torch.tensor(all_experts)


def route(x: Tensor, experts: Tensor, first: int, last: int) -> tuple[Tensor, list[int], list[int]]:
    """Rows of x for the choices of experts in [first, last), expert by expert: (rows, row of each choice, counts)."""
    rows, counts = [], []
    row_of = [-1] * experts.numel()
    for expert in range(first, last):
        count = 0
        for token in range(experts.shape[0]):
            for choice in range(experts.shape[1]):
                if experts[token, choice] == expert:
                    row_of[token * experts.shape[1] + choice] = len(rows)
                    rows.append(x[token])
                    count += 1
        counts.append(count)
    return (torch.stack(rows) if rows else x[:0]), row_of, counts


def combine(rows: Tensor, row_of: list[int], weights: Tensor) -> Tensor:
    """For each token the weighted sum of its choices' rows; a choice without a row counts nothing."""
    tokens, k = weights.shape
    sums = []
    for token in range(tokens):
        total = torch.zeros(rows.shape[1], dtype=torch.float64)
        for choice in range(k):
            row = row_of[token * k + choice]
            if 0 <= row < rows.shape[0]:
                total = total + weights[token, choice].double() * rows[row].double()
        sums.append(total)
    return torch.stack(sums)


def grouped_matmul(x: Tensor, weights: list[Tensor], counts: list[int]) -> Tensor:
    """Row by row of x, times the weight of the group that the row is in; as many rows as the counts sum to."""
    group_of = [group for group, count in enumerate(counts) for _ in range(count)]
    rows = [x[row].double() @ weights[group].double() for row, group in enumerate(group_of)]
    return torch.stack(rows) if rows else x.new_zeros(0, weights[0].shape[1], dtype=torch.float64)


def grouped_outer_products(x: Tensor, y: Tensor, counts: list[int]) -> Tensor:
    """For each group the sum over its positions of x[:, position] (M,) times y[position] (N,): (groups, M, N)."""
    products = []
    start = 0
    for count in counts:
        total = torch.zeros(x.shape[0], y.shape[1], dtype=torch.float64)
        for position in range(start, start + count):
            total += x[:, position].double().unsqueeze(1) * y[position].double().unsqueeze(0)
        products.append(total)
        start += count
    return torch.stack(products)


def re_route(counts: list[list[int]]) -> list[int]:
    """The old place of each token, when tokens by (rank, expert) are put in order of (expert, rank)."""
    places = {}
    start = 0
    for rank, row in enumerate(counts):
        for expert, count in enumerate(row):
            places[expert, rank] = range(start, start + count)
            start += count
    return [place for expert_and_rank in sorted(places) for place in places[expert_and_rank]]


def top_k_top_p(logits: list[float], k: int | None, p: float | None) -> set[int]:
    """The numbers of one row's values that stay; for values that differ."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if k is not None:
        order = order[:k]
    if p is None:
        return set(order)
    total = sum(math.exp(logits[i] - logits[order[0]]) for i in order)
    kept, mass_before = set(), 0.0
    for place, i in enumerate(order):
        if place and mass_before >= p:
            break
        kept.add(i)
        mass_before += math.exp(logits[i] - logits[order[0]]) / total
    return kept


def cross_entropy(logits: Tensor, targets: list[int], ignore: int) -> list[Tensor]:
    """-log softmax(row)[target] for each row, 0 where the target is to be ignored."""
    losses = []
    for row, target in zip(logits.double(), targets, strict=True):
        if target == ignore:
            losses.append((row * 0).sum())
        else:
            losses.append(torch.log(torch.exp(row - row.max().detach()).sum()) + row.max().detach() - row[target])
    return losses


def masked_where(mask: Tensor) -> list[list[bool]]:
    """Visibility from a mask whose entries other than 0 hide."""
    return [[entry == 0 for entry in row] for row in mask.tolist()]
