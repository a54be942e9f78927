"""An atom taken out of the routing: what is left is the routing of a bank without it, and it comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from continual.adapters import QueryableLoraConfig

ATOMS, IDS = 5, torch.arange(3, 27).view(2, 12)
FIELDS: list[dict[str, Any]] = [
    {"top_k": 2},
    {"top_k": 4},
    {"top_k": 5},
    {"top_k": 2, "query_source": "uniform", "prior_weight": 0.0},
    {"top_k": 2, "query_source": "instruction_only"},
]


def adapted(backbone: Any, num_atoms: int = ATOMS, **fields: Any) -> Any:
    fields = {"r": 3, "num_blocks": 2, "prior_dim": 4, "target_modules": ["q_proj", "v_proj"]} | fields
    config = QueryableLoraConfig(num_atoms=num_atoms, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(backbone("llama"), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "queryable_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def passed(model: Any, **keywords: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and the routes, (N, B, T, M), of a pass."""
    with torch.no_grad(), model.base_model.record_routes() as passes:
        logits = model(IDS, **keywords).logits
    return logits, torch.stack(passes[0]["default"])


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("instructed", [True, False])
def test_the_others_route_as_in_a_bank_without_it(backbone, fields: dict[str, Any], instructed: bool) -> None:
    model = adapted(backbone, **fields)
    keywords = {"instruction_ids": torch.tensor([[5, 6, 7], [8, 9, -1]])} if instructed else {}
    smaller = adapted(backbone, ATOMS - 1, **fields | {"top_k": min(fields["top_k"], ATOMS - 1)})
    for atom in range(ATOMS):
        left = [other for other in range(ATOMS) if other != atom]
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            for name, tensor in [*smaller.named_parameters(), *smaller.named_buffers()]:
                source = tensors[name]
                of_atoms = name.rpartition(".")[2] in ("atoms", "keys", "prior_keys")
                tensor.copy_(source[left] if of_atoms else source)
        with model.base_model.without_atom(atom):
            logits, routes = passed(model, **keywords)
        expected_logits, expected = passed(smaller, **keywords)
        assert (routes[..., atom] == 0).all()
        torch.testing.assert_close(routes.sum(dim=-1), torch.ones(routes.shape[:-1]))
        torch.testing.assert_close(routes[..., left], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)


def test_the_atom_comes_back(backbone) -> None:
    model = adapted(backbone, top_k=2)
    before, routes = passed(model)
    atom = int(routes.sum(dim=(0, 1, 2)).argmax())
    with pytest.raises(RuntimeError), model.base_model.without_atom(atom):
        assert not torch.equal(passed(model)[0], before)
        raise RuntimeError
    assert torch.equal(passed(model)[0], before)


def test_an_atom_that_no_token_uses_is_not_missed(backbone) -> None:
    model = adapted(backbone, num_atoms=64, top_k=1)
    before, routes = passed(model)
    unused = (routes.sum(dim=(0, 1, 2)) == 0).nonzero().flatten().tolist()
    assert unused
    for atom in unused[:3]:
        with model.base_model.without_atom(atom):
            after, left = passed(model)
        assert torch.equal(after, before) and torch.equal(left, routes)


def test_of_two_adapters_one_alone_loses_its_atom(backbone) -> None:
    model = adapted(backbone, top_k=2)
    config = QueryableLoraConfig(
        r=3, num_atoms=ATOMS, num_blocks=2, prior_dim=4, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad(), model.base_model.record_routes() as passes, model.base_model.without_atom(1, "other"):
        model(IDS)
    used = {name: torch.stack(routes)[..., 1].any() for name, routes in passes[0].items()}
    assert used["default"] and not used["other"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((5,), "atoms 0 to 4, not 5"), ((-1,), "atoms 0 to 4, not -1"), ((0, "other"), "no adapter 'other'")],
)
def test_what_is_not_there_cannot_be_taken_out(backbone, arguments: tuple, words: str) -> None:
    model = adapted(backbone)
    with pytest.raises(ValueError, match=words), model.base_model.without_atom(*arguments):
        pass


def test_the_only_atom_stays(backbone) -> None:
    model = adapted(backbone, num_atoms=1, top_k=1)
    with pytest.raises(ValueError, match="one atom alone"), model.base_model.without_atom(0):
        pass
