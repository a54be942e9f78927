"""One batch of test rows through the adapted model: answers, what they earn, and the routes, from one forward pass.

Labels are ranked by the summed log-likelihood of their tokens, end mark included, given the prompt. All labels of a
row share one pass, as a tree with the prompt as its trunk: what labels begin with stands behind the prompt, once where
several begin alike, and each token sees the prompt and what comes before it in its own label alone.

Shapes: B rows, P prompt columns, K nodes of the tree, L label tokens, C labels, V vocabulary, N blocks, M atoms.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from continual.adapters import QueryableLoraModel
from continual.adapters.queryable.carrier import ROUTING_KEYWORDS
from continual.data.label_tree import LabelTree
from continual.scoring.outcome import Outcome
from tasks import Task

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule


@torch.no_grad()
def score_batch(module: AdaptedModule, task: Task, batch: dict[str, Any], max_answer_tokens: int = 0) -> Outcome:
    """Answer a batch of one task's test rows.

    Args:
        module: The adapted model.
        task: The task that the rows come from; judges the answers.
        batch: From ``StageData.test_dataloader``.
        max_answer_tokens: Longest generated answer, in tokens; with 0, labels are ranked and not generated too.
    """
    started = time.perf_counter()
    with first_routes(module) as passes:
        if task.kind == "labels":
            outcome = _rank_labels(module, task, batch)
            if max_answer_tokens:
                outcome.generated_values = _generate(module, task, batch, max_answer_tokens).values
        elif task.kind == "free":
            outcome = _generate(module, task, batch, max_answer_tokens)
        else:
            outcome = _predict(module, batch)
    outcome.seconds = time.perf_counter() - started  # answers were read back from the device: nothing is pending
    outcome.stages = chosen_stages(module)
    mask = batch["forward"].get("attention_mask")
    if mask is None:  # a regression row is one token
        mask = torch.ones(len(batch["rows"]), 1, device=batch["labels"].device)
    if (routes := prompt_routes(module, passes, mask)) is not None:
        outcome.routes, outcome.prompt_mask = routes, mask
    return outcome


def label_log_likelihoods(model: Any, forward: dict[str, Tensor], tree: LabelTree) -> Tensor:
    """Return log p(label | prompt), (B, C), of every entry of a tree of labels, from one pass; on the CPU.

    Args:
        model: The language model.
        forward: Left-padded prompts: input_ids, attention_mask, position_ids, (B, P), and the instruction keyword.
        tree: The labels.
    """
    return log_likelihoods_of_trees(model, forward, [(tree, len(forward["input_ids"]))])[0]


def log_likelihoods_of_trees(
    model: Any, forward: dict[str, Tensor], trees: Sequence[tuple[LabelTree, int]]
) -> list[Tensor]:
    """Return what ``label_log_likelihoods`` does, of rows that each have one of several trees of labels.

    Args:
        model: The language model.
        forward: Left-padded prompts.
        trees: The labels of the first rows, and how many rows those are, then of the next ones, to the last row.
    """
    ids, prompt_mask, positions = (forward[name] for name in ("input_ids", "attention_mask", "position_ids"))
    rest = {name: value for name, value in forward.items() if name in (*ROUTING_KEYWORDS, "task_ids")}
    device, num_nodes = ids.device, max(len(tree.node_ids_K) for tree, _ in trees)
    length = prompt_mask.sum(dim=1, keepdim=True)
    nodes_BK, depth_BK, path_BKK = (torch.cat(each).to(device) for each in zip(*_by_row(trees, num_nodes), strict=True))
    logits = model(
        input_ids=torch.cat([ids, nodes_BK], dim=1),
        attention_mask=_tree_mask(prompt_mask, path_BKK, next(model.parameters()).dtype),
        position_ids=torch.cat([positions, length + depth_BK], dim=1),
        logits_to_keep=num_nodes + 1,
        use_cache=False,
        **rest,
    ).logits
    # Kept column 0 is the prompt's last token, column 1 + k that of node k.
    # A CPU is four times as fast row by row, in memory that it has at hand; a GPU is not asked for each row by itself.
    rows = max(1, 2**24 // logits[0].numel()) if device.type == "cuda" else 1
    found = []
    for (tree, count), own in zip(trees, logits.split([count for _, count in trees]), strict=True):
        log_p = _log_p(own, (tree.after_L + 1).to(device), tree.ids_L.to(device), rows)
        # Summed on the CPU: a GPU adds up in an order that changes from run to run.
        scores = torch.zeros(count, tree.num_entries, dtype=torch.float64)
        found.append(scores.index_add(1, tree.segment_L.cpu(), log_p.cpu().double()))
    return found


def _by_row(trees: Sequence[tuple[LabelTree, int]], num_nodes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield, of each tree's rows, the nodes' ids and depths, (rows, K), and which node is or continues which, (.., K).

    Nodes that a tree lacks stand alone.
    """
    for tree, count in trees:
        gap = num_nodes - len(tree.node_ids_K)
        nodes, depth = F.pad(tree.node_ids_K, (0, gap)), F.pad(tree.depth_K, (0, gap))
        path = F.pad(tree.path_KK, (0, gap, 0, gap))
        yield nodes.expand(count, -1), depth.expand(count, -1), path.expand(count, -1, -1)


def _log_p(logits_BKV: Tensor, columns_L: Tensor, tokens_L: Tensor, rows: int) -> Tensor:
    """Return the log-probability of each token in its column, (B, L), in float32.

    So many ``rows`` are taken at once: a float32 copy of all logits would be the largest tensor of the run.
    """
    return torch.cat([part.float().log_softmax(dim=-1)[:, columns_L, tokens_L] for part in logits_BKV.split(rows)])


def _tree_mask(prompt_mask_BP: Tensor, path_BKK: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask, (B, 1, P + K, P + K): causal, and a node sees the prompt and its own path."""
    num_rows, num_prompt = prompt_mask_BP.shape
    width = num_prompt + path_BKK.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=prompt_mask_BP.device).tril()
    seen = F.pad(prompt_mask_BP.bool(), (0, path_BKK.shape[1]), value=True)
    allowed = causal.unsqueeze(0) & seen.unsqueeze(1)
    allowed[:, num_prompt:, num_prompt:] = path_BKK
    allowed |= torch.eye(width, dtype=torch.bool, device=allowed.device)  # padding sees itself: no row of -inf alone
    mask = torch.zeros(num_rows, 1, width, width, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed.unsqueeze(1), torch.finfo(dtype).min)


def _rank_labels(module: AdaptedModule, task: Task, batch: dict[str, Any]) -> Outcome:
    return ranked(task, batch, label_log_likelihoods(module.model, batch["forward"], batch["label_tree"]))


def ranked(task: Task, batch: dict[str, Any], found: Tensor) -> Outcome:
    """Return what rows come to by the log-likelihoods of their labels, (B, C)."""
    tree: LabelTree = batch["label_tree"]
    for place, row in enumerate(batch["rows"]):
        if "num_choices" in row:  # the task's further labels name choices that this row does not have
            found[place, row["num_choices"] : tree.num_own] = -torch.inf
    own = found[:, : tree.num_own].argmax(dim=1).tolist()
    predictions = [tree.names[index] for index in own]
    targets = [row["answer"] for row in batch["rows"]]
    outcome = Outcome(
        rows=[row["row"] for row in batch["rows"]],
        values=[float(p == t) for p, t in zip(predictions, targets, strict=True)],
        predictions=predictions,
        targets=targets,
        label_scores=found,
    )
    if len(tree.names) > tree.num_own:
        among_all = [tree.names[index] for index in found[:, : len(tree.names)].argmax(dim=1).tolist()]
        outcome.seen_values = [float(p == t) for p, t in zip(among_all, targets, strict=True)]
    return outcome


def _generate(module: AdaptedModule, task: Task, batch: dict[str, Any], max_answer_tokens: int) -> Outcome:
    backbone: Any = module.backbone
    inputs = {name: value for name, value in batch["forward"].items() if name != "position_ids"}
    if (ids := inputs.pop("instruction_ids", None)) is not None:  # once, not with every token
        inputs["instruction_encoding"] = cast(QueryableLoraModel, module.tuner).encode_instruction(ids)
    new = module.generate(inputs, max_answer_tokens).tolist()
    predictions = [backbone.decode(ids) for ids in new]
    return Outcome(
        rows=[row["row"] for row in batch["rows"]],
        values=[float(task.score_answer(row, text)) for row, text in zip(batch["rows"], predictions, strict=True)],
        predictions=predictions,
        targets=[row["answer"] for row in batch["rows"]],
    )


def _predict(module: AdaptedModule, batch: dict[str, Any]) -> Outcome:
    assert module.model is not None
    predicted, target = module.model(**batch["forward"]).float(), batch["labels"].float()
    return Outcome(
        rows=[row["row"] for row in batch["rows"]],
        values=(predicted - target).square().tolist(),
        predictions=[repr(value) for value in predicted.tolist()],
        targets=target.tolist(),
    )


def chosen_stages(module: AdaptedModule) -> list[str] | None:
    """Return the names of the stages that a growing bank chose for the rows of the last pass."""
    growing = module.tuner and module.tuner.growing
    if not growing or growing.chosen_B is None:
        return None
    return growing.stages_of(growing.chosen_B)


def first_routes(module: AdaptedModule) -> AbstractContextManager[list[dict[str, list[Tensor]]]]:
    """Record the routes of the first pass made inside the ``with``: that of the prompts."""
    return nullcontext([]) if module.tuner is None else module.tuner.record_routes(most=1)


def prompt_routes(module: AdaptedModule, passes: list[dict[str, list[Tensor]]], mask_BP: Tensor) -> Tensor | None:
    """Return the routes of the prompt's columns, (N, B, P, M), never those of labels or generated tokens.

    A growing bank's are over all its slices. None without a router, and where the adapter is switched off.
    """
    growing = module.tuner and module.tuner.growing
    if not passes and growing and growing.gate.stages:
        passes = [{}]  # the gate left every row to the backbone
    if not passes:
        return None
    num_rows, width = mask_BP.shape
    if growing:
        prompt = {name: [r[:, :width] if r.dim() == 3 else r for r in own] for name, own in passes[0].items()}
        routes = growing.join(prompt, (num_rows, width))
    else:
        routes = next(iter(passes[0].values()))
    kept = [route if route.dim() == 3 else route.unsqueeze(1) for route in routes if route is not None]
    return torch.stack([route[:, :width] for route in kept]) if kept else None
